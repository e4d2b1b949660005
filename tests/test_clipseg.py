"""transformers' CLIPSeg on every path as users start it: predict, evaluate, compare, report, serve, export, train."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from fastapi.testclient import TestClient
from PIL import Image

from cmmasksd import cli
from cmmasksd.inference.predictor import Segmenter, load_segmenter
from cmmasksd.model.trained import load_trained
from cmmasksd.serving.app import create_app
from cmmasksd.serving.settings import ServeSettings
from cmmasksd.training import loop

SENTENCES = ["the red square", "a blue circle on the left"]
SCENES = ["--references", "4", "--scene_size", "64"]


def main(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def options(weights: Path, out: Path) -> list[object]:
    values = {
        "data.train_references": 8, "data.val_references": 4, "data.scene_size": 64, "data.workers": 0,
        "model.weights": weights, "distillation.start": 0, "distillation.warmup": 0,
        "training.batch": 2, "training.warmup_steps": 1, "training.log_every": 1, "training.epochs": 2,
        "training.out": out,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def run(tiny_clipseg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that started from a CLIPSeg."""
    out = tmp_path_factory.mktemp("clipseg") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert main("train", *options(tiny_clipseg_folder, out)) == 0
    return out


def test_predict(tiny_clipseg_folder: Path, image: Path, tmp_path: Path):
    arguments = ["predict", "--model", tiny_clipseg_folder, "--image", image, "--out", tmp_path / "out"]
    for sentence in SENTENCES:
        arguments += ["--text", sentence]
    assert main(*arguments, "--json", tmp_path / "rows.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == SENTENCES
    segmenter = Segmenter.from_pretrained(tiny_clipseg_folder, device="cpu")
    for row, segmentation in zip(rows, segmenter.segment(image, SENTENCES), strict=True):
        assert row["score"] == pytest.approx(segmentation.score, abs=1e-4)
        assert segmentation.mask.shape == (30, 50)


def test_an_image_is_encoded_once_for_all_sentences(tiny_clipseg_folder: Path, image: Path):
    segmenter, calls = Segmenter.from_pretrained(tiny_clipseg_folder, device="cpu"), []
    segmenter.model.clip.vision_model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(None))
    together = segmenter.segment(image, SENTENCES * 4)
    assert len(calls) == 1
    (alone,) = segmenter.segment(image, SENTENCES[1])
    np.testing.assert_allclose(together[1].probability, alone.probability, atol=1e-5)


def test_evaluate_report_and_compare(tiny_clipseg_folder: Path, run: Path, tmp_path: Path):
    before, after = tmp_path / "before", tmp_path / "after"
    for model, out in ((tiny_clipseg_folder, before), (run / "best", after)):
        assert main("evaluate", "--data", "scenes", "--model", model, "--split", "val", *SCENES, "--out", out) == 0
        assert 0 <= json.loads((out / "results.json").read_text())["mIoU"] <= 1
    assert main("compare", before, after) == 0
    arguments = ["--results", before, "--out", tmp_path / "page.html"]
    assert main("report", "--model", tiny_clipseg_folder, *arguments) == 0


def test_serve(tiny_clipseg_folder: Path, image: Path):
    segmenter = Segmenter.from_pretrained(tiny_clipseg_folder, device="cpu")
    with TestClient(create_app(segmenter, "clipseg", ServeSettings()), base_url="http://127.0.0.1") as client:
        response = client.post(
            "/v1/segment",
            files={"image": image.read_bytes()},
            data={"sentences": SENTENCES, "want": ["rle", "words"]},
        )
    assert response.status_code == 200, response.text
    first = response.json()["results"][0]
    assert [word["text"] for word in first["words"]] == SENTENCES[0].split()
    assert all(word["map"] for word in first["words"])


def test_training_goes_on_from_it(tiny_clipseg_folder: Path, run: Path):
    """Both branches run, the decoder alone is trained, and the result is a CLIPSeg of transformers."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert all({"seg", "lmvsd", "vmlsd"} <= row.keys() for row in losses)
    assert max(row["lmvsd"] for row in losses) > 1e-6
    assert max(row["vmlsd"] for row in losses) > 1e-6
    network, info = transformers.CLIPSegForImageSegmentation.from_pretrained(run / "last", output_loading_info=True)
    assert not any(info.values())
    before = load_trained(tiny_clipseg_folder)[0].state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("clip."), name
    processor = load_trained(run / "best")[1]
    assert (processor.size, processor.mean) == ((40, 40), (0.485, 0.456, 0.406))


def test_a_resumed_training_ends_with_the_same_weights(
    tiny_clipseg_folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls, losses = [], loop._losses

    def until(*arguments: object) -> object:
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_losses", until)
        assert main("train", *options(tiny_clipseg_folder, tmp_path / "run")) == 130
    assert main("train", *options(tiny_clipseg_folder, tmp_path / "run"), "--resume") == 0
    expected, resumed = (load_trained(out / "last")[0].state_dict() for out in (run, tmp_path / "run"))
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("level", ["input", "blank"])
@pytest.mark.parametrize("correlation", ["patches", "values"])
def test_training_at_other_levels(level: str, correlation: str, tiny_clipseg_folder: Path, tmp_path: Path):
    chosen = {"vision_level": level, "correlation": correlation}
    settings = [f"--distillation.{key}={value}" for key, value in chosen.items()]
    assert main("train", *options(tiny_clipseg_folder, tmp_path), "--training.epochs=1", *settings) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--distillation.language_level=feature", "reads the sentence alone: use input"),
        ("--distillation.share_weights=false", "share the weights instead"),
    ],
)
def test_training_that_cannot_work(
    setting: str, message: str, tiny_clipseg_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main("train", *options(tiny_clipseg_folder, tmp_path / "run"), setting) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_explain(tiny_clipseg_folder: Path, run: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--image", image, "--text", SENTENCES[1], "--out", tmp_path / "figures"]
    assert main("explain", "--model", run / "best", *arguments) == 0
    assert len(list((tmp_path / "figures").iterdir())) == 1
    assert main("explain", "--model", tiny_clipseg_folder, *arguments) == 2
    assert "give a folder that training wrote" in capsys.readouterr().err


def test_publishing_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main("push", "--model", run / "best", "--to", tmp_path / "out") == 2
    assert "holds a 'clipseg' model" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_export(format: str, run: Path, image: Path, tmp_path: Path):
    """Every graph is compared with torch when it is written; here the predictions."""
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    assert main("export", "--model", run / "best", "--out", tmp_path / "out", "--format", format) == 0
    parity = json.loads((tmp_path / "out/export.json").read_text())["parity"]
    assert parity["logits"] < 1e-4
    if format == "onnx":
        expected = Segmenter.from_pretrained(run / "best", device="cpu").segment(image, SENTENCES)
        for a, b in zip(expected, load_segmenter(tmp_path / "out").segment(image, SENTENCES), strict=True):
            np.testing.assert_allclose(a.probability, b.probability, atol=1e-4)


def test_export_as_a_site(tiny_clipseg_folder: Path, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    from cmmasksd.export import site

    ort = tmp_path / "ort"
    ort.mkdir()
    for name in site.ORT_FILES:
        (ort / name).write_text("")
    shutil.copytree(tiny_clipseg_folder, tmp_path / "model")
    out = tmp_path / "site"
    assert main("export", "--model", tmp_path / "model", "--format", "web", "--ort", ort, "--out", out) == 0
    settings = json.loads((out / "model/export.json").read_text())
    assert (settings["size"], settings["stride"]) == ([40, 40], 1.0)
