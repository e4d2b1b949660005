"""What `cmmasksd export` writes, and what it refuses to write. Tracing takes most of a minute, so it is done twice: for
the ONNX files of the model that ships (the fixture `exported`) and for programs of torch.export; other tests put the
files that are there in the tracer's place."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cmmasksd.cli import main
from cmmasksd.errors import UserError
from cmmasksd.export import checks
from cmmasksd.export import export as exporting
from cmmasksd.export.checks import INT8_IOU, PARITY
from cmmasksd.export.export import export
from cmmasksd.inference.export_settings import GRAPHS, ExportSettings
from cmmasksd.inference.onnx import OnnxSegmenter, open_sessions
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.towers.base import Tokens
from cmmasksd.model.trained import load_trained

pytest.importorskip("onnx", reason="the extra export is not installed")
pytest.importorskip("onnxruntime", reason="the extra export is not installed")


@pytest.fixture
def traced(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is "traced" at once: its file is that of the model that ships."""

    def write(program: object, graph: object, file: Path) -> None:
        shutil.copyfile(exported / file.name, file)

    monkeypatch.setattr(exporting, "trace", lambda *_: None)
    monkeypatch.setattr(exporting, "write_onnx", write)


def test_what_is_written(exported: Path):
    assert sorted(file.name for file in exported.iterdir()) == [
        "decoder.onnx", "export.json", "image.onnx", "restore.onnx", "text.onnx", "tokenizer.json",
    ]  # fmt: skip
    settings, processor = ExportSettings.read(exported), CMMaskSDProcessor.from_pretrained("scenes")
    assert (settings.size, settings.resize, settings.max_tokens) == (processor.size, processor.resize, 48)
    assert (settings.format, settings.int8, settings.source, settings.stride) == ("onnx", False, "scenes", 4)
    assert 0 < settings.parity["logits"] <= PARITY
    assert 0 < settings.parity["restored logits"] <= PARITY
    assert not any(b".py" in (exported / f"{key}.onnx").read_bytes() for key in GRAPHS)  # no stack traces
    tokenizer = json.loads((exported / "tokenizer.json").read_text())
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
    # float16 of the saved model are float16 in the files
    from cmmasksd.assets import located

    stored = (Path(located("scenes")) / "model.safetensors").stat().st_size
    assert sum((exported / f"{key}.onnx").stat().st_size for key in GRAPHS) < 1.3 * stored


@pytest.mark.parametrize(
    ("grid", "count", "length"), [((3, 4), 4, 5), ((8, 8), 1, 48), ((11, 2), 2, 3), ((2, 2), 1, 4)]
)
@torch.no_grad()
def test_sizes_are_free(exported: Path, grid: tuple[int, int], count: int, length: int):
    """One image encoded, and decoded for several sentences of one length."""
    model, sessions = CMMaskSDModel.from_pretrained("scenes").eval(), open_sessions(exported)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 16 * grid[0], 16 * grid[1], generator=generator)
    ids = torch.randint(0, 600, (count, length), generator=generator)
    ids[:, -1] = 685
    tokens = Tokens(ids, torch.ones_like(ids), torch.zeros_like(ids), ids[:, 0] < 0)
    expected = model.decode(model.encode_image(pixels).select(torch.zeros(count).long()), model.encode_text(tokens))
    patches, own = sessions["image"].run(None, {"pixel_values": pixels.numpy()})
    words, sentence, embedded = sessions["text"].run(
        None, {"input_ids": ids.numpy(), "attention_mask": tokens.attention_mask.numpy()}
    )
    feed = {"words": words, "sentence": sentence, "embedded": embedded, "word_mask": np.ones(ids.shape, bool)}
    feed |= {"patches": np.repeat(patches, count, 0), "pixels": np.repeat(own, count, 0)}
    (logits,) = sessions["decoder"].run(None, feed)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=PARITY)


def test_programs_of_torch_export(tiny_model_folder: Path, tiny_model: CMMaskSDModel, tmp_path: Path):
    out = tmp_path / "programs"
    settings = export(tiny_model_folder, out, format="pt2")
    assert settings.source == tiny_model_folder.name  # and no path of this machine
    assert settings.parity["logits"] <= PARITY
    assert sorted(file.name for file in out.glob("*.pt2")) == ["decoder.pt2", "image.pt2", "restore.pt2", "text.pt2"]
    image = torch.export.load(out / "image.pt2").module()
    for size in ((32, 32), (24, 40)):  # the tower's own size too
        pixels = torch.randn(1, 3, *size)
        with torch.no_grad():
            patches = image(pixels)[0]
            torch.testing.assert_close(patches.flatten(1, 2), tiny_model.encode_image(pixels).patches)


def test_graphs_that_differ_are_refused(traced: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, processor = load_trained("scenes")
    with torch.no_grad():
        model.decoder.head.kernel.bias[-1] += 1e-2
    monkeypatch.setattr(exporting, "load_trained", lambda name: (model, processor))
    with pytest.raises(UserError, match=r"differ from torch's by 0\.0"):
        export("scenes", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_int8(traced: None, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = export("scenes", tmp_path / "out", int8=True)
    assert settings.int8
    assert INT8_IOU <= settings.parity["int8 mean IoU"] < 1
    assert ExportSettings.read(tmp_path / "out") == settings
    assert (tmp_path / "out/text.onnx").stat().st_size < 0.8 * (exported / "text.onnx").stat().st_size
    assert OnnxSegmenter.from_pretrained(tmp_path / "out").segment(np.zeros((9, 9, 3), np.uint8), "red circle")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(exporting, "INT8_IOU", 1.0)
    monkeypatch.setattr(checks, "_SCENES", 6)
    with pytest.raises(UserError, match=r"below 1\.0: nothing was written"):
        export("scenes", tmp_path / "again", int8=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_already(traced: None, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match="is not an export"):
            export("scenes", tmp_path / name)
    (tmp_path / "empty").mkdir()
    export("scenes", tmp_path / "empty")
    (tmp_path / "empty/image.pt2").write_text("of an export in the other format")
    (tmp_path / "empty/README.md").write_text("a note of the user's")
    (tmp_path / "empty/image.onnx").write_text("damaged")
    export("scenes", tmp_path / "empty")
    assert sorted(file.name for file in (tmp_path / "empty").iterdir()) == [
        "README.md", "decoder.onnx", "export.json", "image.onnx", "restore.onnx", "text.onnx", "tokenizer.json",
    ]  # fmt: skip
    open_sessions(tmp_path / "empty")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "file", "mine"]


def _no_onnx(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "onnx", None)


@pytest.mark.parametrize(
    ("options", "message", "prepare"),
    [
        ("--format pt2 --int8", "--int8 quantises ONNX graphs: use --format onnx", None),
        ("--format onnx --ort x", "--ort goes with --format web", None),
        ("--format coreml", "onnx", None),
        ("", "export needs onnx: pip install 'cmmasksd[export]'", _no_onnx),
        ("--model absent/one/two", "no model folder absent/one/two", None),
    ],
)
def test_mistakes_are_one_line(
    options: str,
    message: str,
    prepare: Callable[[pytest.MonkeyPatch], None] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    if prepare:
        prepare(monkeypatch)
    assert main(["export", "--model", "scenes", "--out", str(tmp_path / "out"), *options.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
