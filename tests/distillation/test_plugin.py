"""The objective trains a network that is not ours: transformers' CLIPSeg behind an adapter of some forty lines.

CLIPSeg's decoder reads three blocks of the image tower and its class token; no word ever reaches it, only the sentence.
The adapter is what a user would write for a network of their own.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens

WIDTH, TAPS = 32, [0, 1, 2]


class CLIPSegAdapter(nn.Module):
    """CLIPSeg as three calls. Its towers are frozen, as in its own forward pass.

    `patches` are the tapped blocks side by side, so D is their number times the width; the class token is `context`,
    which is never masked; and the correlation reads `dense`, the last block's patches in the joint space.
    """

    def __init__(self, network: CLIPSegForImageSegmentation) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def encode_image(self, pixel_values: Tensor, *, value_path: bool = False) -> ImageFeatures:
        clip, size = self.network.clip, self.network.config.vision_config.patch_size
        out = clip.vision_model(pixel_values, output_hidden_states=True)
        taps = torch.cat(
            [out.hidden_states[i + 1] for i in self.network.extract_layers], dim=-1
        )  # (B, 1 + N, 3 * width)
        dense = None
        if value_path:
            dense = clip.visual_projection(clip.vision_model.post_layernorm(out.last_hidden_state[:, 1:]))
        grid = (pixel_values.shape[-2] // size, pixel_values.shape[-1] // size)
        return ImageFeatures(taps[:, 1:], grid, dense, context=taps[:, :1])

    @torch.no_grad()
    def encode_text(self, tokens: Tokens) -> TextFeatures:
        clip = self.network.clip
        out = clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        words, sentence = clip.text_projection(out.last_hidden_state), clip.text_projection(out.pooler_output)
        return TextFeatures(words, sentence, tokens.word_ids >= 0)

    def decode(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        taps = torch.cat([image.context, image.patches], dim=1)
        activations = list(taps.chunk(len(self.network.extract_layers), dim=-1))
        return self.network.decoder(activations, text.sentence).logits


@pytest.fixture
def adapter(tiny_tokenizer) -> CLIPSegAdapter:
    torch.manual_seed(0)
    tower = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    last = len(tiny_tokenizer) - 1
    special = {"vocab_size": last + 1, "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    config = CLIPSegConfig(
        text_config=tower | special | {"max_position_embeddings": 24},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
        extract_layers=TAPS,
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    return CLIPSegAdapter(CLIPSegForImageSegmentation(config))


def objective_for(adapter: CLIPSegAdapter, **settings: object) -> MaskedSelfDistillation:
    settings = DistillationConfig(correlation="values", **settings)
    return MaskedSelfDistillation(adapter, settings, dim=WIDTH * len(TAPS))


@pytest.fixture
def batch(tiny_processor) -> tuple[Tensor, Tokens, Tensor]:
    """Two images of a bright square, and where it is."""
    images, masks = 0.3 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 32, 32)
    for row, (top, left) in enumerate(((0, 8), (16, 0))):
        masks[row, top : top + 16, left : left + 16] = 1
    images += 2 * masks[:, None]
    return images, tiny_processor.tokens(["the red square", "the square on the left"]), masks


@torch.no_grad()
def test_the_adapter_is_clipseg(adapter, batch):
    images, tokens, _ = batch
    adapter.eval()
    ours = adapter.decode(adapter.encode_image(images), adapter.encode_text(tokens))
    theirs = adapter.network(
        input_ids=tokens.input_ids, pixel_values=images, attention_mask=tokens.attention_mask
    ).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_it_trains_and_its_loss_falls(adapter, batch):
    objective = objective_for(adapter)
    trained = [p for name, p in objective.named_parameters() if "clip." not in name]
    start, optimizer = objective.mask_token.detach().clone(), torch.optim.AdamW(trained, lr=3e-3)
    history = []
    for _ in range(30):
        losses = objective(*batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    assert history[0].keys() == {"loss", "seg", "lmvsd", "vmlsd"}
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["seg"] < 0.7 * history[0]["seg"]
    assert max(step["lmvsd"] for step in history) > 1e-4  # the branches have something to learn
    assert max(step["vmlsd"] for step in history) > 1e-6
    assert not torch.equal(objective.mask_token, start)
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in adapter.network.clip.parameters())


@pytest.mark.parametrize(
    "settings",
    [{}, {"vision": False}, {"language": False}, {"language_level": "feature"}, {"vision_guide": "sentence"}],
)
def test_its_main_branch_is_untouched(adapter, batch, settings):
    """The seg loss is that of CLIPSeg alone, whatever branches run beside it in the batched call."""
    adapter.eval()
    plain = objective_for(adapter, vision=False, language=False)(*batch)
    losses = objective_for(adapter, **settings)(*batch)
    assert losses["seg"].item() == pytest.approx(plain["seg"].item(), rel=1e-5)
    assert losses["loss"] > plain["loss"]
