"""CLIP with a ResNet at stride 16: held to OpenAI's at stride 32, and to what blanking and hiding promise.

Conversion and the parity of embeddings are in test_openai.py.
"""

import shutil
from pathlib import Path

import pytest
import torch

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.errors import UserError
from cmmasksd.model.loading import save_float16
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer, tokenize
from cmmasksd.model.towers.families import FAMILIES
from cmmasksd.model.towers.resnet import CLIPResNetImageTower, CLIPResNetModel, clip_resnet_config
from conftest import TINY_CONTEXT, TINY_SIZES
from model.towers.openai_clip import ModifiedResNet, OpenAIClip

REACH = 228
"""Pixels beyond its edge that a patch of RN50 can depend on."""


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def pixels(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def clip(tiny_clip_resnet_folder: Path) -> CLIPResNetModel:
    return CLIPResNetModel.from_pretrained(tiny_clip_resnet_folder).eval()


@pytest.fixture
def theirs(tiny_tokenizer) -> ModifiedResNet:
    """The network whose weights `clip` has."""
    visual = OpenAIClip(len(tiny_tokenizer), TINY_CONTEXT, quick_gelu=True, resnet=True).visual
    assert isinstance(visual, ModifiedResNet)
    return visual


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (32, 32)])
@torch.no_grad()
def test_every_second_cell_is_openais(clip, theirs, size):
    image = pixels(2, *size)
    eighth, sixteenth, cells = clip.vision_model(image)
    _, expected_eighth, expected_sixteenth, expected = theirs.stages(image)
    close(eighth, expected_eighth)
    close(sixteenth, expected_sixteenth)
    assert cells.shape[-2:] == (size[0] // 16, size[1] // 16)
    close(cells[:, :, ::2, ::2], expected)
    assert expected.std() > 0.1


@torch.no_grad()
def test_the_other_cells_are_openais_on_the_shifted_image(clip, theirs):
    """Away from the border, where the shift by 16 pixels brings in what the other has not."""
    image = pixels(1, 1024, 64)
    cells, shifted = clip.vision_model(image)[2], theirs.stages(image[:, :, 16:-16])[3]
    close(cells[:, :, 1::2, ::2][:, :, 10:20], shifted[:, :, 10:20])


@torch.no_grad()
def test_patches_and_their_finer_features(clip):
    image = pixels(2, 32, 48)
    features, _ = CLIPResNetImageTower(clip)(image, value_path=True)
    eighth, sixteenth, cells = clip.vision_model(image)
    assert features.grid == (2, 3)
    pool = clip.vision_model.attnpool
    close(features.patches[:, 4], pool.c_proj(pool.v_proj(cells[:, :, 1, 1])))
    assert features.dense is not None
    assert torch.equal(features.dense, features.patches)
    assert features.pixels is not None
    finer = [eighth[:, :, 2:4, 2:4].flatten(1), sixteenth[:, :, 1, 1]]
    close(features.pixels[:, 4, 192:], torch.cat(finer, 1))
    assert [part.shape[1] for part in finer] == [
        c * s * s for c, s in FAMILIES["clip_resnet"].sizes(clip.config).scales
    ]


@torch.no_grad()
def test_the_patch_of_one_cell_is_the_embedding_but_for_positions(clip):
    """The value path lies in the joint space: with a single cell, attention pooling has nothing to choose."""
    pool = clip.vision_model.attnpool
    pool.positional_embedding.zero_()
    features, embedding = CLIPResNetImageTower(clip)(pixels(2, 16, 16))
    close(features.patches[:, 0], embedding)


@torch.no_grad()
def test_dropped_patches_have_no_influence(clip):
    image, tower = pixels(1, 64, 64), CLIPResNetImageTower(clip)
    keep = torch.tensor([[3, 0, 14, 7]])
    other = image.clone()
    other[..., 32:48, 16:48] += 3.0  # patches 9 and 10
    (before, whole), (after, other_whole) = (tower(x, keep=keep, value_path=True) for x in (image, other))
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.pixels, after.pixels)
    assert torch.equal(whole, other_whole)
    assert not torch.allclose(tower(image)[0].patches[:, 14], tower(other)[0].patches[:, 14])
    everything = torch.arange(16)[None]
    assert torch.equal(tower(image, keep=everything)[0].patches, tower(image)[0].patches)


def test_statistics_never_move(clip):
    image = pixels(2, 32, 32)
    before = {name: buffer.clone() for name, buffer in clip.named_buffers()}
    with torch.no_grad():
        expected = clip.vision_model(image)[2]
    cells = clip.train().vision_model(image)[2]
    close(cells, expected)
    cells.sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in clip.named_buffers())


def narrow(depths, **text) -> CLIPResNetModel:
    """A network of full depth and one head, with weights whose every path counts: no ReLU cuts one off."""
    text |= {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    sizes = {"depths": depths, "width": 2, "num_attention_heads": 1, "projection_dim": 24, "text_config": text}
    torch.manual_seed(0)
    network = CLIPResNetModel(clip_resnet_config(sizes))
    with torch.no_grad():
        for parameter in network.vision_model.parameters():
            if parameter.ndim == 4:
                parameter.copy_(torch.rand(parameter.shape) * 2 / parameter[0].numel())
    return network


@pytest.mark.parametrize(
    ("depths", "expected"), [([3, 4, 6, 3], (45, 133, REACH)), ([3, 4, 23, 3], (45, 405, 500))], ids=["RN50", "RN101"]
)
def test_reach(depths, expected):
    """Pixels beyond its edge that a patch depends on at strides 8 and 16 and in the joint space."""
    image = pixels(1, 16, 16 * 65).abs().requires_grad_()  # one row of patches; the middle one is 32
    features, _ = CLIPResNetImageTower(narrow(depths, vocab_size=9))(image)
    assert features.pixels is not None
    eighth, sixteenth = features.pixels[0, 32, 192:].split([16 * 2 * 2, 32])
    for part, reach in zip((eighth, sixteenth, features.patches[0, 32]), expected, strict=True):
        (gradient,) = torch.autograd.grad(part.sum(), image, retain_graph=True)
        columns = gradient.abs().sum((0, 1, 2)).nonzero()
        assert max(32 * 16 - columns.min().item(), columns.max().item() - (33 * 16 - 1)) == reach


@torch.no_grad()
@pytest.mark.parametrize("beyond", [REACH, 32])
def test_a_masked_view_sees_no_further_than_the_overlap(tiny_clip_resnet_folder, beyond, tmp_path):
    """At feature level, patches from 32 on are hidden. Pixels beyond the reach of patch 31 change nothing in what the
    branch predicts, neither by the joint space nor by a finer scale; nearer ones do."""
    tokenizer = load_tokenizer(tiny_clip_resnet_folder)
    network = narrow([3, 4, 6, 3], vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    network.save_pretrained(tmp_path)
    model = CMMaskSDModel.from_backbone(tmp_path, **TINY_SIZES).eval()
    objective = MaskedSelfDistillation(model, DistillationConfig(), 24).eval()
    hidden = (torch.arange(64) >= 32)[None]
    expression, index = model.encode_text(tokenize(tokenizer, ["the red square"])), torch.tensor([0])
    first = pixels(1, 16, 1024)
    second = first.clone()
    second[..., 32 * 16 + beyond :] += 3.0
    seen = []
    for image in (first, second):
        features = model.encode_image(image)
        view = objective.mask_patches(image, index, features, hidden)
        assert view.pixels is not None
        assert not view.pixels[:, 32:].any()  # all scales
        assert view.pixels[:, 0].any()
        seen.append((features, view))
    (features, view), (other_features, other_view) = seen
    assert not torch.equal(features.pixels, other_features.pixels)
    unchanged = torch.equal(view.patches, other_view.patches) and torch.equal(view.pixels, other_view.pixels)
    assert unchanged == (beyond == REACH)
    # the standardisation of the match comes from the whole image, as for every family
    logits = [model.decode(type(view)(v.patches, v.grid, pixels=v.pixels), expression) for v in (view, other_view)]
    assert torch.equal(*logits) == (beyond == REACH)


def test_rn50_has_its_known_size():
    """102 million weights, as OpenAI's."""
    with torch.device("meta"):
        network = CLIPResNetModel(clip_resnet_config({}))
    assert sum(parameter.numel() for parameter in network.parameters()) == 102_007_137


@torch.no_grad()
def test_saved_and_loaded(tiny_clip_resnet_folder, tmp_path):
    torch.manual_seed(0)
    model = CMMaskSDModel.from_backbone(tiny_clip_resnet_folder, **TINY_SIZES).eval()
    processor = CMMaskSDProcessor.from_backbone(
        tiny_clip_resnet_folder, (64, 48), patch_size=16, resize="warp", max_tokens=99
    )
    assert processor.max_tokens == TINY_CONTEXT
    save_float16(model, tmp_path)
    tokens = processor.tokens(["the red square", "right"])
    inputs = (pixels(1, 64, 48), tokens.input_ids, tokens.attention_mask, tokens.word_ids)
    half = CMMaskSDModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(half(*inputs).logits, model(*inputs).logits, rtol=0.02, atol=0.02)
    assert str(tiny_clip_resnet_folder) not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 3}, "width is 3"),
        ({"width": 4096}, "width is 4096"),
        ({"depths": [3, 4, 6]}, "depths is"),
        ({"depths": "3463"}, "depths is"),
        ({"depths": [3, 4, 6, True]}, r"depths\[3\]"),
        ({"depths": [3, 4, 10**9, 3]}, r"depths\[2\]"),
        ({"image_size": 200}, "image_size is 200"),
        ({"num_attention_heads": 7}, "among num_attention_heads 7"),
        ({"projection_dim": 0}, "projection_dim"),
        ({"text_config": {"vocab_size": 10**9}}, "vocab_size"),
        ({"text_config": []}, "text_config"),
    ],
)
def test_unfit_sizes_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        FAMILIES["clip_resnet"].config(change)


def test_another_size_stops_the_load(tiny_clip_resnet_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_clip_resnet_folder, tmp_path / "clip"))
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content.replace('"projection_dim": 48', '"projection_dim": 47'))
    with pytest.raises(UserError, match="of another shape"):
        CMMaskSDModel.from_backbone(folder)
