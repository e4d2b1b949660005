"""Segmenter: any kind of picture in, masks of the picture's own size out, and one image encoding for all sentences."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmmasksd.config import PretrainConfig
from cmmasksd.errors import UserError
from cmmasksd.inference import predictor
from cmmasksd.inference.predictor import ENCODE_TOGETHER, Segmenter
from cmmasksd.inference.visualize import PALETTE
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor, load_tokenizer
from cmmasksd.pretraining.model import build_clip

SENTENCES = ["the red circle", "star on the left", "large blue thing that is not there"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro model with random weights."""
    root = tmp_path_factory.mktemp("predictor")
    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny")
    sizes = PretrainConfig(width=32, vision_layers=1, text_layers=1, image_size=64, context=32)
    build_clip(sizes, tokenizer).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    model = CMMaskSDModel.from_backbone(
        root / "clip", decoder_width=32, decoder_layers=1, decoder_heads=2, decoder_mlp=32, head_width=16
    )
    processor = CMMaskSDProcessor.from_backbone(root / "clip", (64, 64), patch_size=16, resize="warp", max_tokens=20)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root / "model"


@pytest.fixture
def segmenter(folder: Path) -> Segmenter:
    return Segmenter.from_pretrained(folder, device="cpu")


def picture(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """A picture with large spots, so that a resize that differs shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def calls(segmenter: Segmenter, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of every later call of a method of the model."""
    made, method = [], getattr(segmenter.model, name)
    monkeypatch.setattr(segmenter.model, name, lambda *given: made.append(given) or method(*given))
    return made


def test_three_lines(folder: Path, tmp_path: Path):
    Image.fromarray(picture()).save(tmp_path / "picture.jpg")
    from cmmasksd import Segmenter

    segmenter = Segmenter.from_pretrained(str(folder))
    masks = [found.mask for found in segmenter.segment(str(tmp_path / "picture.jpg"), ["the red circle", "a star"])]
    assert [(mask.shape, mask.dtype) for mask in masks] == [((48, 64), np.dtype(bool))] * 2


def test_import_of_the_package_is_light():
    code = (
        "import sys, cmmasksd; assert 'Segmenter' in dir(cmmasksd); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'; "
        "from cmmasksd import Segmenter, Segmentation; assert Segmenter.__module__ == 'cmmasksd.inference.predictor'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import cmmasksd

    with pytest.raises(AttributeError, match="Segmentor"):
        _ = cmmasksd.Segmentor


def test_array_picture_and_file_agree(segmenter: Segmenter, tmp_path: Path):
    pixels = picture(50, 70)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    ways = [pixels, Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png"), content, io.BytesIO(content)]
    found = [segmenter.segment(way, "the red circle")[0] for way in ways]
    for other in found[1:]:
        np.testing.assert_array_equal(other.mask, found[0].mask)
        np.testing.assert_array_equal(other.image, pixels)
        assert other.score == found[0].score


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_modes_of_a_picture(segmenter: Segmenter, tmp_path: Path, mode: str):
    image = Image.fromarray(picture(40, 56)).convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "a.tiff")
    opened, read = (segmenter.segment(way, "the red circle")[0] for way in (image, tmp_path / "a.tiff"))
    assert opened.image.shape == (40, 56, 3)
    np.testing.assert_array_equal(opened.image, read.image)
    np.testing.assert_array_equal(opened.mask, read.mask)


def test_exif_turns_the_picture(segmenter: Segmenter, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(picture(40, 60)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        for way in (tmp_path / "a.jpg", image):
            assert segmenter.segment(way, "a star")[0].mask.shape == (60, 40)


@pytest.mark.parametrize("size", [(64, 64), (17, 90), (200, 31), (1, 1), (300, 301), (3, 300)])
@pytest.mark.parametrize("resize", ["warp", "letterbox"])
def test_mask_has_the_size_of_the_picture(segmenter: Segmenter, size: tuple[int, int], resize: str):
    segmenter.processor.resize = resize  # pyright: ignore
    for found in segmenter.segment(picture(*size), SENTENCES):
        assert found.mask.shape == size
        assert found.mask.dtype == bool
        assert 0 <= found.score <= 1
        assert found.overlay().shape == (*size, 3)


def test_the_image_is_encoded_once_for_all_sentences(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    images, texts = calls(segmenter, "encode_image", monkeypatch), calls(segmenter, "encode_text", monkeypatch)
    many = [f"the {word} circle" for word in range(70)]  # more than are decoded together
    decoded = calls(segmenter, "decode", monkeypatch)
    found = segmenter.segment(picture(), many)
    assert [one.text for one in found] == many
    assert len(images) == len(texts) == 1
    assert images[0][0].shape[0] == 1
    assert [len(text) for _, text in decoded] == [32, 32, 6]


def test_sentences_are_encoded_in_parts(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    """3,000 at once took a gigabyte. All are padded alike, so what a sentence gives does not depend on its part."""
    segmenter.threshold = 0.1
    many = [f"the red circle {'left ' * (nth % 3)}of {nth}" for nth in range(2 * ENCODE_TOGETHER + 5)]
    encoded = calls(segmenter, "encode_text", monkeypatch)
    parts = list(segmenter.decode(segmenter.encode([(picture(), many)])))
    assert [len(tokens) for (tokens,) in encoded] == [ENCODE_TOGETHER, ENCODE_TOGETHER, 5]
    monkeypatch.setattr(predictor, "ENCODE_TOGETHER", len(many))
    for found, one in zip(parts, segmenter.decode(segmenter.encode([(picture(), many)])), strict=True):
        assert found.text == one.text
        np.testing.assert_allclose(found.probability, one.probability, atol=1e-5)
    assert len(encoded) == 4


def test_many_sentences_give_what_each_gives_alone(segmenter: Segmenter):
    pixels = picture(60, 80)
    segmenter.threshold = 0.1  # an untrained model is sure of nothing
    sentences = [*SENTENCES, *(f"{colour} heart" for colour in ("red", "green", "white") for _ in range(11))]
    together = segmenter.segment(pixels, sentences)
    assert len({found.mask.tobytes() for found in together}) > 1  # the sentence matters at all
    for found in (*together[:4], together[-1]):
        alone = segmenter.segment(pixels, found.text)[0]
        assert (alone.mask != found.mask).mean() < 0.002  # rounding may move single pixels across the threshold
        assert alone.score == pytest.approx(found.score, abs=2e-3)


def test_mask_score_and_probability_are_the_processor_s(segmenter: Segmenter):
    """One upsampling serves all three; each is what the processor makes of the logits, bit for bit."""
    pixels = picture(90, 61)
    segmenter.threshold = 0.1
    values, tokens, placement = segmenter.processor(pixels, SENTENCES)
    with torch.inference_mode():
        features = segmenter.model.encode_image(values).select(torch.zeros(3, dtype=torch.long))
        logits = segmenter.model.decode(features, segmenter.model.encode_text(tokens))
    for found, logit in zip(segmenter.segment(pixels, SENTENCES), logits, strict=True):
        mask = segmenter.processor.masks(logit[None], placement, 0.1)[0]
        probability = segmenter.processor.probabilities(logit[None], placement)[0]
        np.testing.assert_array_equal(found.mask, mask.numpy())
        np.testing.assert_array_equal(found.probability, probability.numpy())
        assert found.probability.dtype == np.float32
        assert found.score == (float(probability[mask].mean()) if mask.any() else 0)


@pytest.mark.parametrize("resize", ["warp", "letterbox"])
def test_a_batch_gives_what_each_image_gives_alone(segmenter: Segmenter, resize: str, monkeypatch: pytest.MonkeyPatch):
    segmenter.processor.resize = resize  # pyright: ignore
    segmenter.threshold = 0.1
    many = [f"{colour} {shape}" for colour in ("red", "green", "blue") for shape in ("star", "heart", "ring") * 5]
    requests = [(picture(60, 80), SENTENCES), (picture(31, 200, 1), many), (picture(64, 64, 2), "a star")]
    alone = [segmenter.segment(image, texts) for image, texts in requests]
    images = calls(segmenter, "encode_image", monkeypatch)
    together = segmenter.segment_batch(requests)
    assert [given[0].shape[0] for given in images] == [3]
    assert [[found.text for found in row] for row in together] == [SENTENCES, many, ["a star"]]
    for row, expected in zip(together, alone, strict=True):
        for found, one in zip(row, expected, strict=True):
            np.testing.assert_array_equal(found.image, one.image)
            np.testing.assert_allclose(found.probability, one.probability, atol=1e-4)
            assert (found.mask != one.mask).mean() < 0.002  # rounding may move single pixels across the threshold
            assert found.score == pytest.approx(one.score, abs=2e-3)
    assert segmenter.segment_batch([]) == []


def test_a_threshold_for_each_image(segmenter: Segmenter):
    encoded = segmenter.encode([(picture(), "a star"), (picture(), "a star")])
    low, high = segmenter.decode(encoded, [0.05, 0.4])
    for found, threshold in ((low, 0.05), (high, 0.4)):
        np.testing.assert_array_equal(found.mask, found.probability > threshold)


def test_the_picture_is_resized_as_in_training(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    """Trap 20: what enters the network is what the processor that trained it makes of the picture."""
    seen = calls(segmenter, "encode_image", monkeypatch)
    pixels = picture(90, 40)
    segmenter.segment(pixels, "a star")
    for_training, _ = segmenter.processor.image(pixels)
    torch.testing.assert_close(seen[0][0], segmenter.processor.pixel_values(for_training[None]), rtol=0, atol=0)


def test_the_score_is_the_mean_probability_of_the_mask(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    logits = torch.full((1, 16, 16), -4.0)
    logits[:, :, 8:] = 2.0
    monkeypatch.setattr(segmenter.model, "decode", lambda *given: logits)
    found = segmenter.segment(picture(16, 16), "a star")[0]  # no resize: cells are pixels
    assert found.mask.tolist() == [[False] * 8 + [True] * 8] * 16
    assert found.score == pytest.approx(1 / (1 + np.exp(-2.0)), abs=1e-5)


def test_an_empty_mask_scores_0(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(segmenter.model, "decode", lambda *given: torch.full((1, 16, 16), -4.0))
    found = segmenter.segment(picture(), "a star")[0]
    assert not found.mask.any()
    assert found.score == 0
    np.testing.assert_array_equal(found.overlay(PALETTE[1]), found.image)


def test_a_higher_threshold_gives_a_smaller_mask(folder: Path):
    masks = [
        Segmenter.from_pretrained(folder, threshold=threshold).segment(picture(), "a star")[0].mask
        for threshold in (0.1, 0.5, 0.9)
    ]
    assert (masks[0] | ~masks[1]).all()
    assert (masks[1] | ~masks[2]).all()
    assert masks[0].sum() > masks[2].sum()


@pytest.mark.parametrize("texts", ["", "  ", [], ["a star", "\t"]])
def test_no_sentence_is_a_mistake(segmenter: Segmenter, texts: str | list[str]):
    with pytest.raises(UserError, match="sentence"):
        segmenter.segment(picture(), texts)


@pytest.mark.parametrize("pixels", [np.zeros((5, 5, 2), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)])
def test_an_array_that_is_no_picture(segmenter: Segmenter, pixels: np.ndarray):
    with pytest.raises(UserError, match=r"\(H, W, 3\) uint8"):
        segmenter.segment(pixels, "a star")


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, float("nan")])
def test_a_threshold_is_a_probability(folder: Path, threshold: float):
    with pytest.raises(UserError, match="between 0 and 1"):
        Segmenter.from_pretrained(folder, threshold=threshold)


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there(folder: Path, device: str):
    with pytest.raises(UserError, match=rf"device '{device}'"):
        Segmenter.from_pretrained(folder, device=device)


def test_no_model(tmp_path: Path):
    with pytest.raises(UserError, match="model folder"):
        Segmenter.from_pretrained(tmp_path / "nothing")


def test_incomplete_weights_stop(folder: Path, tmp_path: Path):
    """Trap 17: a model of which a part would be random is no model."""
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    broken = copytree(folder, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    del weights[next(name for name in weights if name.startswith("decoder."))]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing"):
        Segmenter.from_pretrained(broken)
