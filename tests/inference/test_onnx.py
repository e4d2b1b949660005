"""The predictor of exported models against the torch one, and what it says to folders that are no sound export."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmmasksd.cli import main
from cmmasksd.data.scenes import SceneDataset
from cmmasksd.errors import UserError
from cmmasksd.inference.export_settings import ExportSettings
from cmmasksd.inference.onnx import OnnxSegmenter
from cmmasksd.inference.predictor import Segmenter, load_segmenter
from cmmasksd.model.placement import place
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer
from fuzz import FUZZ, check
from inference.contract import SegmenterContract, assert_close, scenes

pytest.importorskip("onnxruntime", reason="the extra export is not installed")


@pytest.fixture(scope="module")
def segmenter(exported: Path) -> OnnxSegmenter:
    segmenter = load_segmenter(exported)
    assert isinstance(segmenter, OnnxSegmenter)
    return segmenter


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def test_masks_are_torchs(segmenter: OnnxSegmenter):
    torch_segmenter, masks = load_segmenter("scenes", device="cpu"), 0
    requests = scenes()
    for left, right in zip(torch_segmenter.segment_batch(requests), segmenter.segment_batch(requests), strict=True):
        for expected, result in zip(left, right, strict=True):
            union = (expected.mask | result.mask).sum()
            assert (expected.mask & result.mask).sum() >= 0.99 * union
            assert_close(expected, result)
            masks += union > 0
    assert masks >= 6


@pytest.mark.parametrize("resize", ["warp", "letterbox"])
class TestContract(SegmenterContract):
    @pytest.fixture
    def segmenter(self, segmenter: OnnxSegmenter, resize: Literal["warp", "letterbox"]) -> OnnxSegmenter:
        settings = replace(segmenter.settings, resize=resize)
        return OnnxSegmenter(settings, segmenter.tokenizer, segmenter.sessions)


def test_a_wrong_threshold_is_refused_at_once(exported: Path):
    with pytest.raises(UserError, match="between 0 and 1"):
        OnnxSegmenter.from_pretrained(exported, threshold=1.0)


def test_neither_torch_nor_transformers_is_imported(exported: Path):
    code = f"""
import sys
import numpy as np
from cmmasksd.inference.onnx import OnnxSegmenter
found = OnnxSegmenter.from_pretrained({str(exported)!r}).segment(np.zeros((9, 9, 3), np.uint8), "red circle")
assert found[0].mask.shape == (9, 9)
assert not {{"torch", "transformers", "accelerate", "torchmetrics"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_predict_runs_an_export(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = SceneDataset("scenes", "val", 1)
    Image.fromarray(data.image(data[0])).save(tmp_path / "scene.png")
    given = ["--image", str(tmp_path / "scene.png"), "--text", data[0].expressions[0].text, "--out"]
    for model in ("scenes", str(exported)):
        assert main(["predict", "--model", model, *given, str(tmp_path / Path(model).parent.name)]) == 0
    assert capsys.readouterr().out.count("score") == 2
    left, right = (sorted((tmp_path / name).glob("*mask.png")) for name in ("", exported.parent.name))
    assert np.mean(np.asarray(Image.open(left[0])) != np.asarray(Image.open(right[0]))) < 0.01
    assert main(["predict", "--model", str(exported), *given, str(tmp_path), "--device", "cuda"]) == 2
    assert "runs on the CPU" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The processor in numpy


@pytest.mark.parametrize("resize", ["warp", "letterbox"])
@pytest.mark.parametrize("size", [(64, 96), (96, 97), (640, 481), (33, 500), (1, 7), (2001, 40), (5000, 3), (3, 5000)])
def test_the_processor_in_numpy_equals_the_torch_one(segmenter: OnnxSegmenter, size: tuple[int, int], resize: str):
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = CMMaskSDProcessor(load_tokenizer("scenes"), (64, 96), patch_size=16, resize=resize)  # pyright: ignore
    settings = replace(segmenter.settings, size=(64, 96), resize=resize)
    own = OnnxSegmenter(settings, segmenter.tokenizer, segmenter.sessions)
    expected, placement = processor.image(image)
    found, own_placement = own.canvas(image)
    assert own_placement == placement
    np.testing.assert_array_equal(found, expected.permute(1, 2, 0).numpy())  # to the last bit
    np.testing.assert_allclose(
        own.pixel_values(found[None])[0], processor.pixel_values(expected).numpy(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("resize", ["warp", "letterbox"])
@pytest.mark.parametrize("size", [(64, 96), (96, 97), (640, 481), (33, 500), (1, 1), (1, 7), (2001, 40), (5000, 3)])
@pytest.mark.parametrize("cells", [(16, 24), (64, 96), (4, 6), (5, 9), (1, 1)])
def test_the_restore_graph_equals_the_processor(
    segmenter: OnnxSegmenter, size: tuple[int, int], resize: str, cells: tuple[int, int]
):
    placement = place(*size, canvas=(64, 96), resize=resize)  # pyright: ignore
    logits = np.random.default_rng(0).normal(size=(2, *cells)).astype(np.float32)
    processor = CMMaskSDProcessor(load_tokenizer("scenes"), (64, 96), patch_size=16)
    expected = processor.restore(torch.from_numpy(logits), placement)
    feed = {name: np.array(getattr(placement, name)) for name in ("original", "canvas", "content")}
    restored, probability = segmenter.sessions["restore"].run(None, {"logits": logits} | feed)
    np.testing.assert_allclose(restored, expected.numpy(), rtol=0, atol=2e-4)
    np.testing.assert_allclose(probability, expected.sigmoid().numpy(), rtol=0, atol=1e-4)


def test_tokens_are_the_processors(segmenter: OnnxSegmenter):
    processor = CMMaskSDProcessor.from_pretrained("scenes")
    texts = ["red circle", "it's the <|endoftext|> Ärger", "word " * 90, "红 circle"]
    expected = processor.tokens(texts)
    tokens = segmenter.tokens(texts)
    np.testing.assert_array_equal(tokens["input_ids"], expected.input_ids.numpy())
    np.testing.assert_array_equal(tokens["attention_mask"], expected.attention_mask.numpy())
    np.testing.assert_array_equal(tokens["word_mask"], expected.word_ids.numpy() >= 0)


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are not what they should be


def _without(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()


def _damaged(folder: Path) -> None:
    (folder / "image.onnx").write_bytes((folder / "image.onnx").read_bytes()[:5000])


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def _panic(folder: Path) -> None:
    """The library's regular expression of nothing finds a match behind the end of a sentence."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"]["normalizers"][1]["pattern"]["Regex"] = ""
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _no_json(folder: Path) -> None:
    (folder / "export.json").write_text("{")


def _settings(**changed: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        content = json.loads((folder / "export.json").read_text())
        (folder / "export.json").write_text(json.dumps(content | changed))

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without, "decoder.onnx cannot be read"),
        (_damaged, "image.onnx cannot be read"),
        (_no_tokenizer, "tokenizer.json cannot be read"),
        (_panic, "cannot read a sentence"),
        (_no_json, "cannot be read as JSON"),
        (_settings(version=1), "has version 1, this package reads 2: export again"),
        (_settings(version=True), "has version True"),
        (_settings(version=[1]), "has version"),
        (_settings(size=[128]), "size is"),
        (_settings(size=[128, 100]), "multiple of the patch size"),
        (_settings(size=[1_600_000, 1_600_000]), "height is 1600000"),
        (_settings(size=["128", "128"]), "height is '128'"),
        (_settings(patch_size=0), "patch_size is 0"),
        (_settings(patch_size=True), "patch_size is True"),
        (_settings(std=[0, 1, 1]), "std is"),
        (_settings(mean="abc"), "mean is 'abc'"),
        (_settings(mean=[2, 2, 2]), "mean is"),
        (_settings(mean=[10**400, 0, 0]), "mean is"),
        (_settings(max_tokens=2**70), "max_tokens is"),
        (_settings(end_token=5), "does not fit export.json"),
        (_settings(start_token=10_000), "does not fit the text encoder"),
        (_settings(pad_token=10_000), "does not fit the text encoder"),
        (_settings(stride="4"), "stride is '4'"),
        (_settings(source={"a": "x" * 10_000}), "source is"),
        (_settings(more=1), "'more' is missing or unknown"),
        (_settings(**{"\x1b[31m" * 1000: 1}), "missing or unknown"),
        (_settings(format="pt2"), "export with --format onnx"),
        (_settings(format="other"), "format is 'other'"),
    ],
)
def test_a_spoilt_export_is_one_line(copied: Path, spoil: Callable[[Path], None], message: str):
    spoil(copied)
    with pytest.raises(UserError, match=message) as error:
        OnnxSegmenter.from_pretrained(copied)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["export.json", "tokenizer.json"])
def test_fuzzed(name: str, exported: Path, copied: Path):
    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(OnnxSegmenter.from_pretrained, exported, copied, name, data)

    run()


def test_a_folder_without_an_export(tmp_path: Path):
    with pytest.raises(UserError, match=r"no export\.json"):
        ExportSettings.read(tmp_path)
    assert isinstance(load_segmenter("scenes", device="cpu"), Segmenter)


def test_onnxruntime_is_missing(exported: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'cmmasksd\[export\]'"):
        OnnxSegmenter.from_pretrained(exported)
