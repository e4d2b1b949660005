"""Model folders of strangers: one value of one JSON file is replaced, and loading succeeds or says why in one line.

What loads must also run: a value that passes the checks and breaks the first prediction is no better.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmmasksd.inference.predictor import Segmenter
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from fuzz import FUZZ, check


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_trained_model(name: str, tiny_model_folder: Path, tmp_path: Path):
    copied = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))

    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(lambda folder: Segmenter.from_pretrained(folder, device="cpu"), tiny_model_folder, copied, name, data)

    run()


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
)
def test_a_backbone(name: str, tiny_clip_folder: Path, tmp_path: Path):
    original = Path(shutil.copytree(tiny_clip_folder, tmp_path / "original"))
    found = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 1.0], "size": {"shortest_edge": 32}}
    (original / "preprocessor_config.json").write_text(json.dumps(found))
    if name == "vocab.json":
        model = json.loads((original / "tokenizer.json").read_text())["model"]
        (original / "tokenizer.json").unlink()
        (original / "vocab.json").write_text(json.dumps(model["vocab"]))
        (original / "merges.txt").write_text("\n".join([" ".join(merge) for merge in model["merges"]]))
    copied = Path(shutil.copytree(original, tmp_path / "clip"))

    def load(folder: Path) -> Segmenter:
        model = CMMaskSDModel.from_backbone(folder, decoder_width=16, decoder_layers=1, decoder_heads=2, head_width=16)
        patch = model.config.encoder.patch_size
        processor = CMMaskSDProcessor.from_backbone(
            folder, (4 * patch, 4 * patch), patch_size=patch, resize="letterbox", max_tokens=9
        )
        return Segmenter(model, processor, device="cpu")

    load(copied)

    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(load, original, copied, name, data)

    run()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[" * 100_000),
        ("processor_config.json", b'{"size": "\x1b[31m'),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", None),
    ],
)
def test_predict_says_it_in_one_line(name: str, content: bytes | None, tiny_model_folder: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    command = [sys.executable, "-m", "cmmasksd", "predict", "--model", "model", "--image", "image.png"]
    command += ["--text", "the red square", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert name in done.stderr or "tokenizer" in done.stderr
    assert done.stderr.strip().isprintable()
    assert not (tmp_path / "out").exists()
