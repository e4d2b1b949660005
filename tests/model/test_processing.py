"""The processor: pixels as Pillow resizes them, placements undone exactly, and sentences that keep their end."""

import json
import math
import re
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cmmasksd.errors import UserError
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.model.auto import CMMaskSDProcessor
from cmmasksd.model.loading import load_clip
from cmmasksd.model.locating import REQUIRED
from cmmasksd.model.pixels import CLIP_MEAN, CLIP_STD, normalize
from cmmasksd.model.placement import Placement, columns_first
from cmmasksd.model.tokenizing import load_tokenizer, tokenize
from conftest import TINY_CONTEXT, make_tokenizer

TOKENIZER = make_tokenizer()
SIDES = st.integers(60, 240)
RESIZES = st.sampled_from(["warp", "letterbox"])


def processor(size: tuple[int, int] = (160, 224), resize: str = "warp", **settings: object) -> CMMaskSDProcessor:
    return CMMaskSDProcessor(TOKENIZER, size, patch_size=8, resize=resize, **settings)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ellipse(height: int, width: int, y: float = 0.5, x: float = 0.5, size: float = 0.42) -> np.ndarray:
    """A mask that fills the image up to `size` of each side; y, x, size are fractions."""
    rows, columns = np.mgrid[:height, :width]
    return ((rows + 0.5) / height - y) ** 2 + ((columns + 0.5) / width - x) ** 2 <= size**2


def iou(a: Tensor, b: np.ndarray) -> float:
    both = a.numpy()
    return (both & b).sum() / (both | b).sum()


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("size", [(160, 224), (40, 64), (480, 480)])
@pytest.mark.parametrize("shape", [(120, 90), (427, 640), (33, 201), (160, 224)])
def test_pixels_equal_pillows_antialiased_bicubic(shape, size):
    image = noise(*shape) // 2 + 64  # no overshoot to clip: Pillow also clips between its two passes
    ours, placement = processor(size).image(image)
    theirs = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, *size)
    assert placement == Placement(shape, size, (0, 0, *size))
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 2


def _ordinary() -> list[tuple[int, int, tuple[int, int]]]:
    sides = (1, 33, 120, 427, 640, 1280, 1920)
    shapes = [(h, w) for h in sides for w in sides if h <= 16 * w]
    return [(*shape, size) for shape in shapes for size in ((128, 128), (480, 480), (160, 224))]


def test_ordinary_images_take_torchs_own_path():
    """Nothing that a model was trained on changes by a bit."""
    for height, width, size in _ordinary():
        assert not columns_first((height, width), size), (height, width, size)


@pytest.mark.parametrize("shape", [(400_000, 1), (30_000, 40)])
def test_long_and_narrow_images_are_shortened_first(shape, monkeypatch: pytest.MonkeyPatch):
    """torch resizes along the rows first: what lies between must not be larger than its input and output by far."""
    sizes, interpolate = [], F.interpolate

    def watched(tensor, size, **how):
        sizes.append(tensor.shape[-2] * size[1] / max(tensor.shape[-2] * tensor.shape[-1], size[0] * size[1]))
        return interpolate(tensor, size, **how)

    monkeypatch.setattr(F, "interpolate", watched)
    ours = processor((480, 480))
    image = np.full((*shape, 3), 77, np.uint8)
    image[: shape[0] // 2] = 200
    tensor, placement = ours.image(image)
    assert (tensor[:, :230] == 200).all()
    assert (tensor[:, 250:] == 77).all()
    target = ours.target(image[..., 0] == 200, placement, 4)
    assert (target[:57] > 0.999).all()
    assert (target[63:] < 0.001).all()
    assert len(sizes) >= 2
    assert max(sizes) <= 4


@pytest.mark.parametrize("shape", [(300, 1), (1, 300)])
def test_the_target_of_a_single_line(shape):
    """torch 2.13 gives a column of floats its first value throughout."""
    ours = processor((160, 160), "letterbox")
    mask = np.zeros(shape, bool)
    mask.ravel()[:150] = True
    target = ours.target(mask, ours.placement(*shape), 1).numpy().max(axis=int(shape[0] > 1))
    assert (target[:70] > 0.9).all()
    assert (target[90:] < 0.1).all()


def test_letterbox_lays_the_image_in_the_middle_of_clips_grey():
    image = noise(100, 300) // 2 + 64
    ours, placement = processor((160, 224), "letterbox").image(image)
    assert placement.content == (42, 0, 75, 224)
    assert ours.shape == (3, 160, 224)
    inside = ours[:, 42 : 42 + 75].permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(Image.fromarray(image).resize((224, 75), Image.Resampling.BICUBIC))
    assert np.abs(inside - theirs).max() <= 2
    outside = torch.cat([ours[:, :42], ours[:, 42 + 75 :]], dim=1).flatten(1)
    assert (outside == outside[:, :1]).all()
    # after normalisation the padding is as near to zero as a grey level allows
    assert normalize(ours[:, :1, :1]).abs().amax() < 0.5 / 255 / min(CLIP_STD)


def test_pixel_values_are_normalised_as_clip_expects():
    images = torch.from_numpy(noise(8, 8)).permute(2, 0, 1)[None]
    expected = (images.double() / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    values = processor().pixel_values(images)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    other = processor(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).pixel_values(images)
    torch.testing.assert_close(other, (images.float() / 255 - 0.5) / 0.25)


def test_read_only_and_strided_images_do_not_warn():
    """Pillow's arrays are read-only, a crop is strided: torch would warn of both, or refuse."""
    image = noise(64, 96)
    crop = image[::2, ::-1]
    locked = crop.copy()
    locked.flags.writeable = False
    lock_mask = ellipse(32, 96)
    lock_mask.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, placement = processor().image(crop)
        b, _ = processor().image(locked)
        processor().target(lock_mask, placement, 2.0)
    assert torch.equal(a, b)


def test_the_input_is_not_changed():
    image = noise(160, 224)  # the canvas's own size: nothing is resized
    before = image.copy()
    processor()(image, ["the red square"])
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_other_images_are_refused(image):
    with pytest.raises(UserError, match="RGB"):
        processor().image(image)


@pytest.mark.parametrize(
    ("size", "advice"), [((30, 32), "32x32"), ((160, 225), "160x224"), ((4, 8), "8x8"), ((0, 8), "8x8")]
)
def test_sizes_must_be_multiples_of_the_patch(size, advice):
    with pytest.raises(UserError, match=advice):
        processor(size)


def test_unknown_resize():
    with pytest.raises(UserError, match="stretch"):
        processor(resize="stretch")


# ----------------------------------------------------------------------------------------------------------- placements


@given(SIDES, SIDES, RESIZES)
@settings(max_examples=60, deadline=None)
def test_frames_are_undone(height, width, resize):
    """A big mask laid on the canvas and brought back is the mask, whatever the aspect ratio."""
    ours = processor(resize=resize)
    mask = ellipse(height, width)
    placement = ours.placement(height, width)
    logits = torch.logit(ours.target(mask, placement, 1), eps=1e-4)
    assert logits.shape == placement.canvas
    back = ours.masks(logits[None], placement)
    assert back.shape == (1, height, width)
    assert back.dtype == torch.bool
    assert iou(back[0], mask) > 0.97


@given(SIDES, SIDES, RESIZES, st.floats(0.25, 0.75), st.floats(0.25, 0.75))
@settings(max_examples=40, deadline=None)
def test_frames_put_things_where_they_were(height, width, resize, y, x):
    """The centre of what comes back lies within half a pixel of the canvas: no shift by a cell, nor by half of one. (A
    mask in the last cell, of which letterboxing may leave a part, can lie a little farther off.)"""
    ours = processor(resize=resize)
    mask = ellipse(height, width, y, x, 0.15)
    placement = ours.placement(height, width)
    back = ours.masks(torch.logit(ours.target(mask, placement, 4), eps=1e-4)[None], placement)[0].numpy()
    for axis, side, content in ((0, height, placement.content[2]), (1, width, placement.content[3])):
        shift = np.argwhere(back)[:, axis].mean() - np.argwhere(mask)[:, axis].mean()
        assert abs(shift) * content / side < 0.5


@given(st.integers(1, 300), st.integers(1, 300), RESIZES, st.sampled_from([(8, 8), (160, 224), (24, 240)]))
@settings(max_examples=100, deadline=None)
def test_the_content_lies_on_the_canvas(height, width, resize, size):
    placement = processor(size, resize).placement(height, width)
    top, left, h, w = placement.content
    assert placement.original == (height, width)
    assert placement.canvas == size
    assert h >= 1
    assert w >= 1
    assert 0 <= top <= top + h <= size[0]
    assert 0 <= left <= left + w <= size[1]
    assert h == size[0] or w == size[1]
    if resize == "letterbox" and min(h, w) > 1:  # the aspect ratio survives to a pixel
        scale = min(size[0] / height, size[1] / width)
        assert abs(h - height * scale) <= 0.5
        assert abs(w - width * scale) <= 0.5
        assert abs(2 * top + h - size[0]) <= 1
        assert abs(2 * left + w - size[1]) <= 1


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 2, 4, 3.5, 8]), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_letterbox_padding_never_leaks_into_the_image(height, width, stride, seed):
    """Whatever the network says of the padding, not one probability of the image may depend on it."""
    ours = CMMaskSDProcessor(TOKENIZER, (56, 112), patch_size=14, resize="letterbox")
    placement = ours.placement(height, width)
    top, left, h, w = placement.content
    cells = (round(56 / stride), round(112 / stride))
    rows = (torch.arange(cells[0]) + 0.5) * 56 / cells[0]
    columns = (torch.arange(cells[1]) + 0.5) * 112 / cells[1]
    inside = ((rows >= top) & (rows < top + h))[:, None] & ((columns >= left) & (columns < left + w))
    logits = torch.randn(cells, generator=torch.Generator().manual_seed(seed))
    if not inside.any():  # thinner than a cell and between two centres: the cell it lies in speaks for it
        inside[int((top + h / 2) * cells[0] / 56), :] = (columns >= left) & (columns < left + w) if w == 112 else False
        inside[:, int((left + w / 2) * cells[1] / 112)] |= (rows >= top) & (rows < top + h) if h == 56 else False
    low, high = (ours.probabilities(torch.where(inside, logits, value)[None], placement) for value in (-1e4, 1e4))
    assert torch.equal(low, high)
    assert low.amin() >= logits[inside].amin().sigmoid() - 1e-6
    assert low.amax() <= logits[inside].amax().sigmoid() + 1e-6


def test_targets_hold_how_much_of_a_cell_is_covered():
    ours = processor((32, 32))
    placement = ours.placement(32, 32)
    whole = np.ones((32, 32), bool)
    assert torch.equal(ours.target(whole, placement, 2), torch.ones(16, 16))
    assert torch.equal(ours.target(~whole, placement, 2), torch.zeros(16, 16))
    half = whole.copy()
    half[:, 16:] = False
    value = ours.target(half, placement, 4)
    assert value.shape == (8, 8)
    assert torch.equal(value[:, :3], torch.ones(8, 3))
    assert torch.equal(value[:, 5:], torch.zeros(8, 3))
    assert (value[:, 3] > 0.5).all()
    assert (value[:, 4] < 0.5).all()
    assert value.mean() == pytest.approx(0.5)


def test_letterboxed_targets_are_empty_in_the_padding():
    ours = processor((160, 224), "letterbox")
    placement = ours.placement(100, 300)
    value = ours.target(np.ones((100, 300), bool), placement, 1)
    assert torch.equal(value[:42], torch.zeros(42, 224))
    torch.testing.assert_close(value[42 : 42 + 75], torch.ones(75, 224))
    assert torch.equal(value[42 + 75 :], torch.zeros(43, 224))


@given(SIDES, SIDES, RESIZES, st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_targets_are_fractions(height, width, resize, stride):
    ours = processor(resize=resize)
    value = ours.target(ellipse(height, width), ours.placement(height, width), stride)
    assert value.shape == (160 // stride, 224 // stride)
    assert value.amin() >= 0
    assert value.amax() <= 1


def test_a_mask_of_another_size_is_refused():
    ours = processor()
    with pytest.raises(UserError, match=r"\(40, 30\).*\(30, 40\)"):
        ours.target(np.ones((40, 30), bool), ours.placement(30, 40), 2)


@pytest.mark.parametrize("threshold", [0.05, 0.35, 0.5, 0.9])
def test_threshold_is_one_of_probabilities(threshold):
    ours = processor((32, 32), "letterbox")
    placement = ours.placement(41, 67)
    logits = 3 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    probabilities = ours.probabilities(logits, placement)
    assert probabilities.shape == (3, 41, 67)
    clear = (probabilities - threshold).abs() > 1e-6
    assert torch.equal(ours.masks(logits, placement, threshold)[clear], (probabilities > threshold)[clear])
    share = ours.masks(logits, placement, threshold).float().mean()
    assert 0 < share < 1


def test_a_pixel_at_the_threshold_is_not_in_the_mask():
    ours = processor((32, 32))
    assert not ours.masks(torch.zeros(1, 8, 8), ours.placement(16, 16), 0.5).any()


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 35, math.nan])
def test_impossible_thresholds(threshold):
    ours = processor((32, 32))
    with pytest.raises(UserError, match="threshold"):
        ours.masks(torch.zeros(1, 8, 8), ours.placement(16, 16), threshold)


def test_half_precision_logits():
    ours = processor((32, 32))
    logits = torch.randn(1, 8, 8).bfloat16()
    assert ours.probabilities(logits, ours.placement(20, 20)).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ sentences


def test_tokens_and_their_words():
    tokens = processor().tokens(["the reddish square", "left"])
    pieces = [TOKENIZER.convert_ids_to_tokens(row.tolist()) for row in tokens.input_ids]
    # "reddish" falls into pieces that share a word; start, end and padding belong to none
    assert pieces[0] == ["<|startoftext|>", "the</w>", "re", "d", "d", "i", "s", "h</w>", "square</w>", "<|endoftext|>"]
    assert tokens.word_ids[0].tolist() == [-1, 0, 1, 1, 1, 1, 1, 1, 2, -1]
    assert tokens.word_ids[1].tolist() == [-1, 0] + [-1] * 8
    assert tokens.attention_mask.tolist() == [[1] * 10, [1, 1, 1] + [0] * 7]
    assert tokens.truncated.tolist() == [False, False]
    assert len(tokens) == 2


@pytest.mark.parametrize("limit", [3, 5, 9])
def test_long_sentences_lose_words_and_never_their_end(limit):
    texts = ["the red square on the left", "red", "the reddish circle"]
    whole, tokens = processor().tokens(texts), processor(max_tokens=limit).tokens(texts)
    assert tokens.input_ids.shape[1] == min(limit, whole.input_ids.shape[1])
    for row in range(3):
        length = int(tokens.attention_mask[row].sum())
        assert tokens.input_ids[row, length - 1] == TOKENIZER.eos_token_id
        assert torch.equal(tokens.input_ids[row, : length - 1], whole.input_ids[row, : length - 1])
        assert tokens.truncated[row] == (whole.attention_mask[row].sum() > limit)
        assert (tokens.word_ids[row, 1 : length - 1] >= 0).all()
    assert not tokens.truncated[1]


def test_the_tokenizers_own_limit_holds():
    """The text tower has no positions beyond it."""
    ours = processor(max_tokens=500)
    assert ours.max_tokens == TINY_CONTEXT
    tokens = ours.tokens(["red " * 60])
    assert tokens.input_ids.shape == (1, TINY_CONTEXT)
    assert tokens.truncated.tolist() == [True]


@pytest.mark.parametrize("limit", [2, 0, -1])
def test_a_limit_without_room_for_a_word(limit):
    with pytest.raises(UserError, match="max_tokens"):
        processor(max_tokens=limit)


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\x1c", "\u2003", "\u200b"])
def test_empty_sentences(text):
    with pytest.raises(UserError, match="empty"):
        processor().tokens(["the red square", text])


def test_special_tokens_that_a_user_types_are_words():
    """Else "<|endoftext|>" within a sentence would end it for the text tower, and pass as a word for the masking."""
    tokens = processor().tokens(["red <|endoftext|> square", "<|startoftext|> red"])
    for row in range(2):
        inner = tokens.word_ids[row] >= 0
        assert not torch.isin(tokens.input_ids[row][inner], torch.tensor(TOKENIZER.all_special_ids)).any()
        ends = (tokens.input_ids[row] == TOKENIZER.eos_token_id) & (tokens.attention_mask[row] == 1)
        assert ends.sum() == 1


def test_case_and_spaces_do_not_matter_and_no_character_is_unknown():
    ours = processor()
    assert torch.equal(ours.tokens(["The  RED square "]).input_ids, ours.tokens(["the red square"]).input_ids)
    tokens = ours.tokens(["größe 日本 🙂"])
    assert tokens.word_ids[0].amax() == 2


def test_word_ids_count_words_without_a_gap():
    """The masking counts words as the highest id plus one."""
    tokens = processor().tokens(["the red, square's left-hand circle: (blue)!", "a  1234 b"])
    for row in tokens.word_ids:
        words = row[row >= 0].unique()
        assert words.tolist() == list(range(len(words)))


def test_words_are_parts_of_their_sentence():
    text = "The  größe, UNBELIEVABLE circle🙂 "
    tokens = processor().tokens(["red", text])
    words = tokens.words(1)
    spelled = [text[word.start : word.end] for word in words]
    assert [word for word in spelled if word.isalpha()] == ["The", "größe", "UNBELIEVABLE", "circle"]
    assert "".join(spelled) == "".join(text.split())
    assert [position for word in words for position in word.tokens] == (tokens.word_ids[1] >= 0).nonzero()[
        :, 0
    ].tolist()
    assert len(words[spelled.index("UNBELIEVABLE")].tokens) > 1


def test_hidden_words_are_not_in_view():
    text = "the reddish square"
    tokens = processor().tokens([text])
    shown = tokens.hide(tokens.word_ids == 1).words(0)
    assert [text[word.start : word.end] for word in shown] == ["the", "square"]


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False
        model_max_length = 77

    with pytest.raises(UserError, match="fast"):
        CMMaskSDProcessor(Slow(), (32, 32), patch_size=8)


def test_tokenize_without_a_limit_uses_the_tokenizers():
    assert tokenize(TOKENIZER, ["red " * 60]).input_ids.shape == (1, TINY_CONTEXT)


# ---------------------------------------------------------------------------------------------------------------- files


def test_round_trip(tmp_path):
    ours = processor((64, 96), "letterbox", max_tokens=7, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    ours.save_pretrained(tmp_path / "new" / "folder")
    loaded = CMMaskSDProcessor.from_pretrained(tmp_path / "new" / "folder")
    for name in ("size", "resize", "patch_size", "max_tokens", "mean", "std"):
        assert getattr(loaded, name) == getattr(ours, name)
    image, texts = noise(50, 70), ["the red square on the left", "unbelievable"]
    (a, b, c), (d, e, f) = ours(image, texts), loaded(image, texts)
    assert torch.equal(a, d)
    assert c == f
    for name in ("input_ids", "attention_mask", "word_ids", "truncated"):
        assert torch.equal(getattr(b, name), getattr(e, name))


def test_call_gives_what_the_model_takes(tiny_model):
    image = noise(50, 70)
    values, tokens, placement = processor((32, 40))(image, ["red", "the left"])
    assert values.shape == (1, 3, 32, 40)
    assert placement.original == (50, 70)
    logits = tiny_model(values, tokens.input_ids, tokens.attention_mask, tokens.word_ids).logits
    assert logits.shape == (2, 16, 20)


@pytest.mark.parametrize("name", ["nothing", "someone/something"])
def test_no_processor_there(name, tmp_path):
    for where, said in (
        (name, "no (model|such) folder"),
        (tmp_path / name, "no model folder"),
        (tmp_path, "lacks .*tokenizer.json"),
    ):
        for load in (CMMaskSDProcessor.from_pretrained, load_tokenizer):
            with pytest.raises(UserError, match=said):
                load(where)


@pytest.mark.parametrize(
    "change",
    [
        {"colour": 1},
        {"resize": "stretch"},
        {"resize": ["warp"]},
        *(
            {"size": size}
            for size in ([33, 32], None, [32], [32, 32, 32], "ab", [1 << 70, 32], [8000, 8000], [32.0, 32])
        ),
        *({"size": size} for size in ([True, True], [0, 0], [-32, 32], {"0": 32, "1": 32})),
        *({"patch_size": size} for size in (0, -8, None, "8", 8.0, True, 1 << 70, 16)),
        *({"max_tokens": limit} for limit in (2, 0, -1, None, "9", 9.0, True, 1 << 70)),
        *({"mean": value} for value in (None, 0.5, [0.5], [0.5] * 4, [math.nan] * 3, [math.inf] * 3, [-1, 0, 0])),
        *({"mean": value} for value in ([2, 0, 0], [True] * 3, ["0.5"] * 3, "abc", [10**400] * 3)),
        *({"std": value} for value in ([0.5], [0, 0.5, 0.5], [-0.5] * 3, [math.nan] * 3, [1e-300] * 3, {"a": 1})),
    ],
)
def test_spoilt_settings(change, tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=re.escape(str(file))):
        CMMaskSDProcessor.from_pretrained(folder)


@pytest.mark.parametrize("key", ["size", "patch_size", "resize", "max_tokens", "mean", "std"])
def test_a_setting_is_missing(key, tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    del settings[key]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        CMMaskSDProcessor.from_pretrained(folder)


NOT_A_MODEL = {
    "empty": b"",
    "no JSON": b"{",
    "null": b"null",
    "list": b"[]",
    "text": b'"text"',
    "number": b"1" * 5000,
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "encoding": "{'ä': 1}".encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "mark": b"\xef\xbb\xbf{}",
    "zeros": b"\x00" * 100,
    "large": b'{"a": "' + b"x" * (33 << 20) + b'"}',
}


@pytest.mark.parametrize("content", NOT_A_MODEL)
@pytest.mark.parametrize("name", REQUIRED)
def test_files_that_are_none_of_a_model(name, content, tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / name).write_bytes(NOT_A_MODEL[content])
    with pytest.raises(UserError) as caught:
        Segmenter.from_pretrained(folder, device="cpu")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("missing", ["gone", "a folder"])
def test_every_file_is_required(name, missing, tiny_model_folder, tmp_path):
    """Without its tokenizer's files a model used to run on a vocabulary of two."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / name).unlink()
    if missing == "a folder":
        (folder / name).mkdir()
    with pytest.raises(UserError, match=f"lacks {name}"):
        Segmenter.from_pretrained(folder, device="cpu")
    if name.startswith("tokenizer"):
        with pytest.raises(UserError, match=f"lacks {name}"):
            transformers.AutoProcessor.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------ backbones


def from_backbone(folder: Path) -> CMMaskSDProcessor:
    return CMMaskSDProcessor.from_backbone(folder, (32, 40), patch_size=8, resize="letterbox", max_tokens=9)


@pytest.fixture
def clip_folder(tiny_clip_folder, tmp_path) -> Path:
    """A CLIP's folder that the test may spoil."""
    return Path(shutil.copytree(tiny_clip_folder, tmp_path / "clip"))


def test_from_backbone(tiny_clip_folder):
    ours = from_backbone(tiny_clip_folder)
    assert (ours.size, ours.resize, ours.max_tokens, ours.patch_size) == ((32, 40), "letterbox", 9, 8)
    assert (ours.mean, ours.std) == (CLIP_MEAN, CLIP_STD)
    assert ours.tokens(["the red square"]).input_ids.shape == (1, 5)


@pytest.mark.parametrize("version", [4, 5])
def test_pixels_are_normalised_as_the_backbones_are(version, clip_folder):
    """transformers 4 and 5 write it to different files."""
    found = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 1], "image_processor_type": "CLIPImageProcessor"}
    if version == 4:
        (clip_folder / "preprocessor_config.json").write_text(json.dumps(found))
    else:
        whole = {"image_processor": found, "processor_class": "CLIPProcessor"}
        (clip_folder / "processor_config.json").write_text(json.dumps(whole))
    ours = from_backbone(clip_folder)
    assert (ours.mean, ours.std) == ((0.5, 0.4, 0.3), (0.25, 0.5, 1.0))
    black = ours.pixel_values(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))[0, :, 0, 0]
    assert black.tolist() == pytest.approx([-2, -0.8, -0.3])
    ours.save_pretrained(clip_folder / "saved")
    assert CMMaskSDProcessor.from_pretrained(clip_folder / "saved").mean == ours.mean


@pytest.mark.parametrize(
    "content",
    [
        *NOT_A_MODEL.values(),
        b'{"image_mean": [0.5]}',
        b'{"image_mean": null}',
        b'{"image_std": [0, 0, 0]}',
        b'{"image_std": [NaN, 1, 1]}',
        b'{"image_mean": {"a": 1}}',
    ],
)
def test_spoilt_preprocessing(content, clip_folder):
    (clip_folder / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        from_backbone(clip_folder)


def test_a_backbone_of_the_hub(clip_folder, tmp_path, monkeypatch):
    """What the hub's cache holds is enough without a network."""
    (clip_folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    commit = "c" * 40
    repository = tmp_path / "cache" / "models--someone--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(clip_folder, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    ours = from_backbone(Path("someone/clip"))
    assert ours.mean == (0.5, 0.5, 0.5)
    assert ours.tokens(["red"]).input_ids.shape == (1, 3)
    assert load_clip("someone/clip").config.projection_dim == 40


def test_a_backbone_without_its_tokenizer(clip_folder):
    (clip_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks tokenizer\.json"):
        from_backbone(clip_folder)


def test_the_tokenizer_of_the_first_clips(clip_folder):
    """Two files in place of tokenizer.json, special tokens as objects, and an end token of 2 in config.json."""
    model = json.loads((clip_folder / "tokenizer.json").read_text())["model"]
    (clip_folder / "tokenizer.json").unlink()
    (clip_folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (clip_folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    end = {"content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    start = end | {"content": "<|startoftext|>"}
    tokens = {"unk_token": end, "bos_token": start, "eos_token": end, "pad_token": "<|endoftext|>"}
    (clip_folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    tokens = {key: one | {"__type": "AddedToken"} if isinstance(one, dict) else one for key, one in tokens.items()}
    settings = {"model_max_length": TINY_CONTEXT, "tokenizer_class": "CLIPTokenizer", "name_or_path": "./a"}
    (clip_folder / "tokenizer_config.json").write_text(json.dumps(tokens | settings))
    config = json.loads((clip_folder / "config.json").read_text())
    config["text_config"] |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    (clip_folder / "config.json").write_text(json.dumps(config))
    texts = ["the red square on the left", "unbelievable <|endoftext|>"]
    assert torch.equal(
        from_backbone(clip_folder).tokens(texts).input_ids, processor(max_tokens=9).tokens(texts).input_ids
    )


def test_a_backbone_says_how_many_tokens_it_takes(clip_folder):
    settings = json.loads((clip_folder / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (clip_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = CMMaskSDProcessor.from_backbone(clip_folder, (32, 40), patch_size=8, resize="warp", max_tokens=99)
    assert ours.max_tokens == TINY_CONTEXT


@pytest.mark.parametrize("change", [{"vocab_size": 400}, {"eos_token_id": 7}])
def test_another_models_tokenizer(change, clip_folder, tiny_model_folder, tmp_path):
    config = json.loads((clip_folder / "config.json").read_text())
    config["text_config"] |= change
    (clip_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="get the tokenizer of this model"):
        from_backbone(clip_folder)
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["clip_config"]["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="get the tokenizer of this model"):
        CMMaskSDProcessor.from_pretrained(folder)


def test_settings_of_a_strangers_tokenizer(clip_folder):
    file = clip_folder / "tokenizer_config.json"
    foreign = {
        "auto_map": {"AutoTokenizer": ["a--b.C", None]},
        "gguf_file": "../secret",
        "vocab_file": "/etc/passwd",
        "padding_side": "left",
        "truncation_side": "left",
        "chat_template": "{{ 1 / 0 }}",
        "init_inputs": [1, 2],
        "extra_special_tokens": ["the", "red"],
        "split_special_tokens": False,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | foreign))
    ours, expected = (from_backbone(clip_folder), processor(max_tokens=9))
    texts = ["the red square", "red " * 20]
    assert torch.equal(ours.tokens(texts).input_ids, expected.tokens(texts).input_ids)
