"""The command line as scripts use it: what it leaves on disk, its exit codes, and one clear line for every mistake."""

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cmmasksd import cli
from cmmasksd.cli import demo, report
from cmmasksd.config import DATASETS, ScoreConfig
from cmmasksd.data.masks import decode_segmentation, mask_to_polygons
from cmmasksd.data.readers.refer import ReferDataset
from cmmasksd.data.scenes import SceneDataset
from cmmasksd.errors import UserError
from cmmasksd.inference import predict
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.model.modeling import CMMaskSDModel

METRICS = ["oIoU", "mIoU", "P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9"]
SCENES = ["--references", "6", "--scene_size", "64"]


def main(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def micro(tiny_clip_folder: Path) -> list[str]:
    """Settings of a run that takes seconds."""
    values = {
        "data.train_references": 12, "data.val_references": 6, "data.scene_size": 64, "data.workers": 0,
        "model.backbone": tiny_clip_folder, "model.size": "[64,64]", "model.max_tokens": 20,
        "model.decoder_width": 32, "model.decoder_layers": 1, "model.decoder_heads": 2, "model.decoder_mlp": 32,
        "model.head_width": 16, "training.batch": 6, "training.warmup_steps": 1,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def run(micro: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on scenes."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main("train", *micro, "--training.out", out) == 0
    return out


@pytest.fixture(scope="module")
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
    Path("accumulate.yaml").write_text("training: {batch: 64, accumulate: 4}\n")
    Path("batch_size.yaml").write_text("training: {batch_size: 16}\n")
    Path("unknown.yaml").write_text("data: {nmae: refcoco}\n")
    Path("type.yaml").write_text("training: {epochs: many}\n")
    Path("syntax.yaml").write_text("data: {name: [\n")
    Path("full.jsonl").write_text('{"image": "good.png"}\n')
    Path("empty").mkdir()
    return {"tmp": tmp_path, "model": run / "best", "run": run, "release": release, "file": tmp_path / "text.jpg"}


# ---------------------------------------------------------------------------------------------------------------------
# Help


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


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("predict", "evaluate", "--threshold" if shell != "tcsh" else "threshold"))
    (tmp_path / "script").write_text(script)
    if shutil.which(shell) is None or shell == "tcsh":
        return
    subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)
    if shell == "bash":
        ask = f"""source {tmp_path / "script"}
for line in 'pre' 'predict --t' 'compare --unit i'; do
    COMP_WORDS=(cmmasksd $line); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
    _shtab_cmmasksd; echo ${{COMPREPLY[@]}}
done"""
        told = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, timeout=60).stdout
        assert told.splitlines() == ["predict", "--text --texts --threshold", "image"]


def test_completion_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main("completion", "bash") == 2
    assert "pip install 'cmmasksd[completion]'" in capsys.readouterr().err


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "cmmasksd", "train", "--training.epochs", "0"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cmmasksd train: training.epochs must be at least 1, got 0\n"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

EVALUATE = "evaluate --model {model} --out out"
PREDICT = "predict --model {model} --out out"
MISTAKES = [
    ("", "command"),
    ("bogus", "'bogus' (choose from 'demo', 'train'"),
    ("data", "data.kind"),
    ("data bogus", "'bogus'"),
    ("train --data.nmae refcoco", "unrecognized arguments: --data.nmae"),
    ("train --config unknown.yaml", "'data.nmae'"),
    ("train --config type.yaml", "--training.epochs: Expected a int. Got value: many"),
    ("train --config syntax.yaml", "line 2"),
    (
        "train --config absent.yaml",
        "no file absent.yaml and no such configuration: choose from refcoco+-vit-b16, refcoco",
    ),
    ("train --config configs/scenes-tiny.yaml", "no such configuration: choose from "),
    ("demo --config refcoco", "scenes-tiny"),
    ("train --data photos", "--data stands for a group of settings: name one of them, --data.name (see"),
    ("train --model x", "--model.backbone or --model.weights (see"),
    ("train --training x", "--training.KEY (see"),
    ("train --data.name photos", "--data.name: Expected one of 'scenes', 'scenes+', 'scenesg', "),
    ("demo --data.name photos", "--data.name: Expected one of 'scenes', "),
    ("train --config empty", "empty"),
    ("train --data.workers abc", "--data.workers: Expected a int. Got value: abc"),
    ("train --training.lr .inf", "training.lr must be above 0, got inf"),
    (
        "train --training.accumulate 2",
        "--training.accumulate 2; it follows from training.batch, the references per update",
    ),
    ("train --config accumulate.yaml", "it follows from training.batch, the references per update over all processes"),
    ("train --config batch_size.yaml", "training.batch_size 16 only limits the references per step and process"),
    (
        "train --training.batch 64 --training.batch_size 24",
        "64 cannot be divided into steps of 24 references on 1 process: use 48 or 72",
    ),
    ("train --model.resize squash", "--model.resize: Expected one of 'warp', 'letterbox'. Got value: squash"),
    ("train --model.size 128", "--model.size"),
    ("train --training.lr nan", "--training.lr"),
    ("train --distillation.vision_ratio 3", "distillation.vision_ratio must be between 0 and 1 (exclusive), got 3.0"),
    ("train --model.backbone absent", "model folder absent"),
    ("train --training.out {run}", "--resume"),
    ("train --training.out new --resume", "no run to resume"),
    ("demo --data.name refcoco", "cmmasksd train"),
    ("evaluate", "required: --data, --split, --model, --out"),
    (EVALUATE + " --data refcoco9 --split val", "--data: Expected one of " + str(DATASETS)[1:-1]),
    (EVALUATE + " --data scenes --split tset", "train, val, testA, testB"),
    (EVALUATE + " --data scenes --split val --root {release}", "leave out --root"),
    (EVALUATE + " --data scenes --split val --references 0", "references must be between 1 and 10000000, got 0"),
    (
        EVALUATE + " --data scenes --split val --references 99999999999",
        "references must be between 1 and 10000000, got 99999999999",
    ),
    (EVALUATE + " --data scenes --split val --scene_size 7", "scene_size must be between 64 and 4096, got 7"),
    (EVALUATE + " --data scenes --split val --scene_size 99999", "scene_size must be between 64 and 4096, got 99999"),
    (EVALUATE + " --data scenes --split val --threshold .nan", "threshold is nan"),
    (EVALUATE + " --data scenes --split val --threshold x", "--threshold"),
    (EVALUATE + " --data scenes --split val --workers 9999", "workers must be between 0 and 256, got 9999"),
    (EVALUATE + " --data scenes --split val --threshold 1.5", "between 0 and 1"),
    (EVALUATE + " --data scenes --split val --workers -1", "workers must be between 0 and 256, got -1"),
    (EVALUATE + " --data refcoco --split val", "--root"),
    (EVALUATE + " --data refcoco --split val --root absent", "absent"),
    (EVALUATE + " --data refcoco --split tset --root {release}", "val"),
    (EVALUATE + " --data manifest --split val", "which .jsonl or .csv file"),
    (EVALUATE + " --data manifest --split val --root absent.jsonl", "absent.jsonl does not exist"),
    (EVALUATE + " --data manifest --split testA --root empty", "choose one of train, val, test, all"),
    (EVALUATE + " --data refcoco+ --split val --root {release}", "refcoco+"),
    ("evaluate --model absent --out out --data scenes --split val", "model folder absent"),
    ("evaluate --model empty --out out --data scenes --split val", "empty"),
    ("evaluate --model {model} --out {file}/out --data scenes --split val", "Not a directory"),
    ("compare absent absent", "absent"),
    ("compare empty empty", "cmmasksd evaluate"),
    ("compare absent absent --metrics IoU", "--metrics"),
    ("compare absent absent --resamples 5", "--resamples must be between 100 and 10000000, got 5"),
    ("compare absent absent --seed -1", "--seed must be between 0 and 9223372036854775807, got -1"),
    ("predict --model {model} --image good.png", "no sentence given: say what to look for with --text"),
    (PREDICT + " --image absent.png --text x", "absent.png does not exist"),
    (PREDICT + " --image text.jpg --text x", "not an image"),
    (PREDICT + " --image cut.jpg --text x", "damaged"),
    (PREDICT + " --image narrow.png --text x", "narrow.png of 9x910 has sides of a ratio above 100: crop it first"),
    (PREDICT + " --image empty --text x", "empty holds no image (.jpg,"),
    (PREDICT + " --image rows.jsonl --text x", "leave out --text"),
    (PREDICT + " --image bad.csv", "bad.csv, line 2: a sentence is empty"),
    (PREDICT + " --image absent.jsonl", "absent.jsonl does not exist"),
    (PREDICT + " --image good.png --texts absent.txt", "absent.txt does not exist"),
    (PREDICT + " --image good.png --texts blank.txt", "blank.txt has no sentence"),
    (PREDICT + " --image good.png --texts good.png", "good.png is not UTF-8 text"),
    (PREDICT + " --image good.png --text \udcff", "is not UTF-8 text"),
    (PREDICT + " --image cut.jpg --text x --json out.jsonl", "damaged"),
    ("predict --model {model} --image good.png --text x --out - --json -", "both write to standard output"),
    ("predict --model {model} --image good.png --text x --text y --out -", "give one of each, or use --json -"),
    ("predict --model {model} --image two.gif --text x --out -", "two.gif has several frames"),
    (PREDICT + " --image good.png --text x --json full.jsonl", "full.jsonl already holds rows"),
    (PREDICT + " --image good.png --text x --json full.jsonl --resume", "without full.jsonl.resume beside it"),
    (PREDICT + " --image good.png --text x --json empty", "empty is not a file"),
    (PREDICT + " --image good.png --text x --resume", "name it with --json"),
    (
        "predict --model {model} --image . --text x",
        "--out . is the folder of images, and would mix masks with them: use",
    ),
    ("predict --model {model} --image {tmp} --text x --out ./empty/.. --json new.jsonl", "use --out out"),
    (PREDICT + " --image good.png --text x --json - --resume", "name it with --json"),
    (PREDICT + " --image good.png --text=", "--text is empty"),
    (PREDICT + " --image good.png --text x --text=", "--text is empty"),
    (PREDICT + " --image good.png --text x --threshold 0", "between 0 and 1"),
    (PREDICT + " --image good.png --text x --threshold .nan", "between 0 and 1"),
    (PREDICT + " --image good.png --text x --threshold nan", "--threshold"),
    (PREDICT + " --image good.png --text x --device toaster", "device 'toaster'"),
    (PREDICT + " --image good.png --text x --device gpu", "device 'gpu' does not exist: use one of cpu"),
    (PREDICT + " --image good.png --text x --device meta", "device 'meta' does not exist: use one of cpu"),
    (PREDICT + " --image https://example.org/a.jpg --text x", "URLs are not fetched"),
    (PREDICT + " --image data:image/png;base64," + 999 * "A" + " --text x", "URLs are not fetched"),
    (PREDICT + " --image " + 999 * "A" + " --text x", "AAA"),
    (PREDICT + " --image good.png --text \x1c", "--text is empty"),
    (PREDICT + " --image good.png --text \u200b", "--text is empty"),
    ("predict --model absent --image good.png --text x --out out", "model folder absent"),
    ("predict --model {model} --image good.png --text x --out {file}/out", "Not a directory"),
    ("explain --model {model} --image good.png --text=", "--text is empty"),
    ("explain --model {model} --image absent.png --text x", "absent.png does not exist"),
    ("explain --model {model} --image https://example.org/a.jpg --text x", "URLs are not fetched"),
    (
        "explain --model {model} --image good.png --text x --seed -1",
        "--seed must be between 0 and 9223372036854775807, got -1",
    ),
    ("explain --model absent --image good.png --text x", "model folder absent"),
    ("data scenes --out out --name refcoco", "--name: Expected one of 'scenes', 'scenes+', 'scenesg'"),
    ("data scenes --out out --train 0", "--train must be between 1 and 10000000, got 0"),
    ("data scenes --out out --size 10", "--size must be between 64 and 4096, got 10"),
    ("data scenes --out {release} --train 3 --test 3 --size 64", "already exists"),
    ("data scenes --out {file}/out --train 3 --test 3 --size 64", "Not a directory"),
    ("push --model absent --to ./pushed", "model folder absent"),
    ("push --model empty --to ./pushed", "empty lacks config.json"),
    ("push --model tiny --to ./pushed", "tiny-clip lacks processor_config.json"),
    ("push --model {model} --to empty/name", "./empty/name"),
    ("push --model {model} --to ./pushed --results {run}", "cmmasksd evaluate"),
    ("push --model {model} --to ./pushed --card absent.md", "absent.md"),
    ("report --model {model} --results empty --out page.html", "cmmasksd evaluate"),
]


@pytest.mark.parametrize(("typed", "said"), MISTAKES, ids=[typed or "nothing" for typed, _ in MISTAKES])
def test_a_mistake_is_one_line(typed: str, said: str, place: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in [*place["tmp"].rglob("*"), *place["run"].rglob("*")]}
    assert cli.main([part.format(**place) for part in typed.split(" ") if part]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"cmmasksd {typed.split()[0]}: " if typed not in ("", "bogus") else "cmmasksd: ")
    assert said in err
    assert len(err) < 1200
    after = {path: path.stat().st_mtime_ns for path in [*place["tmp"].rglob("*"), *place["run"].rglob("*")]}
    assert after == before  # nothing lost, nothing left behind


def test_an_unknown_data_set_is_said_before_torch_is_imported():
    """In a process of its own, since this one has torch already; and without a second of waiting."""
    code = """
import sys
from cmmasksd.cli import main
commands = ["train --data photos", "train --data.name photos", "demo --data.name photos", "demo --data.name refcoco"]
commands += ["evaluate --model scenes --data photos --split val --out out", "data scenes --name photos --out out"]
for command in commands:
    assert main(command.split()) == 2, command
    heavy = {"torch", "transformers", "accelerate"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 6


def test_a_run_that_cannot_be_written(place: dict[str, Path], micro: list[str], capsys: pytest.CaptureFixture[str]):
    assert main("train", *micro, "--training.out", place["file"] / "run") == 2
    err = capsys.readouterr().err
    assert "text.jpg" in err
    assert "Not a directory" in err
    assert err.count("\n") == 1


def test_a_folder_for_results_is_made_before_the_scoring(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Hours of scoring must not end in a folder that cannot be made."""

    def never(*given: object, **named: object) -> None:
        raise AssertionError("scored before the folder was made")

    import cmmasksd.evaluation.score as scoring

    monkeypatch.setattr(scoring, "evaluate", never)
    (tmp_path / "taken").write_text("a file")
    given = ["--model", run / "best", "--data", "scenes", "--split", "val", "--out", tmp_path / "taken", *SCENES]
    assert main("evaluate", *given) == 2
    assert "File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/x"),
        PermissionError(errno.EACCES, "Permission denied", "runs/x"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "runs/x"),
        OSError("a library's own\nwords"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        UserError("say\nso"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_system_refuses_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr(report, "run", fail)
    assert main("report", "--model", "m", "--results", "r", "--out", "o") == 2
    err = capsys.readouterr().err
    assert err.startswith("cmmasksd report: ")
    assert err.count("\n") == 1
    if getattr(error, "filename", None):
        assert f"runs/x: {error.strerror}" in err  # pyright: ignore


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


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are a matter of POSIX")
def test_a_full_disk(micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Files may not grow beyond a hundred kilobytes: the model's weights do not fit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = main("train", *micro, "--training.out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("cmmasksd train: a file could not be written")
    assert not (tmp_path / "run" / "best").exists()  # no half of a model


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_stops_a_training_in_one_line(
    workers: int, release: Path, micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also where another process finds it, whose traceback torch would send along."""
    broken = shutil.copytree(release, tmp_path / "data")
    for image in (broken / "images/train2014").iterdir():
        image.write_bytes(image.read_bytes()[:300])
    given = ["--data.name=refcoco", f"--data.root={broken}", f"--training.out={tmp_path / 'run'}"]
    assert main("train", *micro, *given, f"--data.workers={workers}") == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"cmmasksd train: image {broken}")
    assert "does not decode" in err


# ---------------------------------------------------------------------------------------------------------------------
# Work


def test_print_config(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """What is printed can be given back as --config."""
    with pytest.raises(SystemExit, match="0"):
        main("train", "--training.epochs", 3, "--print_config")
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["training"]["epochs"] == 3
    (tmp_path / "again.yaml").write_text(shown)
    with pytest.raises(SystemExit, match="0"):
        main("train", "--config", tmp_path / "again.yaml", "--print_config")
    assert capsys.readouterr().out == shown


def test_train_leaves_a_run(run: Path):
    text = (run / "config.yaml").read_text()
    for folder in ("best", "last"):
        assert (run / folder / "config.yaml").read_text() == text
        assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= set(
            os.listdir(run / folder)
        )
    rows = lines(run / "metrics.jsonl")
    assert any("loss" in row for row in rows)
    assert any("oIoU" in row and "mIoU" in row for row in rows)


def test_the_saved_config_is_the_config_of_the_run(
    run: Path, micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shown = []
    for given in (
        ["--config", run / "best" / "config.yaml"],
        [*micro, "--model.resize", "warp", "--training.out", run],
    ):
        with pytest.raises(SystemExit, match="0"):
            main("train", *given, "--print_config")
        shown.append(yaml.safe_load(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert not shown[0]["training"].pop("resume")
    assert not shown[0]["training"].pop("allow_change")
    assert shown[0] == yaml.safe_load((run / "config.yaml").read_text())


def test_resume_of_a_finished_run_changes_nothing(
    run: Path, micro: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = shutil.copytree(run, tmp_path / "run")
    assert main("train", *micro, "--training.out", copy, "--resume") == 0
    assert "oIoU" in capsys.readouterr().out
    assert (copy / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert (copy / "last/model.safetensors").read_bytes() == (run / "last/model.safetensors").read_bytes()


def test_evaluate_and_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "a" / "b"
    given = ["--model", run / "best", "--data", "scenes", "--split", "testA", "--out", out, *SCENES]
    assert main("evaluate", *given) == 0
    header = capsys.readouterr().out.splitlines()[0].split()
    assert header.index("mIoU") == header.index("oIoU") + 1

    results, rows = json.loads((out / "results.json").read_text()), lines(out / "expressions.jsonl")
    data = SceneDataset("scenes", "testA", 6, seed=0, scene_size=64)
    said = {e.sent_id: (r.ref_id, r.image_id, e.text) for r in (data[i] for i in range(6)) for e in r.expressions}
    assert {row["sent_id"]: (row["ref_id"], row["image_id"], row["sentence"]) for row in rows} == said
    assert results["split"] == "testA"
    assert results["expressions"] == len(rows) == len(said)
    assert results["protocol"]["threshold"] == 0.5
    intersections, unions = ([row[key] for row in rows] for key in ("intersection", "union"))
    assert results["oIoU"] == pytest.approx(sum(intersections) / sum(unions))
    assert results["mIoU"] == pytest.approx(np.mean([row["IoU"] for row in rows]))
    assert all(0 <= results[name] <= 1 for name in METRICS)

    page = tmp_path / "page.html"
    given = ["--model", run / "best", "--results", out, "--metrics", run / "metrics.jsonl", "--out", page]
    assert main("report", *given) == 0
    assert all(name in page.read_text() for name in ("<html", "oIoU", "mIoU", "testA"))

    before = page.read_text()
    assert main("report", "--model", "scenes", "--results", out, "--out", page) == 2
    assert "holds the scores of another model" in capsys.readouterr().err
    assert page.read_text() == before


def test_compare(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, threshold in (("a", 0.5), ("b", 0.5), ("strict", 0.9)):
        given = ["--data", "scenes", "--split", "val", "--out", tmp_path / name, "--threshold", threshold, *SCENES]
        assert main("evaluate", "--model", run / ("best" if name == "a" else "last"), *given) == 0
    capsys.readouterr()
    given = ["--resamples", "200", "--metrics", "oIoU", "P@0.5", "--out", tmp_path / "difference.json"]
    assert main("compare", tmp_path / "a", tmp_path / "b" / "expressions.jsonl", *given) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:5] == ["slice", "expressions", "metric", "A", "B"]
    assert table[-1] == "paired bootstrap over images, 200 resamples"
    rows = json.loads((tmp_path / "difference.json").read_text())
    assert [row["metric"] for row in rows[:2]] == ["oIoU", "P@0.5"]
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    assert (rows[0]["a"], rows[0]["b"]) == pytest.approx([result["oIoU"] for result in results])
    assert rows[0]["low"] <= rows[0]["difference"] <= rows[0]["high"]

    assert main("compare", tmp_path / "a", tmp_path / "strict") == 2
    assert "different protocols" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["data", "log"])
def test_report_of_foreign_files(key: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = {"split": "val", **dict.fromkeys(METRICS, 0.5), "expressions": 1, "protocol": {"threshold": 0.5}}
    results |= {} if key == "data" else {"data": "scenes"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "expressions.jsonl").write_text("")
    (tmp_path / "log.jsonl").write_text("not JSON\n")
    given = ["--model", run / "best", "--results", tmp_path, "--metrics", tmp_path / "log.jsonl"]
    assert main("report", *given, "--out", tmp_path / "page.html") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_predict(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8)).save(tmp_path / "a b.png")
    texts = ["the red circle", "true", "a: [star] / Stern", "红色的圆", "true"]
    given = [part for text in texts for part in ("--text", text)]
    out = tmp_path / "out" / "masks"
    assert main("predict", "--model", run / "best", "--image", tmp_path / "a b.png", *given, "--out", out) == 0
    shown = capsys.readouterr().out.splitlines()
    masks, overlays = sorted(out.glob("*_mask.png")), sorted(out.glob("*_overlay.png"))
    assert len(masks) == len(overlays) == len(shown) == len(list(out.iterdir())) / 2 == len(texts)
    for text, line, mask, overlay in zip(texts, shown, masks, overlays, strict=True):
        assert repr(text) in line
        with Image.open(mask) as pixels:
            assert (pixels.mode, pixels.size) == ("L", (90, 37))
            assert set(np.unique(pixels)) <= {0, 255}
        with Image.open(overlay) as pixels:
            assert (pixels.mode, pixels.size) == ("RGB", (90, 37))


def photo(file: Path, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    frames = [Image.fromarray(np.roll(pixels, nth)) for nth in range(3 if file.suffix == ".gif" else 1)]
    frames[0].save(file, **({"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}))


def test_predict_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A damaged file among many costs itself only; names do not collide; frames of an animation are images."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for nth, name in enumerate(("a.png", "A.jpg", "b.gif")):
        photo(folder / name, nth)
    (folder / "aa.jpg").write_bytes((folder / "A.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("not an image")
    (tmp_path / "texts.txt").write_text("red circle\n\nstar\n")
    given = ["--image", folder, "--text", "the left one", "--texts", tmp_path / "texts.txt", "--threshold", 0.1]
    assert main("predict", "--model", run / "best", *given, "--out", out, "--json", out / "rows.jsonl") == 2
    shown, said = capsys.readouterr()
    assert said.startswith("cmmasksd predict: 1 of 4 images could not be read, the others are done: image ")
    assert "aa.jpg does not decode" in said
    rows = lines(out / "rows.jsonl")
    texts = ["the left one", "red circle", "star"]
    wanted = [("A.jpg", None), ("a.png", None), ("b.gif", 1), ("b.gif", 2), ("b.gif", 3)]
    assert [(Path(row["image"]).name, row.get("frame"), row["text"]) for row in rows] == [
        (*one, text) for one in wanted for text in texts
    ]
    assert len(shown.splitlines()) == len(rows) == 15
    pictures = {file.name for file in out.glob("*.png")}
    assert len({name.casefold() for name in pictures}) == 30
    stems = ("A", "a_2", "b_f0001", "b_f0002", "b_f0003")
    for nth, row in enumerate(rows):
        with Image.open(out / f"{stems[nth // 3]}_{nth % 3 + 1}_{row['text'].replace(' ', '-')}_mask.png") as image:
            mask = np.asarray(image) > 0
        np.testing.assert_array_equal(decode_segmentation(row["rle"], *row["size"]), mask)
        assert row["area"] == mask.sum()
        assert (row["box"] is None) == (not mask.any())
        assert 0 <= row["score"] <= 1


def test_a_name_that_is_not_utf_8(tiny_model_folder: Path, tmp_path: Path):
    """Shown escaped, in a process of its own: here pytest has the standard output."""
    folder = tmp_path / "in"
    folder.mkdir()
    photo(tmp_path / "a.png")
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / "a.png").rename(folder / name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    command = [sys.executable, "-m", "cmmasksd", "predict", "--model", tiny_model_folder]
    out, rows_file = tmp_path / os.fsdecode(b"\xe9"), tmp_path / os.fsdecode(b"\xe9.jsonl")
    for image, target in ((folder, rows_file), (folder / name, "-")):
        given = ["--image", image, "--text", "left one", "--out", out, "--json", target]
        done = subprocess.run([*command, *given], capture_output=True, timeout=600, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        done.stdout.decode("utf-8")
        text = done.stdout if target == "-" else rows_file.read_bytes()
        assert Path(json.loads(text)["image"]) == folder / name
        assert {file.name for file in out.iterdir()} == {f"caf-_1_left-one_{kind}.png" for kind in ("mask", "overlay")}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_predict_a_manifest(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png", 1)
    rows = [("a.png", "left|right", "k1"), ("a.png", "star", "k2"), ("absent.png", "x", "k3"), ("b.png", "y", "k4")]
    if kind == "csv":
        text = "image,expressions,id\n" + "".join(",".join(row) + "\n" for row in rows)
    else:
        keys = ("image", "expressions", "id")
        text = "".join(json.dumps(dict(zip(keys, (i, t.split("|"), k), strict=True))) + "\n" for i, t, k in rows)
    (tmp_path / f"m.{kind}").write_text(text)
    encoded, encode = [], Segmenter.encode
    monkeypatch.setattr(Segmenter, "encode", lambda *given: encoded.append(1) or encode(*given))
    monkeypatch.chdir(tmp_path)
    assert main("predict", "--model", run / "best", "--image", f"m.{kind}", "--json", "-") == 2
    shown, said = capsys.readouterr()
    found = [json.loads(line) for line in shown.splitlines()]
    assert [(row["id"], row["text"]) for row in found] == [
        ("k1", "left"), ("k1", "right"), ("k2", "star"), ("k4", "y")
    ]  # fmt: skip
    assert {row["image"] for row in found} == {"a.png", "b.png"}
    assert "line 3" not in said
    assert "absent.png does not exist" in said
    assert len(encoded) == 2  # the two rows about a.png share it
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "b.png", f"m.{kind}"}  # --json alone: no pictures


def test_images_that_cannot_be_read_are_counted_and_named_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "a.png")
    Path("m.csv").write_text("image,expressions\n" + "absent.png,x\na.png,x\n" * 12)
    assert main("predict", "--model", run / "best", "--image", "m.csv", "--json", "rows.jsonl") == 2
    said = capsys.readouterr().err
    assert "1 of 2 images could not be read" in said
    assert said.count("absent.png") == 1
    assert len(lines(Path("rows.jsonl"))) == 12
    names = [f"{'long' * 40}/{nth}.png" for nth in range(12)]
    Path("m.csv").write_text("image,expressions\n" + "".join(f"{name},x\n" for name in names))
    assert main("predict", "--model", run / "best", "--image", "m.csv", "--json", "new.jsonl") == 2
    said = capsys.readouterr().err
    assert "12 of 12 images" in said
    assert "/2.png" in said
    assert "and 9 more" in said
    assert len(said) < 400


def test_predict_from_standard_input_to_standard_output(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
):
    photo(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    given = ["predict", "--model", run / "best", "--text", "the red circle", "--threshold", "0.1"]
    assert main(*given, "--image", "a.png", "--out", "out") == 0
    capsysbinary.readouterr()
    content = Path("a.png").read_bytes()
    with Image.open("out/a_1_the-red-circle_mask.png") as image:
        wanted = np.asarray(image)
    for target in ("--out", "--json"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(*given, "--image", "-", target, "-") == 0
        shown, said = capsysbinary.readouterr()
        assert said == b""
        if target == "--out":
            with Image.open(io.BytesIO(shown)) as image:
                np.testing.assert_array_equal(np.asarray(image), wanted)
        else:
            (row,) = (json.loads(line) for line in shown.splitlines())
            assert row["image"] == "-"
            np.testing.assert_array_equal(decode_segmentation(row["rle"], *row["size"]), wanted > 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "out"]


def test_a_video_frame_by_frame(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    av = pytest.importorskip("av", reason="the extra data is not installed")
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=5)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in (av.VideoFrame(64, 48, "yuv420p"), av.VideoFrame(64, 48, "yuv420p"), None):
            for packet in stream.encode(frame):
                video.mux(packet)
    given = ["predict", "--model", run / "best", "--text", "the red circle"]
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    assert main(*given, "--image", tmp_path / "clip.mp4", "--json", rows, "--out", out) == 0
    assert [row["frame"] for row in lines(rows)] == [1, 2]
    assert all(row["size"] == [48, 64] for row in lines(rows))
    assert sorted(file.name for file in out.iterdir()) == [
        f"clip_f000{nth}_1_the-red-circle_{kind}.png" for nth in (1, 2) for kind in ("mask", "overlay")
    ]
    capsys.readouterr()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert main(*given, "--image", tmp_path / "bad.mp4") == 2
    assert "does not decode after frame 0" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from PIL import Image
from cmmasksd import cli
from cmmasksd.inference import rows

def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)

where, nth = sys.argv[1], int(sys.argv[2])
class Dying:  # a file that dies with the process at its nth write, when half of it is on the disk
    def __init__(self, file):
        self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *given): self.file.close()
    def write(self, content):
        global nth
        nth -= 1
        if nth == 0:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            die()
        self.file.write(content)
path_open = rows.Path.open
def opened(path, mode="r", *given, **named):
    file = path_open(path, mode, *given, **named)
    return Dying(file) if mode in ("ab", "a+b") and path.name == where else file
if where == "picture":
    save = Image.Image.save
    def saved(*given, **named):
        global nth
        nth -= 1
        if nth == 0:
            given[1].write_bytes(b"half")
            die()
        save(*given, **named)
    Image.Image.save = saved
else:
    rows.Path.open = opened
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_a_killed_prediction_resumes_without_a_row_lost_or_doubled(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Real SIGKILLs: in half a picture, in half a row, in half a line of the state. One image cannot be read."""
    monkeypatch.chdir(tmp_path)
    for nth, name in enumerate(("a.png", "b.gif", "c.png", "d.png")):
        photo(tmp_path / name, nth)
    names = ["a.png", "b.gif", "a.png", "absent.png", "c.png", "c.png", "d.png"]  # one twice, one in neighbouring rows
    rows = [{"image": name, "expressions": ["left one", "red circle"][: 1 + nth % 2]} for nth, name in enumerate(names)]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["predict", "--model", tiny_model_folder, "--image", "m.jsonl", "--device", "cpu"]
    assert main(*given, "--json", "whole.jsonl", "--out", "whole") == 2
    said = capsys.readouterr().err
    assert "1 of 5 images could not be read" in said

    command = [*map(str, given), "--json", "rows.jsonl", "--out", "out", "--resume"]
    sizes = []
    for where, nth in (("picture", 3), ("rows.jsonl", 2), ("rows.jsonl.resume", 2), ("rows.jsonl", 3)):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, where, str(nth), *command], capture_output=True, text=True, timeout=600
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        sizes.append(Path("rows.jsonl").stat().st_size)
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] < sizes[-1] < Path("whole.jsonl").stat().st_size
    for _ in range(2):  # the second time nothing is left to do, but for the image that fails again
        assert main(*command) == 2
        assert capsys.readouterr().err == said
        assert Path("rows.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
        for file in Path("whole").iterdir():
            assert Path("out", file.name).read_bytes() == file.read_bytes()
        assert len(os.listdir("out")) == len(os.listdir("whole"))

    photo(tmp_path / "absent.png")
    assert main(*command) == 0
    assert len(lines(Path("rows.jsonl"))) == len(lines(Path("whole.jsonl"))) + 2
    capsys.readouterr()
    before = Path("rows.jsonl").read_bytes()
    for changed, name in (
        (["--threshold", "0.6"], "--threshold"),
        (["--out", "elsewhere"], "--out"),
        (["--model", "scenes"], "model"),
    ):
        assert main(*command, *changed) == 2
        assert f"rows.jsonl was begun with another {name}: " in capsys.readouterr().err
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert main(*command) == 2
    assert "another list of images and sentences" in capsys.readouterr().err
    assert main(*command[:-1]) == 2
    assert "rows.jsonl already holds rows: resume its run with --resume" in capsys.readouterr().err
    assert Path("rows.jsonl").read_bytes() == before


def test_an_interrupt_keeps_what_was_predicted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in "abc":
        photo(tmp_path / f"{name}.png")
    read = predict.read_frames

    def frames(source: Path):
        if source.name == "c.png":
            raise KeyboardInterrupt
        return read(source)

    monkeypatch.setattr(predict, "read_frames", frames)
    given = ["--image", tmp_path, "--text", "x", "--json", tmp_path / "rows.jsonl"]
    assert main("predict", "--model", run / "best", *given) == 130
    assert [Path(row["image"]).name for row in lines(tmp_path / "rows.jsonl")] == ["a.png", "b.png"]


def test_explain(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    given = ["--model", run / "best", "--image", tmp_path / "a.png", "--out", tmp_path / "out"]
    assert main("explain", *given, "--text", "the red circle", "--text", "left star") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    names = {"a_1_the-red-circle_explained.png", "a_2_left-star_explained.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_scenes_as_a_release(release: Path):
    """Every sentence is kept, and every mask but for the polygons' rounding."""
    for split, count in {"train": 12, "val": 6, "testA": 6, "testB": 6}.items():
        read, made = (
            ReferDataset("refcoco", release, split),
            SceneDataset("scenes", split, count, seed=0, scene_size=64),
        )
        assert len(read) == len(made) == count
        for index in range(count):
            a, b = read[index], made[index]
            assert [e.text for e in a.expressions] == [e.text for e in b.expressions]
            one, other = read.mask(a), made.mask(b)
            assert (one & other).sum() / (one | other).sum() >= 0.98
            assert np.abs(read.image(a).astype(int) - made.image(b)).mean() < 12
    refs = pickle.loads((release / "refcoco" / "refs(unc).p").read_bytes())
    assert {ref["split"] for ref in refs} == {"train", "val", "testA", "testB"}


def test_train_and_evaluate_on_a_release(release: Path, micro: list[str], tmp_path: Path):
    given = ["--data.name=refcoco", f"--data.root={release}", "--data.per_image=3", "--distillation.warmup=0"]
    assert main("train", *micro, *given, "--training.out", tmp_path / "run") == 0
    scored = ["--data", "refcoco", "--root", release, "--split", "testB", "--out", tmp_path / "testB"]
    assert main("evaluate", "--model", tmp_path / "run" / "best", *scored) == 0
    results = json.loads((tmp_path / "testB" / "results.json").read_text())
    data = ReferDataset("refcoco", release, "testB")
    assert results["data"] == "refcoco"
    assert results["expressions"] == sum(len(data[i].expressions) for i in range(len(data)))
    page = tmp_path / "page.html"
    given = ["--model", tmp_path / "run" / "best", "--results", tmp_path / "testB", "--root", release, "--out", page]
    assert main("report", *given) == 0
    assert "refcoco testB" in page.read_text()


@pytest.mark.parametrize("kind", ["jsonl", "labelme"])
def test_train_evaluate_and_report_on_own_data(kind: str, micro: list[str], tmp_path: Path):
    """No row names a split; --data.root is a file, or a folder of labelme files."""
    scenes, own = SceneDataset("scenes", "train", 18, scene_size=64), tmp_path / "own"
    own.mkdir()
    rows = []
    for group in scenes.groups():
        name = f"{group[0]:02}.png"
        Image.fromarray(scenes.image(scenes[group[0]])).save(own / name)
        shapes = []
        for index in group:
            texts, polygons = [e.text for e in scenes[index].expressions], mask_to_polygons(scenes.mask(scenes[index]))
            rows.append({"image": name, "expressions": texts, "polygon": polygons})
            points = [np.reshape(polygon, (-1, 2)).tolist() for polygon in polygons]
            shapes += [{"label": texts[0], "points": p, "group_id": index, "shape_type": "polygon"} for p in points]
        if kind == "labelme":
            (own / name).with_suffix(".json").write_text(json.dumps({"shapes": shapes, "imagePath": name}))
    if kind == "jsonl":
        (own / "cups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = own / "cups.jsonl" if kind == "jsonl" else own
    given = ["--data.name=manifest", f"--data.root={root}", "--training.out", tmp_path / "run"]
    assert main("train", *micro, *given) == 0
    model = ["--model", tmp_path / "run" / "best"]
    scored = ["--data", "manifest", "--root", root, "--split", "test", "--out", tmp_path / "test"]
    assert main("evaluate", *model, *scored) == 0
    said = [row["sentence"] for row in lines(tmp_path / "test" / "expressions.jsonl")]
    assert said
    assert set(said) <= {text for row in rows for text in row["expressions"]}
    page = tmp_path / "page.html"
    assert main("report", *model, "--results", tmp_path / "test", "--root", root, "--out", page) == 0
    assert "manifest test" in page.read_text()


def test_demo_twice(
    micro: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(demo, "ScoreConfig", partial(ScoreConfig, references=6))
    kept = ["metrics.jsonl", "best/model.safetensors", "last/state.pt", "val/results.json", "testB/results.json"]
    seen = []
    for resume in ([], ["--resume"]):
        assert main("demo", *micro, "--training.out", tmp_path, *resume) == 0
        shown = capsys.readouterr().out
        assert "scenes val" in shown
        assert "scenes testB" in shown
        assert (tmp_path / "report.html").stat().st_size > 5000
        seen.append([(tmp_path / name).read_bytes() for name in kept])
        for split in ("val", "testB"):
            assert set(METRICS) <= set(json.loads((tmp_path / split / "results.json").read_text()))
    assert seen[0] == seen[1]  # the second time it only scores
    assert main("demo", *micro, "--training.out", tmp_path) == 2
    assert "already holds a run: resume it with --resume" in capsys.readouterr().err


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


@pytest.mark.parametrize(("split", "count"), [("testA", 10), ("testB", 4)])
def test_real_photographs(real_data: Path, run: Path, tmp_path: Path, split: str, count: int):
    root = real_data / "refer-mini"
    given = ["--data", "refcoco", "--root", root, "--split", split, "--out", tmp_path]
    assert main("evaluate", "--model", run / "best", *given) == 0
    rows = lines(tmp_path / "expressions.jsonl")
    assert len({row["ref_id"] for row in rows}) == count
    data = ReferDataset("refcoco", root, split)
    area = {data[i].ref_id: int(data.mask(data[i]).sum()) for i in range(len(data))}
    assert all(row["union"] >= area[row["ref_id"]] >= row["intersection"] for row in rows)


def test_predict_on_a_real_photograph(real_data: Path, run: Path, tmp_path: Path):
    photograph = min((real_data / "refer-mini" / "images" / "train2014").glob("*.jpg"))
    assert main("predict", "--model", run / "best", "--image", photograph, "--text", "man", "--out", tmp_path) == 0
    with Image.open(photograph) as image:
        size = image.size
    for file in tmp_path.iterdir():
        with Image.open(file) as image:
            assert image.size == size
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The full size


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_step_of_the_full_size(precision: str, tmp_path: Path):
    """ViT-B/16 at 480x480 with the benchmark's settings: it fits together, whatever it learns."""
    from accelerate.state import AcceleratorState
    from transformers import CLIPConfig, CLIPModel

    from cmmasksd.model.tokenizing import load_tokenizer

    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the case before
    tokenizer = load_tokenizer("tiny")  # fewer pieces than CLIP's 49408, so its ids fit
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={"projection_dim": 512, **ends},  # 12 layers of 512, 77 positions, 49408 pieces
        vision_config={"patch_size": 16, "projection_dim": 512},  # 12 layers of 768, 224 pixels
        projection_dim=512,
    )
    assert config.text_config.vocab_size == 49408  # pyright: ignore
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    data, out = tmp_path / "data", tmp_path / "run"
    assert main("data", "scenes", "--out", data, "--train", 2, "--test", 1, "--size", 320) == 0
    given = {
        "data.root": data, "data.workers": 0, "model.backbone": tmp_path / "clip", "training.out": out,
        "training.epochs": 1, "training.batch": 2, "training.precision": precision,
        "distillation.start": 0.0, "distillation.warmup": 0.0,
    }  # fmt: skip
    assert main("train", "--config", "refcoco-vit-b16", *(f"--{key}={value}" for key, value in given.items())) == 0
    row = next(row for row in lines(out / "metrics.jsonl") if "loss" in row)
    assert all(np.isfinite(row[key]) and row[key] > 0 for key in ("loss", "seg", "lmvsd", "vmlsd", "grad_norm"))
    assert (out / "best" / "model.safetensors").stat().st_size > 600_000_000  # some 160 million weights of 4 bytes
