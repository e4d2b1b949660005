"""Training: resume equals an uninterrupted run bit for bit, a tiny run overfits, and mistakes are told in one line.

The networks are a few thousand weights on 64-pixel scenes, on the CPU. Random masking and dropout are on wherever a
test compares runs, so that a lost random state would show.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from cmmasksd.config import Config, DataConfig, DistillationConfig, ModelConfig, PretrainConfig, TrainingConfig
from cmmasksd.errors import UserError
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer
from cmmasksd.pretraining.model import build_clip, save_clip
from cmmasksd.training import loop
from cmmasksd.training.batches import split_batch
from cmmasksd.training.build import build
from cmmasksd.training.checkpoint import CHECKSUM, STATE


@pytest.fixture(scope="module")
def micro_clip(tmp_path_factory):
    """A CLIP of width 32 with fresh weights."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny")
    sizes = PretrainConfig(width=32, vision_layers=2, text_layers=1, image_size=64, patch_size=16)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(build_clip(sizes, tokenizer), tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    """One process on the CPU; accelerate keeps its state (such as the precision) for a whole process."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(clip, out, **training):
    """12 references, 6 batches of 2, 3 updates per epoch, 2 epochs; everything random is on."""
    training = {"epochs": 2, "batch": 4, "batch_size": 2, "warmup_steps": 2, "log_every": 2} | training
    return Config(
        DataConfig(train_references=12, val_references=6, scene_size=64, workers=0),
        ModelConfig(
            str(clip), size=(64, 64), max_tokens=32, decoder_width=32, decoder_layers=1, decoder_heads=2,
            decoder_mlp=32, head_width=16, dropout=0.1,
        ),
        DistillationConfig(start=0.0, warmup=0.5, vision_which="random", language_which="random"),
        TrainingConfig(out=Path(out), **training),
    )  # fmt: skip


def environment(**more):
    """A user's environment: nothing of accelerate's; GPUs hidden, since their sums are not the CPU's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    return kept | {"CUDA_VISIBLE_DEVICES": ""} | more


def state_of(out):
    return torch.load(out / "last" / STATE, weights_only=True)


def write_state(state, out):
    """Put another state in its place, with a checksum that is right."""
    torch.save(state, out / "last" / STATE)
    digest = hashlib.sha256((out / "last" / STATE).read_bytes()).hexdigest()
    (out / "last" / CHECKSUM).write_text(f"{digest}  {STATE}\n")


def rows_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "references_per_s"} for row in rows]


def assert_same(a, b, where="state"):
    """Equal to the last bit, through dicts and lists (torch returns some tuples as lists)."""
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for nth, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{nth}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def straight(micro_clip, tmp_path_factory):
    """A run without interruption, in epochs of 3 updates, and what it returned."""
    out = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return out, loop.train(settings(micro_clip, out))


def test_it_goes_on_from_a_trained_model(straight, tmp_path):
    config = settings("nowhere", tmp_path)  # the backbone is the trained model's own
    config.model.weights, config.model.decoder_width = str(straight[0] / "last"), 999
    model, processor = build(config)
    trained = CMMaskSDModel.from_pretrained(straight[0] / "last")
    assert_same(dict(model.state_dict()), dict(trained.state_dict()))
    assert model.config.decoder_width == 32
    assert processor.tokens(["red circle"]).input_ids.tolist() == (
        CMMaskSDProcessor.from_pretrained(straight[0] / "last").tokens(["red circle"]).input_ids.tolist()
    )
    config.model.weights = str(tmp_path / "none")
    with pytest.raises(UserError, match="there is no model folder"):
        build(config)


def test_a_frozen_text_tower_keeps_its_weights(straight, micro_clip, tmp_path):
    config = settings(micro_clip, tmp_path)
    config.training.freeze_text = True
    before = build(config)[0].state_dict()
    loop.train(config)
    after = CMMaskSDModel.from_pretrained(tmp_path / "last").state_dict()
    text = {name for name in before if name.startswith(("clip.text_model.", "clip.text_projection."))}
    assert text
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed & text
    assert any(name.startswith("clip.vision_model.") for name in changed)
    free = CMMaskSDModel.from_pretrained(straight[0] / "last").state_dict()
    assert any(not torch.equal(before[name], free[name]) for name in text)  # by itself it does not


class Cut(BaseException):
    """The machine goes down."""


def cut_after(monkeypatch, updates):
    """Interrupt the next run before its update number `updates + 1` (from 1), in the middle of accumulating."""
    real, calls = loop._losses, []

    def losses(*args):
        calls.append(1)
        if len(calls) > 2 * updates + 1:
            raise Cut
        return real(*args)

    monkeypatch.setattr(loop, "_losses", losses)


# -- resume


@pytest.mark.parametrize(
    ("updates", "save_every", "saved"),
    [(1, 1, 1), (2, 1, 2), (3, 0, 3), (5, 1, 5)],
    ids=["between log rows", "mid-epoch", "epoch boundary", "second epoch"],
)
def test_resumed_is_uninterrupted(micro_clip, straight, tmp_path, monkeypatch, updates, save_every, saved):
    with monkeypatch.context() as patch:
        cut_after(patch, updates)
        with pytest.raises(Cut):
            loop.train(settings(micro_clip, tmp_path, save_every=save_every))
    assert state_of(tmp_path)["progress"]["update"] == saved
    torch.manual_seed(99)  # what the new process drew before must not matter
    scores = loop.train(settings(micro_clip, tmp_path, save_every=save_every, resume=True))
    whole, expected = straight
    assert scores == expected
    assert_same(state_of(tmp_path), state_of(whole))
    assert rows_of(tmp_path) == rows_of(whole)
    for name in ("last", "best"):
        a, b = ((out / name / "model.safetensors").read_bytes() for out in (tmp_path, whole))
        assert a == b, name


def test_the_random_state_matters_to_these_runs(micro_clip, straight, tmp_path, monkeypatch):
    """Guards the test above: with the random state lost, it would fail."""
    from cmmasksd.training import checkpoint

    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            loop.train(settings(micro_clip, tmp_path))
    monkeypatch.setattr(checkpoint, "set_random_state", lambda state: None)
    loop.train(settings(micro_clip, tmp_path, resume=True))
    assert rows_of(tmp_path)[-2]["loss"] != rows_of(straight[0])[-2]["loss"]


def test_a_finished_run_is_resumed_without_change(micro_clip, straight, tmp_path):
    out, expected = straight
    shutil.copytree(out, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "epo')  # a row that a crash cut short
    assert loop.train(settings(micro_clip, tmp_path / "run", resume=True)) == expected
    assert rows_of(tmp_path / "run") == rows_of(out)

    state = state_of(tmp_path / "run")
    state["progress"]["best"] = 0.99
    write_state(state, tmp_path / "run")
    assert loop.train(settings(micro_clip, tmp_path / "run", resume=True))["best"] == 0.99


def test_the_best_score_of_before_is_kept(micro_clip, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            loop.train(settings(micro_clip, tmp_path))
    state = state_of(tmp_path)
    assert state["progress"]["best"] == state["progress"]["validation"]["mIoU"] >= 0
    state["progress"]["best"] = 0.99
    write_state(state, tmp_path)
    best = (tmp_path / "best" / "model.safetensors").read_bytes()
    assert loop.train(settings(micro_clip, tmp_path, resume=True))["best"] == 0.99
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == best


def test_resume_needs_the_same_run(micro_clip, straight, tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        loop.train(settings(micro_clip, tmp_path, resume=True))
    shutil.copytree(straight[0], tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run: resume it with --resume"):
        loop.train(settings(micro_clip, tmp_path / "run"))
    assert_same(state_of(tmp_path / "run"), state_of(straight[0]))
    assert rows_of(tmp_path / "run") == rows_of(straight[0])


DIFFERENT = [
    ("training", "lr", 0.5, "training.lr 0.001 (now 0.5)"),
    ("training", "seed", 1, "training.seed 0 (now 1)"),
    ("data", "scene_seed", 3, "data.scene_seed 0 (now 3)"),
    ("training", "freeze_text", True, "training.freeze_text False (now True)"),
    ("model", "dropout", 0.3, "model.dropout 0.1 (now 0.3)"),
    ("distillation", "vision_weight", 2.0, "distillation.vision_weight 1.0 (now 2.0)"),
]


@pytest.mark.parametrize(("part", "key", "value", "said"), DIFFERENT, ids=[f"{row[0]}.{row[1]}" for row in DIFFERENT])
def test_other_settings_are_named_and_refused(micro_clip, straight, tmp_path, part, key, value, said):
    shutil.copytree(straight[0], tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    config = settings(micro_clip, tmp_path / "run", resume=True)
    setattr(getattr(config, part), key, value)
    with pytest.raises(UserError, match=re.escape(f"other settings: {said}; resume with the same ones")) as caught:
        loop.train(config)
    fixed = key == "freeze_text"  # decides which weights the optimizer knows
    assert str(caught.value).endswith(f"--training.allow_change {part}.{key}") is not fixed
    config.training.allow_change = ["training.freeze_text"]
    with pytest.raises(UserError, match=r"allow_change names training\.freeze_text, which decides what is trained"):
        loop.train(config)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_setting_may_change_where_it_is_named(micro_clip, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            loop.train(settings(micro_clip, tmp_path))
    how = {"resume": True, "lr": 0.25, "weight_decay": 0.5, "log_every": 1, "save_every": 1}
    with pytest.raises(UserError, match=r"training\.weight_decay 0\.05 \(now 0\.5\);"):
        loop.train(settings(micro_clip, tmp_path, **how, allow_change="training.lr"))
    with pytest.raises(UserError, match=r"allow_change names 'training\.rl', which is not a setting"):
        loop.train(settings(micro_clip, tmp_path, **how, allow_change="training.rl"))
    loop.train(settings(micro_clip, tmp_path, **how, allow_change="training.lr, training.weight_decay"))
    assert [row["lr"] > 0.0011 for row in rows_of(tmp_path) if "lr" in row] == [False, True, True, True]
    groups = state_of(tmp_path)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {group["peak_lr"] for group in groups} == {0.25, 0.025}
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]
    assert saved["lr"] == 0.25
    assert not {"resume", "allow_change"} & saved.keys()


def test_more_epochs_extend_a_run_and_its_schedule_is_told(micro_clip, straight, tmp_path, capsys):
    shutil.copytree(straight[0], tmp_path / "run")
    loop.train(settings(micro_clip, tmp_path / "run", resume=True, epochs=3))
    rows = rows_of(tmp_path / "run")
    assert rows[: len(rows_of(straight[0]))] == rows_of(straight[0])
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 6, 8, 9, 9]
    last = next(row for row in reversed(rows) if "lr" in row)
    assert last["lr"] == pytest.approx(1e-5)  # a hundredth, at the new end
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("training.epochs"))
    assert said == (
        "training.epochs 2 is now 3: update 6 continues on the schedule of 9 updates; "
        "factor of the learning rate 0.01, now 0.258; of the masked branches 1, now 1"
    )
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["epochs"] == 3
    with pytest.raises(UserError, match=r"has done 3 epochs, training\.epochs is 2: give more, or 3 as before"):
        loop.train(settings(micro_clip, tmp_path / "run", resume=True, epochs=2))


PROGRESS = {
    "text": "text",
    "a key less": {"update": 1},
    "an update of text": {"update": "6"},
    "an update that cannot be": {"update": 600},
    "no updates per epoch": {"per_epoch": 0},
    "a negative epoch": {"validated": -1},
    "best is None": {"best": None},
    "a validation of text": {"validation": {"mIoU": "high"}},
    "sums of numbers": {"sums": {"loss": 1.0}, "counts": {"loss": 1}},
    "no counts": {"sums": {"loss": torch.tensor(1.0)}, "counts": {}},
    "keys that are no names": {"config": {1: 2}},
}


@pytest.mark.parametrize("changed", PROGRESS.values(), ids=PROGRESS)
def test_a_progress_of_another_type_is_one_line(micro_clip, straight, tmp_path, changed):
    shutil.copytree(straight[0], tmp_path / "run")
    state = state_of(tmp_path / "run")
    state["progress"] = state["progress"] | changed if isinstance(changed, dict) else changed
    if changed == {"update": 1}:
        del state["progress"]["best"]
    write_state(state, tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot resume from .*progress\) is not what a run stores"):
        loop.train(settings(micro_clip, tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    "line", [b"not JSON", b"[1, 2]", b'{"loss": 1.0}', b'{"step": "two"}', b"\xff\xfe", b"[" * 100_000, b""]
)
def test_a_foreign_line_in_the_log_is_one_line(micro_clip, straight, tmp_path, line):
    shutil.copytree(straight[0], tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    first, *rest = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + line + b"\n" + b"".join(rest))
    before = log.read_bytes(), (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is not a row of a run's log: mend or remove it"):
        loop.train(settings(micro_clip, tmp_path / "run", resume=True))
    assert (log.read_bytes(), (tmp_path / "run" / "config.yaml").read_bytes()) == before


# -- trackers


def test_trackers_get_the_rows_of_the_log(micro_clip, tmp_path, monkeypatch):
    """Also after a cut: TensorBoard drops the rows after the update that the run is resumed from."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        cut_after(patch, 5)
        with pytest.raises(Cut):
            loop.train(settings(micro_clip, tmp_path, log_every=1, trackers="tensorboard"))
    assert state_of(tmp_path)["progress"]["update"] == 3
    loop.train(settings(micro_clip, tmp_path, log_every=1, trackers="tensorboard", resume=True))
    curves = EventAccumulator(str(tmp_path / "tensorboard" / "cmmasksd")).Reload()
    rows = rows_of(tmp_path)
    for name in ("loss", "lr", "mIoU"):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert [(event.step, event.value) for event in curves.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in expected
        ], name


def test_without_trackers_there_is_the_log_alone(micro_clip, tmp_path):
    loop.train(settings(micro_clip, tmp_path, epochs=1, trackers=[]))
    assert {path.name for path in tmp_path.iterdir()} == {"best", "last", "config.yaml", "metrics.jsonl"}


def test_a_tracker_that_cannot_start_is_one_line(micro_clip, tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def start(tracker):
        raise RuntimeError("log in\nfirst")

    monkeypatch.setattr(TensorBoardTracker, "start", start)
    with pytest.raises(UserError, match=r"a tracker of training\.trackers cannot start: log in first$"):
        loop.train(settings(micro_clip, tmp_path, trackers=["tensorboard"]))
    with pytest.raises(UserError, match=r"training\.trackers names 'all', which is not a tracker"):
        loop.train(settings(micro_clip, tmp_path, trackers="all"))


# -- SIGTERM


def terminate_in(monkeypatch, name, call):
    """Send SIGTERM in the next run, in a call (from 1) of a function of the loop."""
    real, calls = getattr(loop, name), []

    def sending(*args, **how):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **how)

    monkeypatch.setattr(loop, name, sending)


@pytest.mark.parametrize(
    ("name", "call", "saved", "validated"),
    [("_losses", 3, 2, 0), ("_losses", 6, 3, 0), ("evaluate", 1, 3, 0), ("_losses", 7, 4, 1), ("evaluate", 2, 6, 1),
     ("run_state", 4, 6, 2)],
    ids=["in an update", "in the last update of an epoch", "in a validation", "second epoch", "in the last validation",
         "in the last save"],
)  # fmt: skip
def test_terminated_and_resumed_is_uninterrupted(
    micro_clip, straight, tmp_path, monkeypatch, name, call, saved, validated
):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        terminate_in(patch, name, call)
        with pytest.raises(SystemExit, match="143"):
            loop.train(settings(micro_clip, tmp_path))
    assert signal.getsignal(signal.SIGTERM) is handler
    progress = state_of(tmp_path)["progress"]
    assert (progress["update"], progress["validated"]) == (saved, validated)
    torch.manual_seed(99)
    scores = loop.train(settings(micro_clip, tmp_path, resume=True))
    assert scores == straight[1]
    assert_same(state_of(tmp_path), state_of(straight[0]))
    assert rows_of(tmp_path) == rows_of(straight[0])


def command(clip, out, *more):
    """The arguments of a run of 60 updates, with a worker."""
    values = {
        "data.train_references": 240, "data.val_references": 6, "data.scene_size": 64, "data.workers": 1,
        "model.backbone": clip, "model.size": "[64,64]", "model.max_tokens": 32, "model.decoder_width": 32,
        "model.decoder_layers": 1, "model.decoder_heads": 2, "model.decoder_mlp": 32, "model.head_width": 16,
        "training.batch": 4, "training.out": out,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items()] + list(more)


@contextmanager
def started(arguments):
    """A process in a session of its own, once its progress bar has moved; killed in the end, or after ten minutes."""
    from threading import Timer

    with subprocess.Popen(
        [sys.executable, "-m", *arguments], env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        bound = Timer(600, os.killpg, (process.pid, signal.SIGKILL))
        bound.start()
        try:
            assert process.stderr is not None
            shown = b""
            while not re.search(rb"train: +\d+%.* [1-9]\d*/240 ", shown):
                got = os.read(process.stderr.fileno(), 65536)
                assert got, shown[-4000:].decode()
                shown += got
            yield process
        finally:
            bound.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
@pytest.mark.parametrize("name", ["train", "demo"])
def test_sigterm_to_all_processes_of_a_job_saves_and_leaves_with_143(micro_clip, tmp_path, name):
    with started(["cmmasksd", name, *command(micro_clip, tmp_path)]) as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 143, said.decode()[-4000:]
    assert said.decode().endswith(f"\ncmmasksd {name}: terminated\n"), said.decode()[-4000:]
    assert "Traceback" not in said.decode()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert 0 < state_of(tmp_path)["progress"]["update"] < 60


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_to_torchrun_ends_all_processes_at_one_update(micro_clip, tmp_path):
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "cmmasksd", "train"]
    with started([*launch, *command(micro_clip, tmp_path)]) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert said.decode().count("cmmasksd train: terminated") == 2, said.decode()[-4000:]
    state = state_of(tmp_path)
    assert 0 < state["progress"]["update"] < 60
    assert len(state["random"]) == 2


# -- what a run leaves


def test_what_a_run_leaves(straight):
    out, scores = straight
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 6]
    assert {"loss", "seg", "lmvsd", "vmlsd", "lr", "ramp", "grad_norm"} <= set(rows[0])
    assert [row["ramp"] for row in rows if "ramp" in row] == pytest.approx([1 / 3, 1.0, 1.0])
    assert rows[-1]["mIoU"] == scores["mIoU"]
    assert scores["best"] == max(row["mIoU"] for row in rows if "mIoU" in row)
    for folder in ("last", "best"):
        assert yaml.safe_load((out / folder / "config.yaml").read_text())["training"]["epochs"] == 2
        model = CMMaskSDModel.from_pretrained(out / folder)
        assert CMMaskSDProcessor.from_pretrained(out / folder).size == (64, 64)
        assert not any("mask_token" in name for name, _ in model.named_parameters())
    assert not [path.name for path in out.iterdir() if path.name.endswith((".new", ".old", ".tmp"))]


# -- learning


def test_it_overfits_a_handful_of_references(micro_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "run_state", lambda *args: None)  # an epoch is one update here
    monkeypatch.setattr(loop, "save_model", lambda *args, **state: None)
    config = settings(micro_clip, tmp_path, epochs=150, batch=6, batch_size=6, lr=4e-3, clip_lr_scale=0.3)
    config.training.log_every, config.training.validate_every = 10, 1000
    config.data.train_references, config.data.val_references = 6, 3
    config.data.per_image = 3
    config.model.dropout = 0.0
    config.distillation.vision = config.distillation.language = False
    config.training.save_every = 0
    loop.train(config)
    losses = [row["seg"] for row in rows_of(tmp_path) if "seg" in row]
    assert losses[-1] < 0.4 * losses[0], losses


def test_runs_of_different_precision_in_one_process(micro_clip, straight, tmp_path):
    """accelerate keeps a precision for the whole process; a run must not get that of the run before it."""
    for nth, precision in enumerate(("bf16", "no", "bf16")):
        loop.train(settings(micro_clip, tmp_path / str(nth), precision=precision))
    assert CMMaskSDModel.from_pretrained(tmp_path / "0" / "last").dtype == torch.float32
    first, between, second = (rows_of(tmp_path / name) for name in "012")
    assert between == rows_of(straight[0])
    assert second == first != between


def test_accumulation_equals_a_large_batch(micro_clip, tmp_path):
    """One update from 12 references at once, or from 3 parts of 4: the same weights, up to rounding."""
    weights = []
    for parts in (1, 3):
        config = settings(micro_clip, tmp_path / str(parts), epochs=1, batch=12, batch_size=12 // parts)
        config.distillation.vision = config.distillation.language = False
        config.model.dropout = 0.0
        config.training.warmup_steps = 0
        loop.train(config)
        assert state_of(tmp_path / str(parts))["progress"]["update"] == 1
        moments = state_of(tmp_path / str(parts))["optimizer"]["state"]
        weights.append({name: state["exp_avg"] for name, state in moments.items()})
    assert list(weights[0]) == list(weights[1])
    for name, first in weights[0].items():  # Adam's first moment is a tenth of the (clipped) gradient
        torch.testing.assert_close(weights[1][name], first, rtol=1e-3, atol=1e-6, msg=name)


def test_a_loss_that_blows_up_stops_the_run_and_spares_the_last_checkpoint(micro_clip, tmp_path, monkeypatch):
    real, calls = loop._losses, []

    def losses(*args):
        calls.append(1)
        found = real(*args)
        return {name: value * float("nan") for name, value in found.items()} if len(calls) == 8 else found

    monkeypatch.setattr(loop, "_losses", losses)
    with pytest.raises(UserError, match=r"loss is nan .* at update 4: lower training.lr"):
        loop.train(settings(micro_clip, tmp_path, log_every=100, save_every=1))
    assert state_of(tmp_path)["progress"]["update"] == 3
    assert all(value.isfinite().all() for value in state_of(tmp_path)["objective"].values())


@pytest.mark.parametrize(
    ("lr", "said"), [(1e20, r"norm of the weights is (inf|nan) after update 4"), (1e39, "too large for float32")]
)
def test_a_step_that_blows_up_spares_the_last_checkpoint(micro_clip, tmp_path, monkeypatch, lr, said):
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            loop.train(settings(micro_clip, tmp_path, save_every=1))
    before = (tmp_path / "last" / STATE).read_bytes()
    how = {"save_every": 1, "log_every": 100, "warmup_steps": 0, "lr": lr, "resume": True}
    with pytest.raises(UserError, match=f"{said}.*: lower training.lr"):
        loop.train(settings(micro_clip, tmp_path, **how, allow_change="training.lr,training.warmup_steps"))
    assert (tmp_path / "last" / STATE).read_bytes() == before


def test_the_own_decoders_begin_as_the_main_one_when_the_ramp_leaves_0(micro_clip, tmp_path, monkeypatch):
    """And a run that is interrupted before, at or after that update equals one that is not."""

    def config(out, **training):
        made = settings(micro_clip, out, save_every=1, weight_decay=0.5, lr=1e-2, **training)
        made.distillation.share_weights, made.distillation.start, made.distillation.warmup = False, 0.5, 0.0
        return made

    synced, real = [], loop.MaskedSelfDistillation.sync_own_decoders

    def sync(objective):
        own = [value.clone() for value in objective.own_decoders["lmvsd"].parameters()]
        found = real(objective)
        main = list(objective.model.decoder.parameters())
        assert not all(torch.equal(a, b) for a, b in zip(own, main, strict=True))
        for decoder in objective.own_decoders.values():
            assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), main, strict=True))
        synced.append(1)
        return found

    monkeypatch.setattr(loop.MaskedSelfDistillation, "sync_own_decoders", sync)
    loop.train(config(tmp_path / "whole"))
    assert synced == [1]
    steps = {
        name: int(moments["step"])
        for name, moments in state_of(tmp_path / "whole")["optimizer"]["state"].items()
        if "decoder" in name
    }
    assert {name.startswith("own_decoders.") for name in steps} == {True, False}
    assert all(count == (3 if name.startswith("own_decoders.") else 6) for name, count in steps.items())
    for updates in (2, 3, 4):
        out = tmp_path / str(updates)
        with monkeypatch.context() as patch:
            cut_after(patch, updates)
            with pytest.raises(Cut):
                loop.train(config(out))
        loop.train(config(out, resume=True))
        assert_same(state_of(out), state_of(tmp_path / "whole"))


def test_own_decoders_begin_again_where_an_extended_run_waits_again(micro_clip, tmp_path, monkeypatch):
    def config(**training):
        made = settings(micro_clip, tmp_path, **training)
        made.distillation.share_weights, made.distillation.start, made.distillation.warmup = False, 0.5, 0.0
        return made

    begun, real = [], loop.MaskedSelfDistillation.sync_own_decoders
    monkeypatch.setattr(
        loop.MaskedSelfDistillation, "sync_own_decoders", lambda objective: (begun.append(1), real(objective))[1]
    )
    loop.train(config(epochs=1))
    assert begun == [1]
    loop.train(config(epochs=4, resume=True))
    assert begun == [1, 1]


def test_a_run_with_many_other_settings_is_one_short_line(micro_clip, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    config = settings(micro_clip, tmp_path / "run", resume=True, lr=0.5, seed=3, weight_decay=0.5, warmup_steps=7)
    with pytest.raises(UserError, match="and 1 more; resume with the same ones") as caught:
        loop.train(config)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("lr", ["1e20", "1e38"])
def test_a_rate_that_is_far_too_high_is_one_line(micro_clip, tmp_path, lr):
    arguments = command(micro_clip, tmp_path / "run", "--training.warmup_steps=0", f"--training.lr={lr}")
    run = subprocess.run(
        [sys.executable, "-m", "cmmasksd", "train", *arguments],
        env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr[-4000:]
    assert run.stderr.splitlines()[-1].startswith("cmmasksd train: ")
    assert run.stderr.endswith(": lower training.lr\n") or run.stderr.endswith("lower training.lr or leave out bf16\n")
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.parametrize(
    ("batch", "batch_size", "processes", "expected"),
    [
        (64, 16, 1, (16, 4)), (64, 16, 8, (8, 1)), (64, 4, 8, (4, 2)), (64, None, 2, (32, 1)), (24, None, 1, (24, 1)),
        (64, 24, 1, "into steps of 24 references on 1 process: use 48 or 72"),
        (64, None, 6, "into steps of 10 references on 6 processes: use 60 or 66"),
        (64, 4, 6, "into steps of 4 references on 6 processes: use 48 or 72"),
        (3, 16, 8, "into steps of 1 references on 8 processes: use 8"),
    ],
)  # fmt: skip
def test_a_batch_is_shared_out(batch, batch_size, processes, expected):
    how = TrainingConfig(batch=batch, batch_size=batch_size)
    if isinstance(expected, tuple):
        assert split_batch(how, processes) == expected
        return
    with pytest.raises(UserError, match=f"training.batch {batch} cannot be divided {expected}$"):
        split_batch(how, processes)
    for fits in map(int, re.findall(r"\d+", expected.partition("use ")[2])):
        size, steps = split_batch(TrainingConfig(batch=fits, batch_size=batch_size), processes)
        assert size * steps * processes == fits


def test_the_preprocessing_is_the_trained_models_own(straight, tmp_path, capsys):
    trained = shutil.copytree(straight[0] / "last", tmp_path / "trained")
    file = trained / "processor_config.json"
    own = {"size": [96, 64], "resize": "letterbox", "max_tokens": 20, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))

    def built(**model):
        config = Config(model=ModelConfig(weights=str(trained), **model))
        processor = build(config)[1]
        assert (config.model.size, config.model.resize) == (processor.size, processor.resize)
        assert config.model.max_tokens == processor.max_tokens
        assert (processor.mean, processor.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        return (processor.size, processor.resize, processor.max_tokens), capsys.readouterr().out

    assert built() == (((96, 64), "letterbox", 20), "")
    assert built(size=(96, 64)) == (((96, 64), "letterbox", 20), "")
    given, said = built(size=(64, 64), max_tokens=9)
    assert given == ((64, 64), "letterbox", 9)
    assert said.splitlines() == [
        f"model.size is (64, 64), in place of (96, 64), which {trained} was trained with",
        f"model.max_tokens is 9, in place of 20, which {trained} was trained with",
    ]


def test_a_new_models_preprocessing(micro_clip):
    config = Config(model=ModelConfig(str(micro_clip)))
    processor = build(config)[1]
    assert (processor.size, processor.resize, processor.max_tokens) == ((128, 128), "warp", 48)
    assert (config.model.size, config.model.resize, config.model.max_tokens) == ((128, 128), "warp", 48)


def test_settings_that_do_not_fit(micro_clip, tmp_path):
    config = settings(micro_clip, tmp_path, batch=14)
    with pytest.raises(UserError, match=r"12 references are fewer than training.batch 14: lower it"):
        loop.train(config)
    config = settings(micro_clip, tmp_path)
    config.model.max_tokens = 65
    with pytest.raises(UserError, match=r"max_tokens 65 does not fit .*: choose from 3 to 64"):
        build(config)
    assert not list(tmp_path.iterdir())


# -- two processes


def launched(processes, *arguments):
    """`cmmasksd …` in so many processes, as users start it."""
    launch = (
        ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"] if processes > 1 else []
    )
    run = subprocess.run(
        [sys.executable, "-m", *launch, "cmmasksd", *arguments],
        env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def test_two_processes_train_as_one_does(micro_clip, tmp_path):
    """The same configuration, the same references per update: the same run, up to rounding."""
    how = ["--training.batch=24", "--training.batch_size=6", "--training.warmup_steps=0", "--training.log_every=1"]
    how += ["--distillation.vision=false", "--distillation.language=false", "--data.per_image=1"]
    how += ["--data.train_references=72"]
    one = launched(1, "train", *command(micro_clip, tmp_path / "one", *how))
    two = launched(2, "train", *command(micro_clip, tmp_path / "two", *how))
    assert one.splitlines()[0] == "24 references per update = 1 process × 6 × accumulate 4"
    assert two.splitlines()[0] == "24 references per update = 2 processes × 6 × accumulate 2"
    assert two.count("references per update") == two.count("last validation") == 1
    first, second = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    assert first["progress"]["update"] == second["progress"]["update"] == 3
    assert len(second["random"]) == 2
    for name, weight in first["objective"].items():
        torch.testing.assert_close(second["objective"][name], weight, rtol=1e-3, atol=1e-3, msg=name)
    assert [row["step"] for row in rows_of(tmp_path / "two")] == [1, 2, 3, 3]


def test_two_processes_train_one_model(micro_clip, tmp_path):
    """A real launch: gradients are averaged, every process ends with the same weights, the main one writes."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from test_loop import settings\n"
        "from cmmasksd.training import loop\n"
        "kept = []\n"
        "build = loop.build\n"
        "def spy(config):\n"
        "    model, processor = build(config)\n"
        "    kept.append(model)\n"
        "    return model, processor\n"
        "loop.build = spy\n"
        "scores = loop.train(settings(sys.argv[1], sys.argv[2], epochs=1, batch=12, batch_size=3))\n"
        "import torch.distributed as dist\n"
        "assert dist.get_world_size() == 2\n"
        "flat = torch.cat([p.detach().flatten() for p in kept[0].parameters()])\n"
        "both = [torch.empty_like(flat) for _ in range(2)]\n"
        "dist.all_gather(both, flat)\n"
        "assert torch.equal(*both)\n"
        "all_scores = [None, None]\n"
        "dist.all_gather_object(all_scores, scores)\n"
        "assert all_scores[0] == all_scores[1]\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    run = subprocess.run(
        [*command, str(micro_clip), str(tmp_path / "run")],
        env=environment(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    state = state_of(tmp_path / "run")
    assert len(state["random"]) == 2
    assert not torch.equal(state["random"][0]["torch"], state["random"][1]["torch"])  # each masks for itself
    assert state["progress"]["update"] == 1
    with pytest.raises(UserError, match="run on 2 processes, this one has 1"):
        loop.train(settings(micro_clip, tmp_path / "run", epochs=1, batch=12, batch_size=3, resume=True))
