"""Parameter groups and the learning-rate schedule.

CLIP trains at a fraction of the rate of the new layers. The rate is a pure function of the update (warm-up, then
cosine) and is written into every group before every update: there is nothing to restore, and no group can miss its
first rate (in other RIS code, groups with `initial_lr` but no `lr` trained CLIP ten times too fast in the first epoch).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from cmmasksd.model.towers.families import FAMILIES


def parameter_groups(module: nn.Module, *, lr: float, clip_lr_scale: float, weight_decay: float) -> list[dict]:
    """Groups for AdamW: {CLIP, new layers} x {decayed, not decayed}.

    Args:
        module: the objective; parameters with a family's name as a part of theirs belong to the backbone.
        lr: peak rate of the new layers.
        clip_lr_scale: peak rate of the backbone as a fraction of `lr`.
        weight_decay: weight decay of matrices; vectors (biases, norms, tokens) and embeddings have none.

    Returns:
        Groups with "name", "params", "lr", "peak_lr" and "weight_decay"; empty ones are left out.
    """
    groups: dict[str, dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        backbone = not FAMILIES.keys().isdisjoint(name.split("."))
        decays = parameter.ndim > 1 and "embedding" not in name
        peak = lr * clip_lr_scale if backbone else lr
        key = ("clip" if backbone else "new") + ("" if decays else "_no_decay")
        decay = weight_decay if decays else 0.0
        group = {"name": key, "params": [], "lr": peak, "peak_lr": peak, "weight_decay": decay}
        groups.setdefault(key, group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def rate_scale(update: int, total: int, *, warmup: int, final: float) -> float:
    """Fraction of the peak rate at an update (from 0): linear warm-up, then a cosine from 1 to `final`."""
    if update < warmup:
        return (update + 1) / warmup
    progress = (update - warmup) / max(1, total - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rates(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set every group's rate to its peak times `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale


def zero_moments(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Restart the optimizer's moments and step counts of some parameters."""
    for parameter in parameters:
        for moment in optimizer.state.get(parameter, {}).values():
            moment.zero_()
