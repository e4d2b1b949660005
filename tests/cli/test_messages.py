"""One clear line for every mistake, and nothing lost or left behind."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from cli.commands import main
from cmmasksd import cli
from cmmasksd.cli import report
from cmmasksd.config import DATASETS
from cmmasksd.errors import UserError

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
        "no file absent.yaml and no such configuration: choose from photos, photos-tune, refcoco+-vit-b16",
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
    ("train --config latin1.yaml", "latin1.yaml is not UTF-8 text: save it as UTF-8"),
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
    (EVALUATE + " --data manifest --split val", "a .jsonl or .csv file"),
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
    (PREDICT + " --image good.png --text x --min_score 1.5", "min_score must be between 0 and 1, got 1.5"),
    (PREDICT + " --image good.png --text x --min_score .nan", "min_score must be between 0 and 1"),
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
    ("push --model {model} --to ./pushed --card latin1.yaml", "latin1.yaml is not UTF-8 text: save it as UTF-8"),
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
