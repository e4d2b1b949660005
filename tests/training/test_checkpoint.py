"""Checkpoints: a crash while writing leaves the previous one, and a state file can neither lie nor run code."""

import os
import pickle
import random

import pytest
import torch
from torch import nn

from cmmasksd.errors import UserError
from cmmasksd.training.checkpoint import (
    STATE,
    load_state,
    random_state,
    recover,
    save_model,
    save_state,
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


def save(folder, text, **how):
    save_model(folder, Part("model", text), Part("processor", text), "a: 1\n", **how)


# -- state


def test_state_round_trip_continues_as_if_nothing_had_happened(tmp_path, accelerator):
    module, optimizer = net()
    save_state(tmp_path / STATE, module, optimizer, accelerator, {"update": 7, "best": 0.5})
    for _ in range(3):
        step(module, optimizer)
    drawn = torch.rand(3), random.random()

    other, other_optimizer = net(seed=5)
    assert load_state(tmp_path / STATE, other, other_optimizer, accelerator) == {"update": 7, "best": 0.5}
    assert [group["peak_lr"] for group in other_optimizer.param_groups] == [1e-2, 1e-3]
    for _ in range(3):
        step(other, other_optimizer)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]


def test_random_state_round_trip():
    state = random_state()
    first = torch.rand(2).tolist(), random.random()
    set_random_state(state)
    assert (torch.rand(2).tolist(), random.random()) == first


def test_state_file_holds_no_objects(tmp_path, accelerator):
    save_state(tmp_path / STATE, *net(), accelerator, {"update": 1})
    assert set(torch.load(tmp_path / STATE, weights_only=True)) == {"objective", "optimizer", "random", "progress"}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_state_is_refused_and_not_run(tmp_path, accelerator):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump({"random": [1], "objective": Evil()}, file)
    torch.save({"random": [1], "objective": Evil()}, tmp_path / "zipped.pt")
    for name in ("plain.pt", "zipped.pt"):
        with pytest.raises(UserError, match=rf"cannot resume from .*{name}"):
            load_state(tmp_path / name, *net(), accelerator)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("damage", ["short", "empty", "text", "another model", "lacks a part", "more processes"])
def test_a_damaged_or_foreign_state_is_one_line(tmp_path, accelerator, damage):
    file = tmp_path / STATE
    module, optimizer = net()
    save_state(file, module, optimizer, accelerator, {"update": 1})
    whole = file.read_bytes()
    if damage == "short":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("not a state")
    elif damage == "another model":
        module, optimizer = net(width=4)
    else:
        state = torch.load(file, weights_only=True)
        if damage == "lacks a part":
            del state["optimizer"]
        else:
            state["random"] *= 2
        torch.save(state, file)
    said = "run on 2 processes, this one has 1" if damage == "more processes" else "cannot resume from"
    with pytest.raises(UserError, match=said) as caught:
        load_state(file, module, optimizer, accelerator)
    assert "\n" not in str(caught.value)


# -- folders


def test_a_model_folder_replaces_the_older_one(tmp_path):
    (tmp_path / "new.pt").write_bytes(b"state")
    save(tmp_path / "last", "one", state=tmp_path / "new.pt")
    assert (tmp_path / "last" / STATE).read_bytes() == b"state"
    save(tmp_path / "last", "two")
    assert {path.name for path in (tmp_path / "last").iterdir()} == {"model", "processor", "config.yaml"}
    assert (tmp_path / "last" / "model").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_failed_save_leaves_the_previous_folder(tmp_path):
    save(tmp_path / "last", "one")
    with pytest.raises(OSError, match="no space"):
        save_model(tmp_path / "last", Part("model", "two"), Part("processor", None), "a: 1\n")
    assert (tmp_path / "last" / "model").read_text() == "one"
    save(tmp_path / "last", "three")  # what the failure left behind is in nobody's way
    assert (tmp_path / "last" / "processor").read_text() == "three"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_kill_between_the_renames_is_recovered(tmp_path, monkeypatch):
    save(tmp_path / "last", "one")
    real = type(tmp_path).rename

    def rename(path, target):
        if path.name == "last.new":
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "last", "two")
    assert not (tmp_path / "last").exists()
    recover(tmp_path / "last")
    assert (tmp_path / "last" / "model").read_text() == "one"
    save(tmp_path / "last", "three")
    recover(tmp_path / "last")
    assert (tmp_path / "last" / "model").read_text() == "three"


def test_recover_without_anything_to_recover(tmp_path):
    recover(tmp_path / "last")
    assert not list(tmp_path.iterdir())
