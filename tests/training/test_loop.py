"""Training: resume equals an uninterrupted run bit for bit, a tiny run overfits, and mistakes are told in one line.

The networks are a few thousand weights on 64-pixel scenes, on the CPU. Random masking and dropout are on wherever a
test compares runs, so that a lost random state would show.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmmasksd.config import Config, DataConfig, DistillationConfig, ModelConfig, PretrainConfig, TrainingConfig
from cmmasksd.errors import UserError
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor, load_tokenizer
from cmmasksd.training import loop
from cmmasksd.training.checkpoint import STATE
from cmmasksd.training.pretrain import build_clip, save_clip


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
    training = {"epochs": 2, "batch_size": 2, "accumulate": 2, "warmup_steps": 2, "log_every": 2} | training
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
    model, processor = loop.build(config)
    trained = CMMaskSDModel.from_pretrained(straight[0] / "last")
    assert_same(dict(model.state_dict()), dict(trained.state_dict()))
    assert model.config.decoder_width == 32
    assert processor.tokens(["red circle"]).input_ids.tolist() == (
        CMMaskSDProcessor.from_pretrained(straight[0] / "last").tokens(["red circle"]).input_ids.tolist()
    )
    config.model.weights = str(tmp_path / "none")
    with pytest.raises(UserError, match="there is no model folder"):
        loop.build(config)


def test_a_frozen_text_tower_keeps_its_weights(straight, micro_clip, tmp_path):
    config = settings(micro_clip, tmp_path)
    config.training.freeze_text = True
    before = loop.build(config)[0].state_dict()
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
    import shutil

    out, expected = straight
    shutil.copytree(out, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "epo')  # a row that a crash cut short
    assert loop.train(settings(micro_clip, tmp_path / "run", resume=True)) == expected
    assert rows_of(tmp_path / "run") == rows_of(out)

    state = state_of(tmp_path / "run")
    state["progress"]["best"] = 0.99
    torch.save(state, tmp_path / "run" / "last" / STATE)
    assert loop.train(settings(micro_clip, tmp_path / "run", resume=True))["best"] == 0.99


def test_the_best_score_of_before_is_kept(micro_clip, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            loop.train(settings(micro_clip, tmp_path))
    state = state_of(tmp_path)
    assert state["progress"]["best"] == state["progress"]["validation"]["mIoU"] >= 0
    state["progress"]["best"] = 0.99
    torch.save(state, tmp_path / "last" / STATE)
    best = (tmp_path / "best" / "model.safetensors").read_bytes()
    assert loop.train(settings(micro_clip, tmp_path, resume=True))["best"] == 0.99
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == best


def test_resume_needs_the_same_run(micro_clip, straight, tmp_path):
    import shutil

    with pytest.raises(UserError, match="no run to resume"):
        loop.train(settings(micro_clip, tmp_path, resume=True))
    shutil.copytree(straight[0], tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already: go on with --resume"):
        loop.train(settings(micro_clip, tmp_path / "run"))
    with pytest.raises(UserError, match="run of 6 updates, this one has 9"):
        loop.train(settings(micro_clip, tmp_path / "run", resume=True, epochs=3))
    assert_same(state_of(tmp_path / "run"), state_of(straight[0]))
    assert rows_of(tmp_path / "run") == rows_of(straight[0])


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
        assert json.loads((out / folder / "config.yaml").read_text())["training"]["epochs"] == 2
        model = CMMaskSDModel.from_pretrained(out / folder)
        assert CMMaskSDProcessor.from_pretrained(out / folder).size == (64, 64)
        assert not any("mask_token" in name for name, _ in model.named_parameters())
    assert not [path.name for path in out.iterdir() if path.name.endswith((".new", ".old", ".tmp"))]


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = loop.Log(tmp_path, "a: 1\n", updates=0)
    log.write({"step": 1, "loss": 0.5})
    log.close()
    assert log.board is None
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}


def test_log_keeps_the_rows_up_to_the_state(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    loop.Log(tmp_path, "", updates=4).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    loop.Log(tmp_path, "", updates=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_meter_takes_means_and_starts_again():
    meter = loop.Meter()
    meter.add({"loss": torch.tensor(1.0), "seg": torch.tensor(0.5)})
    meter.add({"loss": torch.tensor(3.0), "seg": torch.tensor(0.0)})
    row = meter.take(8)
    assert (row["loss"], row["seg"]) == (2.0, 0.25)
    meter.add({"loss": torch.tensor(7.0)})
    assert meter.take(1)["loss"] == 7.0


# -- learning


def test_it_overfits_a_handful_of_references(micro_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "save_state", lambda *args: None)  # an epoch is one update here
    monkeypatch.setattr(loop, "save_model", lambda *args, **how: None)
    config = settings(micro_clip, tmp_path, epochs=150, batch_size=6, accumulate=1, lr=4e-3, clip_lr_scale=0.3)
    config.training.log_every, config.training.validate_every = 10, 1000
    config.data.train_references, config.data.val_references = 6, 3
    config.data.per_image = 3
    config.model.dropout = 0.0
    config.distillation.vision = config.distillation.language = False
    config.training.save_every = 0
    loop.train(config)
    losses = [row["seg"] for row in rows_of(tmp_path) if "seg" in row]
    assert losses[-1] < 0.4 * losses[0], losses


def test_bf16_runs(micro_clip, tmp_path):
    config = settings(micro_clip, tmp_path, epochs=1, precision="bf16")
    scores = loop.train(config)
    assert 0 <= scores["mIoU"] <= 1
    assert CMMaskSDModel.from_pretrained(tmp_path / "last").dtype == torch.float32


def test_accumulation_equals_a_large_batch(micro_clip, tmp_path):
    """One update from 12 references at once, or from 3 parts of 4: the same weights, up to rounding."""
    weights = []
    for parts in (1, 3):
        config = settings(micro_clip, tmp_path / str(parts), epochs=1, batch_size=12 // parts, accumulate=parts)
        config.distillation.vision = config.distillation.language = False
        config.model.dropout = 0.0
        config.training.warmup_steps = 0
        loop.train(config)
        assert state_of(tmp_path / str(parts))["progress"]["total"] == 1
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


def test_settings_that_do_not_fit(micro_clip, tmp_path):
    config = settings(micro_clip, tmp_path, accumulate=20)
    with pytest.raises(UserError, match=r"6 batches are fewer than training.accumulate 20"):
        loop.train(config)
    config = settings(micro_clip, tmp_path)
    config.model.max_tokens = 65
    with pytest.raises(UserError, match=r"max_tokens 65 does not fit .*: choose from 3 to 64"):
        loop.build(config)
    assert not list(tmp_path.iterdir())


# -- two processes


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
        "scores = loop.train(settings(sys.argv[1], sys.argv[2], epochs=1, batch_size=3, accumulate=2))\n"
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
        loop.train(settings(micro_clip, tmp_path / "run", epochs=1, batch_size=3, accumulate=2, resume=True))
