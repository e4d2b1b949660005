"""The two towers: held to what transformers' own CLIP computes, to 1e-5, and to what dropping and hiding promise."""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from cmmasksd.model.tokenizing import tokenize
from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens
from cmmasksd.model.towers.clip import CLIPImageTower, CLIPTextTower
from conftest import make_clip

SIZES = [
    (32, 32),  # the size of the position embeddings
    (64, 16),  # as many patches as that, in another shape
    (40, 24),
    (72, 48),
    (8, 8),  # one patch
]
SENTENCES = ["the red square", "a blue circle left of unbelievable things", "right"]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def pixels(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def recolour(image: Tensor, patch: int, size: int = 8) -> Tensor:
    """The same images with other pixels in one patch."""
    row, column = divmod(patch, image.shape[-1] // size)
    image = image.clone()
    image[..., row * size : (row + 1) * size, column * size : (column + 1) * size] += 3.0
    return image


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(tiny_clip_folder).eval()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------------- image


@pytest.mark.parametrize("size", SIZES)
def test_pooled_image_equals_transformers(clip, size):
    image = pixels(2, *size)
    _, pooled = CLIPImageTower(clip)(image)
    close(pooled, clip.get_image_features(pixel_values=image, interpolate_pos_encoding=True).pooler_output)


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_the_last_hidden_state_through_norm_and_projection(clip, size):
    image = pixels(2, *size)
    features, _ = CLIPImageTower(clip)(image)
    hidden = clip.vision_model(image, interpolate_pos_encoding=True).last_hidden_state
    close(features.patches, clip.visual_projection(clip.vision_model.post_layernorm(hidden[:, 1:])))
    assert features.grid == (size[0] // 8, size[1] // 8)
    assert features.patches.shape == (2, size[0] * size[1] // 64, clip.config.projection_dim)
    assert features.dense is None
    assert features.context is None


def test_native_size_equals_the_whole_clip_model(clip, tiny_tokenizer):
    """CLIPModel.forward: its normalised embeddings and its logits."""
    image, tokens = pixels(3, 32, 32), tokenize(tiny_tokenizer, SENTENCES)
    theirs = clip(pixel_values=image, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    pooled, sentence = CLIPImageTower(clip)(image)[1], CLIPTextTower(clip)(tokens).sentence
    close(F.normalize(pooled, dim=-1), theirs.image_embeds)
    close(F.normalize(sentence, dim=-1), theirs.text_embeds)
    logits = F.normalize(sentence, dim=-1) @ F.normalize(pooled, dim=-1).T * clip.logit_scale.exp()
    close(logits, theirs.logits_per_text, 1e-4)


def test_patches_lie_row_by_row(clip):
    """Patch i of the grid is patch i of the features: the one whose pixels change, changes most."""
    image = pixels(1, 24, 40)
    before = CLIPImageTower(clip)(image)[0].patches
    for patch in (0, 4, 7, 14):
        change = (CLIPImageTower(clip)(recolour(image, patch))[0].patches - before).norm(dim=-1)[0]
        assert change.argmax() == patch


def test_keeping_every_patch_equals_keeping_none_out(clip):
    image = pixels(2, 40, 24)
    whole, pooled = CLIPImageTower(clip)(image)
    kept, kept_pooled = CLIPImageTower(clip)(image, keep=torch.arange(15).expand(2, 15))
    close(kept.patches, whole.patches)
    close(kept_pooled, pooled)


def test_kept_patches_come_back_in_the_given_order(clip):
    image = pixels(2, 32, 32)
    keep = torch.tensor([[3, 9, 12], [0, 1, 15]])
    features, pooled = CLIPImageTower(clip)(image, keep=keep)
    turned, turned_pooled = CLIPImageTower(clip)(image, keep=keep.flip(1))
    assert features.patches.shape == (2, 3, clip.config.projection_dim)
    assert features.grid == (4, 4)  # of the whole image
    close(turned.patches, features.patches.flip(1))
    close(turned_pooled, pooled)


def test_dropped_patches_have_no_influence(clip):
    image, keep = pixels(1, 32, 32), torch.tensor([[1, 5, 6, 11]])
    before, pooled = CLIPImageTower(clip)(image, keep=keep, value_path=True)
    for patch in (0, 2, 15):  # dropped
        after, after_pooled = CLIPImageTower(clip)(recolour(image, patch), keep=keep, value_path=True)
        assert torch.equal(after.patches, before.patches)
        assert torch.equal(after.dense, before.dense)
        assert torch.equal(after_pooled, pooled)
    kept = CLIPImageTower(clip)(recolour(image, 5), keep=keep)[0]
    assert not torch.allclose(kept.patches[:, 0], before.patches[:, 0], atol=1e-3)  # the test can see a leak


def test_dropping_leaves_the_others_at_their_positions(clip):
    """Two images that differ only in where a patch lies must not look alike once the rest is dropped."""
    image = torch.zeros(1, 3, 32, 32)
    here, there = (CLIPImageTower(clip)(image, keep=torch.tensor([[at]]))[0].patches for at in (0, 10))
    assert not torch.allclose(here, there, atol=1e-2)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_value_path_equals_a_computation_by_hand(clip, size):
    image = pixels(2, *size)
    features, pooled = CLIPImageTower(clip)(image, value_path=True)
    last = clip.vision_model.encoder.layers[-1]
    out = clip.vision_model(image, interpolate_pos_encoding=True, output_hidden_states=True)
    entering = out.hidden_states[-2][:, 1:]  # what the last block reads, without the class token
    norm, attention, final = last.layer_norm1, last.self_attn, clip.vision_model.post_layernorm
    hand = F.layer_norm(entering, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    hand = hand @ attention.v_proj.weight.T + attention.v_proj.bias
    hand = hand @ attention.out_proj.weight.T + attention.out_proj.bias
    hand = F.layer_norm(hand, final.normalized_shape, final.weight, final.bias, final.eps)
    close(features.dense, hand @ clip.visual_projection.weight.T)
    plain, plain_pooled = CLIPImageTower(clip)(image)
    assert torch.equal(features.patches, plain.patches)
    assert torch.equal(pooled, plain_pooled)


def test_value_path_follows_keep(clip):
    image = pixels(1, 32, 32)
    keep = torch.arange(16)[None]
    whole = CLIPImageTower(clip)(image, value_path=True)[0]
    some = CLIPImageTower(clip)(image, value_path=True, keep=keep.flip(1))[0]
    close(some.dense, whole.dense.flip(1))


def test_select_repeats_every_part_of_the_features():
    part = torch.arange(2.0)[:, None, None].expand(2, 4, 3)
    features = ImageFeatures(
        part,
        (2, 2),
        dense=part + 10,
        context=part[:, 0] + 20,
        pixels=part + 30,
        hidden=part[..., 0] > 0,
        whole=part + 40,
    )
    chosen = features.select(torch.tensor([1, 0, 1]))
    assert len(features) == 2
    assert len(chosen) == 3
    assert chosen.grid == (2, 2)
    assert chosen.patches[:, 0, 0].tolist() == [1, 0, 1]
    assert chosen.dense[:, 0, 0].tolist() == [11, 10, 11]
    assert chosen.context[:, 0].tolist() == [21, 20, 21]
    assert chosen.pixels[:, 0, 0].tolist() == [31, 30, 31]
    assert chosen.hidden[:, 0].tolist() == [True, False, True]
    assert chosen.whole[:, 0, 0].tolist() == [41, 40, 41]
    bare = ImageFeatures(part, (2, 2)).select(torch.tensor([0]))
    assert bare.dense is None
    assert bare.context is None
    assert bare.pixels is None
    assert bare.hidden is None
    assert bare.whole is None


# ----------------------------------------------------------------------------------------------------------------- text


@torch.no_grad()
@pytest.mark.parametrize("size", [14, 16, 32])
def test_a_patch_has_its_own_pixels_alone(size):
    vision = {"patch_size": size, "image_size": 2 * size, "hidden_size": 16, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "num_hidden_layers": 1}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={"hidden_size": 16, "num_hidden_layers": 1}))
    image = torch.randn(1, 3, 2 * size, 3 * size)
    other = image.clone()
    other[..., :size, size : 2 * size] += 1  # the second patch
    before, after = (CLIPImageTower(clip)(pixels)[0].pixels for pixels in (image, other))
    assert before.shape == (1, 6, 192)
    torch.testing.assert_close(after[0, 1], before[0, 1] + 1)
    assert torch.equal(after[0, [0, 2, 3, 4, 5]], before[0, [0, 2, 3, 4, 5]])
    if size == 16:  # rows of a channel follow each other
        corner = image[0, 2, size : size + 4, 2 * size : 2 * size + 2].reshape(2, 4).mean(1)
        torch.testing.assert_close(before[0, 5, [128, 136]], corner)


@torch.no_grad()
def test_kept_patches_bring_their_own_pixels(clip):
    image, keep = torch.randn(2, 3, 32, 48), torch.tensor([[3, 1], [0, 2]])
    whole = CLIPImageTower(clip)(image)[0].pixels
    kept = CLIPImageTower(clip)(image, keep=keep)[0].pixels
    assert torch.equal(kept, torch.stack([whole[0, [3, 1]], whole[1, [0, 2]]]))


def test_text_equals_transformers(clip, tiny_tokenizer):
    tokens = tokenize(tiny_tokenizer, SENTENCES)
    features = CLIPTextTower(clip)(tokens)
    theirs = clip.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    close(features.sentence, theirs.pooler_output)
    hidden = clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    close(features.words, hidden @ clip.text_projection.weight.T)


def test_threads_that_share_a_model_get_their_own_sentences_and_images(clip, tiny_tokenizer):
    """Every call is inside the towers at the same time as the other thread's."""
    meet = threading.Barrier(2)

    def wait(*_: object) -> None:
        meet.wait(timeout=60)

    sides = [tokenize(tiny_tokenizer, [text]) for text in ("the red square", "the blue circle")]
    images = [pixels(1, 32, 32, seed) for seed in (0, 1)]
    alone = [
        (CLIPTextTower(clip)(said), CLIPImageTower(clip)(image, value_path=True)[0])
        for said, image in zip(sides, images, strict=True)
    ]

    @torch.no_grad()
    def both(side: int) -> tuple[TextFeatures, ImageFeatures]:
        return CLIPTextTower(clip)(sides[side]), CLIPImageTower(clip)(images[side], value_path=True)[0]

    modules = (clip.text_model.embeddings.token_embedding, clip.vision_model.encoder.layers[-1].layer_norm1)
    hooks = [module.register_forward_pre_hook(wait) for module in modules]
    try:
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(both, (0, 1), timeout=120))
    finally:
        for hook in hooks:
            hook.remove()
    for (text, image), (text_alone, image_alone) in zip(together, alone, strict=True):
        assert torch.equal(text.embedded, text_alone.embedded)
        assert torch.equal(text.words, text_alone.words)
        assert torch.equal(image.dense, image_alone.dense)


def test_eager_attention_equals_the_fused_kernel(clip, tiny_clip_folder, tiny_tokenizer):
    eager = CLIPModel.from_pretrained(tiny_clip_folder, attn_implementation="eager").eval()
    tokens = tokenize(tiny_tokenizer, SENTENCES)
    close(CLIPTextTower(eager)(tokens).words, CLIPTextTower(clip)(tokens).words)


def test_word_mask_is_true_for_pieces_of_words_only(clip, tiny_tokenizer):
    tokens = tokenize(tiny_tokenizer, SENTENCES)
    mask = CLIPTextTower(clip)(tokens).word_mask
    special = torch.tensor([tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id])
    assert torch.equal(mask, ~torch.isin(tokens.input_ids, special))
    assert mask[0].sum() == 3
    assert mask[2].sum() == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_the_sentence_is_the_end_token(legacy, tiny_tokenizer):
    """Old CLIP configurations say eos_token_id 2, which is not their end token; transformers pools those by argmax."""
    clip = make_clip(len(tiny_tokenizer), **({"eos_token_id": 2} if legacy else {}))
    tokens = tokenize(tiny_tokenizer, SENTENCES)
    ends = tokens.attention_mask.sum(1) - 1
    assert (tokens.input_ids[torch.arange(3), ends] == tiny_tokenizer.eos_token_id).all()
    hidden = torch.zeros_like(tokens.word_ids, dtype=torch.bool)
    hidden[:, 1] = True
    for said in (tokens, tokens.hide(hidden)):
        features = CLIPTextTower(clip)(said)
        close(features.sentence, features.words[torch.arange(3), ends])


def test_a_sentence_is_the_same_alone_and_beside_a_longer_one(clip, tiny_tokenizer):
    together = CLIPTextTower(clip)(tokenize(tiny_tokenizer, SENTENCES))
    for i, text in enumerate(SENTENCES):
        alone = CLIPTextTower(clip)(tokenize(tiny_tokenizer, [text]))
        length = alone.words.shape[1]
        close(alone.sentence[0], together.sentence[i])
        close(alone.words[0], together.words[i, :length])
        assert not together.word_mask[i, length:].any()


# --------------------------------------------------------------------------------------------------------------- hiding


@pytest.fixture(scope="module")
def said(tiny_tokenizer) -> tuple[Tokens, Tensor]:
    """Sentences, and a mask of their second word (several pieces in the first)."""
    tokens = tokenize(tiny_tokenizer, ["the enormous square", "the red square on the left"])
    return tokens, tokens.word_ids == 1


def test_a_hidden_word_has_no_influence(clip, said):
    tokens, hidden = said
    other = Tokens(
        torch.where(hidden, (tokens.input_ids + 7) % 500, tokens.input_ids),
        tokens.attention_mask,
        tokens.word_ids,
        tokens.truncated,
    )
    assert not torch.equal(other.input_ids, tokens.input_ids)
    a, b = CLIPTextTower(clip)(tokens.hide(hidden)), CLIPTextTower(clip)(other.hide(hidden))
    assert torch.equal(a.words, b.words)
    assert torch.equal(a.sentence, b.sentence)
    assert torch.equal(a.word_mask, b.word_mask)
    seen = CLIPTextTower(clip)(tokens).sentence - CLIPTextTower(clip)(other).sentence
    assert seen.abs().amax() > 1e-2  # the test can see a leak


def test_hiding_changes_what_it_hides_and_nothing_else(said):
    tokens, hidden = said
    after = tokens.hide(hidden)
    assert hidden[0].sum() > 1
    assert (after.word_ids[hidden] == -1).all()
    assert (after.attention_mask[hidden] == 0).all()
    for name in ("input_ids", "attention_mask", "word_ids"):
        assert torch.equal(getattr(after, name)[~hidden], getattr(tokens, name)[~hidden])
    assert torch.equal(after.truncated, tokens.truncated)


def test_hiding_nothing_is_the_whole_sentence(clip, said):
    tokens, hidden = said
    before, after = CLIPTextTower(clip)(tokens), CLIPTextTower(clip)(tokens.hide(hidden & False))
    assert torch.equal(before.words, after.words)
    assert torch.equal(before.sentence, after.sentence)


def test_a_hidden_word_leaves_its_place_empty(clip, tiny_tokenizer):
    """Positions stay: hiding is not the same as never having said the word."""
    tokens = tokenize(tiny_tokenizer, ["the red square"])
    hidden = CLIPTextTower(clip)(tokens.hide(tokens.word_ids == 1)).sentence
    left_out = CLIPTextTower(clip)(tokenize(tiny_tokenizer, ["the square"])).sentence
    assert not torch.allclose(hidden, left_out, atol=1e-2)


def test_tokens_move_with_all_their_parts(said):
    tokens, _ = said
    moved = tokens.to("meta")
    assert {getattr(moved, name).device.type for name in inspect.signature(Tokens).parameters} == {"meta"}
    assert len(moved) == len(tokens) == 2
