"""Checkpoints: a crash while writing leaves the previous one, and a state file can neither lie nor run code."""

import hashlib
import os
import pickle
import random

import pytest
import torch
from torch import nn

from cmmasksd.errors import UserError
from cmmasksd.training.checkpoint import (
    CHECKSUM,
    STATE,
    random_state,
    read_state,
    restore_state,
    run_state,
    save_model,
    set_random_state,
)


@pytest.fixture
def accelerator(monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)


def net(width=3, seed=0):
    """A module and its optimiser, in two groups as the loop has them, after one update."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))
    groups = [
        {"name": "new", "params": [p for p in module.parameters() if p.ndim > 1], "lr": 1e-2, "peak_lr": 1e-2},
        {
            "name": "new_no_decay",
            "params": [p for p in module.parameters() if p.ndim == 1],
            "lr": 1e-3,
            "peak_lr": 1e-3,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    step(module, optimizer)
    return module, optimizer


def step(module, optimizer):
    module(torch.ones(4, 2)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Part:
    """Stands for a model or a processor."""

    def __init__(self, name, text):
        self.name, self.text = name, text

    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        if self.text is None:
            raise OSError("no space left on device")
        (folder / self.name).write_text(self.text)


def save(folder, text, state=None):
    save_model(folder, Part("model", text), Part("processor", text), "a: 1\n", state=state)


# -- state


def written(folder, module, optimizer, accelerator, progress):
    """A state file as a run leaves it, checksum and all."""
    save(folder / "last", "", state=run_state(module, optimizer, accelerator, progress))
    return folder / "last" / STATE


def resave(file, state):
    """Write another state in the place of a file, with a right checksum."""
    torch.save(state, file)
    file.with_name(CHECKSUM).write_text(hashlib.sha256(file.read_bytes()).hexdigest())


def restored(file, module, optimizer):
    state = read_state(file, 1)
    restore_state(state, module, optimizer, 0, file)
    return state["progress"]


def test_state_round_trip_continues_as_if_nothing_had_happened(tmp_path, accelerator):
    module, optimizer = net()
    file = written(tmp_path, module, optimizer, accelerator, {"update": 7, "best": 0.5})
    for _ in range(3):
        step(module, optimizer)
    drawn = torch.rand(3), random.random()

    other, other_optimizer = net(seed=5)
    assert restored(file, other, other_optimizer) == {"update": 7, "best": 0.5}
    for _ in range(3):
        step(other, other_optimizer)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]


def test_the_optimizer_keeps_the_settings_of_this_run(tmp_path, accelerator):
    file = written(tmp_path, *net(), accelerator, {})
    module, optimizer = net(seed=5)
    optimizer.param_groups[0]["peak_lr"] = 0.5
    restored(file, module, optimizer)
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.5, 1e-3]


def test_random_state_round_trip():
    state = random_state()
    first = torch.rand(2).tolist(), random.random()
    set_random_state(state)
    assert (torch.rand(2).tolist(), random.random()) == first


def test_state_file_holds_no_objects(tmp_path, accelerator):
    file = written(tmp_path, *net(), accelerator, {"update": 1})
    assert set(torch.load(file, weights_only=True)) == {"objective", "optimizer", "random", "progress"}


def test_the_checksum_is_that_of_sha256sum(tmp_path, accelerator):
    file = written(tmp_path, *net(), accelerator, {})
    assert file.with_name(CHECKSUM).read_text() == f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {STATE}\n"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_state_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    def plain(what, file):
        with file.open("wb") as out:
            pickle.dump(what, out)

    for kind in (plain, torch.save):
        file = tmp_path / STATE
        kind({"random": [1], "objective": Evil()}, file)
        file.with_name(CHECKSUM).write_text(hashlib.sha256(file.read_bytes()).hexdigest())
        with pytest.raises(UserError, match=rf"cannot resume from .*{STATE}"):
            read_state(file, 1)
    assert not (tmp_path / "owned").exists()


def refusal(file, module, optimizer):
    """The one line with which a state is refused, before anything of the run is changed."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError) as caught:
        restored(file, module, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(file))
    return str(caught.value)


@pytest.mark.parametrize("damage", ["short", "empty", "text", "a flipped bit", "no checksum", "a foreign checksum"])
def test_a_damaged_file_is_one_line(tmp_path, accelerator, damage):
    module, optimizer = net()
    file = written(tmp_path, module, optimizer, accelerator, {"update": 1})
    whole, reason = file.read_bytes(), "do not match state.pt.sha256"
    if damage == "short":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("not a state")
    elif damage == "a flipped bit":  # inside of a weight, where neither the archive nor the pickle notices it
        at = whole.index(module[0].weight.detach().numpy().tobytes())
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif damage == "no checksum":
        file.with_name(CHECKSUM).unlink()
        reason = "there is no state.pt.sha256 beside it"
    else:
        file.with_name(CHECKSUM).write_bytes(b"\xff\x00")
        reason = "there is no state.pt.sha256 beside it"
    assert reason in refusal(file, module, optimizer)


def change(path, value):
    """A change of one entry of a state; `value` may be a function of the old one, or None: remove it."""

    def apply(state):
        *parents, last = path
        for key in parents:
            state = state[key]
        if value is None:
            del state[last]
        else:
            state[last] = value(state[last]) if callable(value) else value

    return apply


FOREIGN = {
    "a part is missing": (change(["optimizer"], None), "it does not hold objective"),
    "a weight is missing": (change(["objective", "0.weight"], None), "objective lacks 0.weight"),
    "a weight too many": (change(["objective", "x" * 5000], torch.zeros(1)), "which this model does not have"),
    "a weight of another shape": (
        change(["objective", "0.weight"], torch.zeros(5, 2)),
        "objective.0.weight is not a torch.float32 tensor of shape (3, 2)",
    ),
    "a weight of another type": (
        change(["objective", "0.weight"], lambda old: old.double()),
        "objective.0.weight is not",
    ),
    "no tensor": (change(["objective", "0.weight"], "text"), "objective.0.weight is not a torch.float32 tensor"),
    "NaN": (change(["objective", "1.bias"], lambda old: old * float("nan")), "objective.1.bias holds values that are"),
    "an infinite moment": (
        change(["optimizer", "state", "1.bias", "exp_avg"], lambda old: old / 0.0),
        "optimizer.state.1.bias.exp_avg holds values that are not finite",
    ),
    "a negative number of steps": (
        change(["optimizer", "state", "1.bias", "step"], torch.tensor(-1.0)),
        "optimizer.state.1.bias.step holds negative values",
    ),
    "a negative mean of squares": (
        change(["optimizer", "state", "1.bias", "exp_avg_sq"], lambda old: old - 1e9),
        "optimizer.state.1.bias.exp_avg_sq holds negative values",
    ),
    "a moment is missing": (change(["optimizer", "state", "1.bias"], None), "optimizer.state lacks 1.bias"),
    "moments of another parameter": (
        change(["optimizer", "param_groups", 0, "params", 0], "1.bias"),
        "optimizer.param_groups[0].params[0] is '1.bias'",
    ),
    "groups are text": (change(["optimizer", "param_groups"], "text"), "optimizer.param_groups is not a list of 2"),
    "objective is a list": (change(["objective"], [1]), "objective is a list, not a dict"),
    "random is text": (change(["random"], "text"), "its random states are not a list"),
    "random of another type": (change(["random", 0], 7), "random state of process 0 cannot be restored"),
    "torch's random state is cut": (change(["random", 0, "torch"], lambda old: old[:9]), "random state of process 0"),
    "python's random state is text": (change(["random", 0, "python"], "text"), "random state of process 0"),
    "more processes": (change(["random"], lambda old: old * 2), "run on 2 processes, this one has 1"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_state_is_one_line(tmp_path, accelerator, kind):
    module, optimizer = net()
    file = written(tmp_path, module, optimizer, accelerator, {"update": 1})
    apply, reason = FOREIGN[kind]
    state = torch.load(file, weights_only=True)
    apply(state)
    resave(file, state)
    if kind.endswith(("type", "cut", "text")) and "random" in kind:  # found last, when the weights are in already
        with pytest.raises(UserError, match=reason):
            restored(file, module, optimizer)
    else:
        assert reason in refusal(file, module, optimizer)


def test_a_state_of_another_model_is_refused(tmp_path, accelerator):
    file = written(tmp_path, *net(), accelerator, {"update": 1})
    assert "objective.0.weight is not a torch.float32 tensor of shape (4, 2)" in refusal(file, *net(width=4))


# -- folders


def test_a_model_folder_replaces_the_older_one(tmp_path):
    save(tmp_path / "last", "one", state={"progress": 1})
    assert torch.load(tmp_path / "last" / STATE) == {"progress": 1}
    assert (tmp_path / "last" / CHECKSUM).is_file()
    save(tmp_path / "last", "two")
    assert {path.name for path in (tmp_path / "last").iterdir()} == {"model", "processor", "config.yaml"}
    assert (tmp_path / "last" / "model").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_failed_save_leaves_the_previous_folder(tmp_path):
    save(tmp_path / "last", "one")
    with pytest.raises(OSError, match="no space"):
        save_model(tmp_path / "last", Part("model", "two"), Part("processor", None), "a: 1\n")
    assert (tmp_path / "last" / "model").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
