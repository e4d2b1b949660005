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

import hashlib
import random
import reprlib
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cmmasksd.errors import UserError, reason

if TYPE_CHECKING:
    from accelerate import Accelerator

    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

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
    model: CMMaskSDModel,
    processor: CMMaskSDProcessor,
    config_yaml: str,
    *,
    masked: dict[str, Tensor] | None = None,
    state: Path | None = None,
) -> None:
    """Write a model folder, replacing an older one at once.

    Args:
        masked: weights of the masked branches that are not the model's (`MaskedSelfDistillation.own_weights`).
        state: a file of `save_state` to move into the folder.
    """
    aside, old = folder.with_name(folder.name + ".new"), _old(folder)
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    (aside / "config.yaml").write_text(config_yaml, encoding="utf-8")
    if masked:
        save_file(masked, aside / WEIGHTS)
    if state is not None:
        state.replace(aside / STATE)
        (aside / CHECKSUM).write_text(f"{_sha256(aside / STATE)}  {STATE}\n", encoding="ascii")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put the previous folder back where `save_model` was killed between its two renames."""
    if not folder.exists() and _old(folder).exists():
        with suppress(FileNotFoundError):  # another process was faster
            _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def save_state(
    file: Path,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    progress: dict[str, Any],
) -> None:
    """Write all that resuming needs. Every process must call it; the main one writes.

    Args:
        progress: plain values: place in the run, best score.
    """
    from accelerate.utils import gather_object
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(objective, optimizer, options=whole)
    states = gather_object([random_state()])
    if accelerator.is_main_process:
        torch.save({"objective": weights, "optimizer": moments, "random": states, "progress": progress}, file)


def read_state(file: Path, processes: int) -> dict[str, Any]:
    """Read what `save_state` wrote, unchanged since then.

    Args:
        file: state.pt, with its checksum beside it.
        processes: number of processes of this run.

    Returns:
        "objective", "optimizer", "random", "progress"; what is in them is not checked.

    Raises:
        UserError: when the file is damaged, was not written by `save_model`, or is of another number of processes.
    """
    try:
        expected = file.with_name(CHECKSUM).read_text(encoding="ascii")
    except (OSError, ValueError):
        raise refused(file, f"there is no {CHECKSUM} beside it, as runs of this version have") from None
    if expected.split()[:1] != [_sha256(file)]:
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
            f"{file} is of a run on {len(state['random'])} processes, this one has {processes}: resume with as many"
        )
    return state


def restore_state(
    state: dict[str, Any], objective: nn.Module, optimizer: torch.optim.Optimizer, rank: int, file: Path
) -> None:
    """Put weights, moments and random generators back. Every process must call it.

    Args:
        state: of `read_state`; it is used up.
        objective, optimizer: as they were built for this run; the optimizer keeps its own settings, such as the
            peak rates (the current ones are restored).
        rank: index of this process.
        file: where the state comes from, for messages.

    Raises:
        UserError: when the state is of another model, or holds values that are not finite.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    # torch replaces a weight that is missing by the fresh one: what is there is compared before it is asked.
    weights, moments = get_state_dict(objective, optimizer)
    for name, expected in (("objective", weights), ("optimizer", moments)):
        if misfit := _misfit(expected, state[name], name):
            raise refused(file, misfit)
        if bad := _not_finite(state[name], name):
            raise refused(file, f"{bad} holds values that are not finite")
    kept = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    set_state_dict(
        objective,
        optimizer,
        model_state_dict=state["objective"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True, strict=True),
    )
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)
    try:
        set_random_state(state["random"][rank])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
        raise refused(file, f"the random state of process {rank} cannot be restored") from None


def refused(file: Path, why: str) -> UserError:
    """The error for a state that a run cannot resume from."""
    return UserError(f"cannot resume from {file}: {why}. Start afresh without --resume, in another folder")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _misfit(expected: Any, found: Any, name: str) -> str | None:
    """Where nested states differ in keys, types, names or shapes; None: nowhere. Numbers may differ."""
    if isinstance(expected, Tensor):
        kind = (expected.shape, expected.dtype, expected.layout)
        if isinstance(found, Tensor) and (found.shape, found.dtype, found.layout) == kind and not found.is_meta:
            return None
        return f"{name} is not a {expected.dtype} tensor of shape {tuple(expected.shape)}"
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return f"{name} is a {type(found).__name__}, not a dict"
        if missing := [key for key in expected if key not in found]:
            return f"{name} lacks {missing[0]}"
        if unknown := [key for key in found if key not in expected]:
            return f"{name} holds {reprlib.repr(unknown[0])}, which this model has not"
        pairs = [(expected[key], found[key], f"{name}.{key}") for key in expected]
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            return f"{name} is not a list of {len(expected)}"
        pairs = [(a, b, f"{name}[{nth}]") for nth, (a, b) in enumerate(zip(expected, found, strict=True))]
    else:
        same = type(found) is type(expected) and (not isinstance(expected, str) or found == expected)
        return None if same else f"{name} is {reprlib.repr(found)}, unlike this run's {expected!r}"
    return next(filter(None, (_misfit(*pair) for pair in pairs)), None)


def _not_finite(state: Any, name: str) -> str | None:
    """Name of the first tensor with a NaN or an infinity; None: there is none."""
    if isinstance(state, Tensor):
        return None if state.isfinite().all() else name
    if isinstance(state, dict):
        return next(filter(None, (_not_finite(value, f"{name}.{key}") for key, value in state.items())), None)
    return None
