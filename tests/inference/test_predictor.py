"""Segmenter: any kind of image in, masks at its own size out, and one image encoding for all sentences."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

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
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer
from cmmasksd.pretraining.model import build_clip
from inference.contract import SegmenterContract

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


@pytest.mark.parametrize("resize", ["warp", "letterbox"])
class TestContract(SegmenterContract):
    @pytest.fixture
    def segmenter(self, resize: Literal["warp", "letterbox"]) -> Segmenter:
        segmenter = Segmenter.from_pretrained("scenes", device="cpu")
        segmenter.processor.resize = resize
        return segmenter


@pytest.fixture
def segmenter(folder: Path) -> Segmenter:
    return Segmenter.from_pretrained(folder, device="cpu")


def image_of(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """An image with large spots, so that a resize that differs shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def calls(segmenter: Segmenter, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of every later call of a method of the model."""
    made, method = [], getattr(segmenter.model, name)
    monkeypatch.setattr(segmenter.model, name, lambda *given: made.append(given) or method(*given))
    return made


def test_three_lines(folder: Path, tmp_path: Path):
    Image.fromarray(image_of()).save(tmp_path / "image.jpg")
    from cmmasksd import Segmenter

    segmenter = Segmenter.from_pretrained(str(folder))
    masks = [result.mask for result in segmenter.segment(str(tmp_path / "image.jpg"), ["the red circle", "a star"])]
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


def test_array_image_and_file_agree(segmenter: Segmenter, tmp_path: Path):
    pixels = image_of(50, 70)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    ways = [pixels, Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png"), content, io.BytesIO(content)]
    first, *others = [segmenter.segment(way, "the red circle")[0] for way in ways]
    for other in others:
        np.testing.assert_array_equal(other.mask, first.mask)
        np.testing.assert_array_equal(other.image, pixels)
        assert other.score == first.score


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_modes_of_a_image_of(segmenter: Segmenter, tmp_path: Path, mode: str):
    image = Image.fromarray(image_of(40, 56)).convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "a.tiff")
    opened, read = (segmenter.segment(way, "the red circle")[0] for way in (image, tmp_path / "a.tiff"))
    assert opened.image.shape == (40, 56, 3)
    np.testing.assert_array_equal(opened.image, read.image)
    np.testing.assert_array_equal(opened.mask, read.mask)


def test_exif_turns_the_image_of(segmenter: Segmenter, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(image_of(40, 60)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        for way in (tmp_path / "a.jpg", image):
            assert segmenter.segment(way, "a star")[0].mask.shape == (60, 40)


def test_the_image_is_encoded_once_for_all_sentences(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    images, texts = calls(segmenter, "encode_image", monkeypatch), calls(segmenter, "encode_text", monkeypatch)
    many = [f"the {word} circle" for word in range(70)]  # more than are decoded together
    decoded = calls(segmenter, "decode", monkeypatch)
    assert [result.text for result in segmenter.segment(image_of(), many)] == many
    assert len(images) == len(texts) == 1
    assert images[0][0].shape[0] == 1
    assert [len(text) for _, text in decoded] == [32, 32, 6]


def test_sentences_are_encoded_in_parts(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    """3,000 at once took a gigabyte. All are padded alike, so what a sentence gives does not depend on its part."""
    segmenter.threshold = 0.1
    many = [f"the red circle {'left ' * (nth % 3)}of {nth}" for nth in range(2 * ENCODE_TOGETHER + 5)]
    encoded = calls(segmenter, "encode_text", monkeypatch)
    parts = list(segmenter.decode(segmenter.encode([(image_of(), many)])))
    assert [len(tokens) for (tokens,) in encoded] == [ENCODE_TOGETHER, ENCODE_TOGETHER, 5]
    monkeypatch.setattr(predictor, "ENCODE_TOGETHER", len(many))
    for left, right in zip(parts, segmenter.decode(segmenter.encode([(image_of(), many)])), strict=True):
        assert left.text == right.text
        np.testing.assert_allclose(left.probability, right.probability, atol=1e-5)
    assert len(encoded) == 4


def test_mask_score_and_probability_are_the_processor_s(segmenter: Segmenter):
    """One upsampling serves all three; each is what the processor makes of the logits, bit for bit."""
    pixels = image_of(90, 61)
    segmenter.threshold = 0.1
    values, tokens, placement = segmenter.processor(pixels, SENTENCES)
    with torch.inference_mode():
        features = segmenter.model.encode_image(values).select(torch.zeros(3, dtype=torch.long))
        logits = segmenter.model.decode(features, segmenter.model.encode_text(tokens))
    for result, logit in zip(segmenter.segment(pixels, SENTENCES), logits, strict=True):
        mask = segmenter.processor.masks(logit[None], placement, 0.1)[0]
        probability = segmenter.processor.probabilities(logit[None], placement)[0]
        np.testing.assert_array_equal(result.mask, mask.numpy())
        np.testing.assert_array_equal(result.probability, probability.numpy())
        assert result.probability.dtype == np.float32
        assert result.score == (float(probability[mask].mean()) if mask.any() else 0)


def test_the_images_of_a_batch_are_encoded_together(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    images = calls(segmenter, "encode_image", monkeypatch)
    segmenter.segment_batch(
        [(image_of(60, 80), SENTENCES), (image_of(31, 200, 1), "a star"), (image_of(64, 64, 2), "a")]
    )
    assert [given[0].shape[0] for given in images] == [3]


def test_the_image_is_resized_as_in_training(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    """Trap 20: what enters the network is what the processor that trained it makes of the image."""
    seen = calls(segmenter, "encode_image", monkeypatch)
    pixels = image_of(90, 40)
    segmenter.segment(pixels, "a star")
    for_training, _ = segmenter.processor.image(pixels)
    torch.testing.assert_close(seen[0][0], segmenter.processor.pixel_values(for_training[None]), rtol=0, atol=0)


def test_the_score_is_the_mean_probability_of_the_mask(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    logits = torch.full((1, 16, 16), -4.0)
    logits[:, :, 8:] = 2.0
    monkeypatch.setattr(segmenter.model, "decode", lambda *given: logits)
    result = segmenter.segment(image_of(16, 16), "a star")[0]  # no resize: cells are pixels
    assert result.mask.tolist() == [[False] * 8 + [True] * 8] * 16
    assert result.score == pytest.approx(1 / (1 + np.exp(-2.0)), abs=1e-5)


def test_an_empty_mask_scores_0(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(segmenter.model, "decode", lambda *given: torch.full((1, 16, 16), -4.0))
    result = segmenter.segment(image_of(), "a star")[0]
    assert not result.mask.any()
    assert result.score == 0
    assert result.overlay(PALETTE[1]).shape == result.image.shape
    assert result.label().replace("\xa0", " ") == "a star: not found"


def test_a_call_is_segment_for_each_image(segmenter: Segmenter):
    images = [image_of(20, 30), image_of(16, 16), image_of()] * 4
    results = segmenter(images, ["a star", "left"])
    assert [[result.text for result in each] for each in results] == [["a star", "left"]] * 12
    for image, each in zip(images, results, strict=True):
        (alone,) = segmenter(image, "left")
        np.testing.assert_array_equal(each[1].image, image)
        np.testing.assert_allclose(each[1].probability, alone.probability, atol=1e-5)
    assert segmenter([], "left") == []


def test_a_segmentation_shows_itself(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (result,) = segmenter(image_of(20, 30), "left")
    assert re.fullmatch(
        r"Segmentation\('left', score=0\.\d{3}, presence=[01]\.\d{3}, box=(None|\(.+\)), image=30x20\)", repr(result)
    )
    with Image.open(io.BytesIO(result._repr_png_())) as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (360, 240))
    for name in ("a.png", "a.JPG", "a.webp"):
        result.save(tmp_path / name)
        with Image.open(tmp_path / name) as drawn:
            assert drawn.size == (360, 240)
    with pytest.raises(UserError, match=r"suffix '\.txt'"):
        result.save(tmp_path / "a.txt")
    seen = []
    monkeypatch.setattr(Image.Image, "show", lambda image, title: seen.append((image.size, title)))
    result.show()
    assert seen == [((360, 240), "left")]


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
