"""The parser and `main`: help, exit codes, and what every command of the shipped model does."""

import json
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from cli.commands import main
from cmmasksd.cli import demo, report
from cmmasksd.config import ScoreConfig
from cmmasksd.data.scenes import SceneDataset
from cmmasksd.model.modeling import CMMaskSDModel


def test_help_of_every_command_is_light():
    """In a process of its own, since this one has torch already."""
    code = """
import contextlib, io, sys
from cmmasksd.cli import main
commands = "demo,train,evaluate,compare,predict,export,explain,data,data scenes,data expressions,examples,pretrain"
commands += ",push,report,completion"
for command in ["", *commands.split(",")]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            main([*command.split(), "--help"])
        except SystemExit as end:
            assert end.code == 0, command
        else:
            raise AssertionError(command)
    assert text.getvalue().startswith("usage: cmmasksd"), command
heavy = {"torch", "transformers", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_first_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    shown = capsys.readouterr().out
    names = (
        "demo",
        "train",
        "evaluate",
        "compare",
        "predict",
        "export",
        "serve",
        "explain",
        "data",
        "push",
        "report",
    )
    assert all(f" {name} " in shown for name in names)
    assert "pretrain" not in shown  # of no use to a user


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "cmmasksd", "train", "--training.epochs", "0"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cmmasksd train: training.epochs must be at least 1, got 0\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), AssertionError("x"), RuntimeError("shapes")])
def test_a_mistake_of_ours_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr(report, "run", fail)
    with pytest.raises(type(error), match=r"x|shapes"):
        main("report", "--model", "m", "--results", "r", "--out", "o")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")
def test_a_reader_that_goes_away_is_141():
    """`cmmasksd … | head`: no complaint, from Python at its end neither."""
    code = """
import sys
from cmmasksd import cli
cli.report.run = lambda settings: [print("x" * 9999, flush=True) for _ in range(99)]
sys.exit(cli.main("report --model m --results r --out o".split()))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        late = threading.Timer(300, process.kill)  # ends each of the waits below
        late.start()
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(300) == 141
        late.cancel()


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run", interrupt)
    assert main("report", "--model", "m", "--results", "r", "--out", "o") == 130
    assert capsys.readouterr().err == "cmmasksd report: interrupted\n"


def test_the_shipped_model_in_every_command(
    micro: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`--model scenes`, offline and from a folder that knows nothing of the package, far above chance."""
    monkeypatch.setattr(demo, "ScoreConfig", partial(ScoreConfig, references=60))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    data = SceneDataset("scenes", "testB", 3, seed=5)
    Image.fromarray(data.image(data[0])).save("scene.png")
    seen = ["--model", "scenes", "--image", "scene.png", "--text", data[0].expressions[0].text]
    assert main("predict", *seen, "--out", "predicted") == 0
    assert main("explain", *seen, "--out", "explained") == 0
    assert [len(list(Path(folder).iterdir())) for folder in ("predicted", "explained")] == [2, 1]
    scored = ["--model", "scenes", "--data", "scenes", "--split", "val", "--references", "60", "--out", "val"]
    assert main("evaluate", *scored) == 0
    results = json.loads(Path("val/results.json").read_text())
    assert results["mIoU"] > 0.4
    assert main("report", "--model", "scenes", "--results", "val", "--out", "page.html") == 0
    assert main("demo", "--trained", "scenes", "--training.out", "demo") == 0
    assert json.loads(Path("demo/val/results.json").read_text())["mIoU"] == pytest.approx(results["mIoU"])
    assert "scenes testB" in capsys.readouterr().out
    assert not Path("demo/metrics.jsonl").exists()
    assert main("train", *micro, "--model.weights", "scenes", "--training.out", "tuned") == 0
    shipped, tuned = (CMMaskSDModel.from_pretrained(name) for name in ("scenes", "tuned/last"))
    assert shipped.config.decoder_width == tuned.config.decoder_width
