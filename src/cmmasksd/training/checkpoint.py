"""What a run leaves on disk, and how it goes on.

    out/config.yaml       the resolved configuration
    out/metrics.jsonl     one row per log step and per validation
    out/last/, out/best/  a model and its processor (see `save_pretrained`), with config.yaml beside them, and
                          distillation.safetensors: what the masked branches own (the mask token), for `explain` alone
    out/last/state.pt     everything else that resuming needs: objective, optimiser, place in the run, best score,
                          random states. Tensors and plain values only: it is read without unpickling any object.

Folders are written aside and renamed into place, so that a crash while writing leaves the previous one.
"""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cmmasksd.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

STATE = "state.pt"
WEIGHTS = "distillation.safetensors"


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


def load_state(
    file: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """Put a run back to where `save_state` left it; return its `progress`.

    Raises:
        UserError: when the file is damaged, is of another model, or of another number of processes.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if len(state["random"]) != accelerator.num_processes:
            raise UserError(
                f"{file} is of a run on {len(state['random'])} processes, this one has {accelerator.num_processes}: "
                "resume with as many"
            )
        whole = StateDictOptions(full_state_dict=True, strict=True)
        set_state_dict(
            objective,
            optimizer,
            model_state_dict=state["objective"],
            optim_state_dict=state["optimizer"],
            options=whole,
        )
        set_random_state(state["random"][accelerator.process_index])
        return state["progress"]
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot resume from {file}: {reason}. Start afresh without --resume, in another folder"
        ) from error
