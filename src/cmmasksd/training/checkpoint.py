"""Checkpoint layout, and how a run resumes.

    out/config.yaml       the resolved configuration
    out/metrics.jsonl     one row per log step and per validation
    out/last/, out/best/  a model and its processor (see `save_pretrained`), with config.yaml beside them, and
                          distillation.safetensors: what the masked branches own (the mask token), for `explain` alone
    out/last/state.pt     everything else that resuming needs: objective, optimiser, place in the run, best score,
                          random states. Tensors and plain values only: it is read without unpickling any object.
    out/last/state.pt.sha256  its checksum, in the format of `sha256sum`

Folders are written aside and renamed into place, so that a crash while writing leaves the previous one.
"""

from __future__ import annotations

import random
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cmmasksd.errors import UserError, reason
from cmmasksd.files import sha256, whole_folder
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.trained import TrainedModel

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE = "state.pt"
CHECKSUM = f"{STATE}.sha256"
WEIGHTS = "distillation.safetensors"


def require_resumable(state: Path, out: Path, resume: bool, option: str) -> None:
    """Check that a run is started where there is none, and resumed where there is one: none is ever overwritten.

    Args:
        state: the file that a run is resumed from.
        out: folder of the run.
        resume: whether it is to be resumed.
        option: name of the option for `out`.

    Raises:
        UserError: `out` holds a run and `resume` is false, or holds none and it is true.
    """
    if resume and not state.is_file():
        raise UserError(f"there is no run to resume in {out} (no {state}): start one without --resume")
    if not resume and state.exists():
        raise UserError(f"{out} already holds a run: resume it with --resume, or choose another folder with {option}")


def random_state() -> dict[str, Any]:
    """The random generators of this process."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the random generators of this process back."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def save_model(
    folder: Path,
    model: TrainedModel,
    processor: CMMaskSDProcessor,
    config_yaml: str,
    *,
    masked: dict[str, Tensor] | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Write a model folder, replacing an older one at once.

    Args:
        masked: weights of the masked branches that are not the model's (`MaskedSelfDistillation.own_weights`).
        state: what resuming needs (`run_state`); None: the folder cannot be resumed from.
    """
    with whole_folder(folder) as new:
        model.save_pretrained(new)
        processor.save_pretrained(new)
        (new / "config.yaml").write_text(config_yaml, encoding="utf-8")
        if masked:
            save_file(masked, new / WEIGHTS)
        if state is not None:
            torch.save(state, new / STATE)
            (new / CHECKSUM).write_text(f"{sha256(new / STATE)}  {STATE}\n", encoding="ascii")


def run_state(
    objective: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, progress: dict[str, Any]
) -> dict[str, Any]:
    """All that resuming needs. Every process must call it; the main one writes it with `save_model`.

    Args:
        progress: the place of the run (`Progress.as_dict`).

    Returns:
        "objective", "optimizer", "random" and "progress".
    """
    from accelerate.utils import gather_object
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(objective, optimizer, options=whole)
    states = gather_object([random_state()])
    return {"objective": weights, "optimizer": moments, "random": states, "progress": progress}


def read_state(file: Path, processes: int) -> dict[str, Any]:
    """Read a state, and check that it has not changed since it was written.

    Args:
        file: state.pt, with its checksum beside it.
        processes: number of processes of this run.

    Returns:
        "objective", "optimizer", "random" and "progress"; their contents are not checked.

    Raises:
        UserError: the file is damaged, was not written by `save_model`, or is of another number of processes.
    """
    try:
        expected = file.with_name(CHECKSUM).read_text(encoding="ascii")
    except (OSError, ValueError):
        raise refused(file, f"there is no {CHECKSUM} beside it, as runs of this version have") from None
    if expected.split()[:1] != [sha256(file)]:
        raise refused(file, f"its bytes do not match {CHECKSUM}, so it is damaged")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a foreign file
        raise refused(file, reason(error)) from error
    if not isinstance(state, dict) or state.keys() != {"objective", "optimizer", "random", "progress"}:
        raise refused(file, "it does not hold objective, optimizer, random and progress")
    if not isinstance(state["random"], list):
        raise refused(file, "its random states are not a list")
    if len(state["random"]) != processes:
        raise UserError(
            f"{file} is from a run on {len(state['random'])} processes, this one has {processes}: resume with as many"
        )
    return state


def restore_state(
    state: dict[str, Any], objective: nn.Module, optimizer: torch.optim.Optimizer, rank: int, file: Path
) -> None:
    """Put weights, moments and random generators back. Every process must call it.

    Args:
        state: what `read_state` returned; it is used up.
        objective, optimizer: as they were built for this run. The optimizer keeps the settings of this run, such as the
            peak rates; the current rates are restored.
        rank: index of this process.
        file: where the state comes from, for messages.

    Raises:
        UserError: the state is of another model, or holds values that no run has.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    # torch keeps the fresh value of a weight that the state lacks, so the state is compared with the fresh one first.
    weights, moments = get_state_dict(objective, optimizer)
    for name, expected in (("objective", weights), ("optimizer", moments)):
        if problem := _misfit(expected, state[name], name) or _impossible(state[name], name):
            raise refused(file, problem)
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    set_state_dict(
        objective,
        optimizer,
        model_state_dict=state["objective"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True, strict=True),
    )
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    try:
        set_random_state(state["random"][rank])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
        raise refused(file, f"the random state of process {rank} cannot be restored") from None


def refused(file: Path, why: str) -> UserError:
    """The error for a state that a run cannot resume from."""
    return UserError(f"cannot resume from {file}: {why}. Start afresh without --resume, in another folder")


def _misfit(expected: Any, given: Any, name: str) -> str | None:
    """Where nested states differ in keys, types, names or shapes; None: nowhere. Numbers may differ."""
    if isinstance(expected, Tensor):
        kind = (expected.shape, expected.dtype, expected.layout)
        if isinstance(given, Tensor) and (given.shape, given.dtype, given.layout) == kind and not given.is_meta:
            return None
        return f"{name} is not a {expected.dtype} tensor of shape {tuple(expected.shape)}"
    if isinstance(expected, dict):
        if not isinstance(given, dict):
            return f"{name} is a {type(given).__name__}, not a dict"
        if missing := [key for key in expected if key not in given]:
            return f"{name} lacks {missing[0]}"
        if unknown := [key for key in given if key not in expected]:
            return f"{name} holds {reprlib.repr(unknown[0])}, which this model does not have"
        pairs = [(expected[key], given[key], f"{name}.{key}") for key in expected]
    elif isinstance(expected, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(expected):
            return f"{name} is not a list of {len(expected)}"
        pairs = [(a, b, f"{name}[{index}]") for index, (a, b) in enumerate(zip(expected, given, strict=True))]
    else:
        same = type(given) is type(expected) and (not isinstance(expected, str) or given == expected)
        return None if same else f"{name} is {reprlib.repr(given)}, unlike this run's {expected!r}"
    return next(filter(None, (_misfit(*pair) for pair in pairs)), None)


def _impossible(state: Any, name: str) -> str | None:
    """The first tensor with a value that no run has; None: there is none.

    Nothing is NaN or infinite, and AdamW's number of steps and mean of squares are never negative: it takes roots of
    them, and divides by them.
    """
    if isinstance(state, dict):
        return next(filter(None, (_impossible(value, f"{name}.{key}") for key, value in state.items())), None)
    if not isinstance(state, Tensor):
        return None
    if not state.isfinite().all():
        return f"{name} holds values that are not finite"
    if name.endswith((".step", ".exp_avg_sq")) and (state < 0).any():
        return f"{name} holds negative values"
    return None
