"""A run, a release and a folder of mistakes for the tests of the command line."""

from pathlib import Path

import pytest
from PIL import Image

from cli.commands import main


@pytest.fixture(scope="session")
def micro(tiny_clip_folder: Path) -> list[str]:
    """Settings of a run that takes seconds."""
    values = {
        "data.train_references": 12, "data.val_references": 6, "data.scene_size": 64, "data.workers": 0,
        "model.backbone": tiny_clip_folder, "model.size": "[64,64]", "model.max_tokens": 20,
        "model.decoder_width": 32, "model.decoder_layers": 1, "model.decoder_heads": 2, "model.decoder_mlp": 32,
        "model.head_width": 16, "training.batch": 6, "training.warmup_steps": 1,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="session")
def run(micro: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on scenes."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main("train", *micro, "--training.out", out) == 0
    return out


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as a REFER release."""
    out = tmp_path_factory.mktemp("release")
    assert main("data", "scenes", "--out", out, "--train", 12, "--test", 6, "--size", 64) == 0
    return out


@pytest.fixture
def place(tmp_path: Path, run: Path, release: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What mistakes are made with; also the working folder, so that nothing else is written."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("good.png")
    Path("cut.jpg").write_bytes((release / "images/train2014").glob("*.jpg").__next__().read_bytes()[:600])
    Path("text.jpg").write_text("no picture")
    Image.new("L", (9, 910)).save("narrow.png")
    Image.new("L", (9, 9)).save("two.gif", save_all=True, append_images=[Image.new("L", (9, 9), 99)])
    Path("rows.jsonl").write_text('{"image": "good.png", "text": "x"}')
    Path("bad.csv").write_text("image,expressions\ngood.png,x|\n")
    Path("blank.txt").write_text("\n \n")
    Path("latin1.yaml").write_text("training: {out: caf\xe9}\n", encoding="latin-1")
    Path("accumulate.yaml").write_text("training: {batch: 64, accumulate: 4}\n")
    Path("batch_size.yaml").write_text("training: {batch_size: 16}\n")
    Path("unknown.yaml").write_text("data: {nmae: refcoco}\n")
    Path("type.yaml").write_text("training: {epochs: many}\n")
    Path("syntax.yaml").write_text("data: {name: [\n")
    Path("full.jsonl").write_text('{"image": "good.png"}\n')
    Path("empty").mkdir()
    return {"tmp": tmp_path, "model": run / "best", "run": run, "release": release, "file": tmp_path / "text.jpg"}
