"""Segmentation and distillation terms: pure functions of logits."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cmmasksd.model.presence import presence


def segmentation_loss(logits: Tensor, target: Tensor, kind: Literal["bce_dice", "bce"] = "bce_dice") -> Tensor:
    """Ground-truth loss, a scalar.

    Args:
        logits: (B, h, w). target: (B, h, w) in [0, 1], the fraction of each cell that the object covers.
        kind: mean binary cross-entropy, alone or plus the mean Dice loss (Milletari et al. 2016, per expression that
            names something).
    """
    logits = logits.float()
    bce = F.binary_cross_entropy_with_logits(logits, target)
    if kind == "bce":
        return bce
    probability = logits.sigmoid()
    overlap = (probability * target).sum((1, 2))
    area = target.sum((1, 2))
    dice, named = 1 - (2 * overlap + 1) / (probability.sum((1, 2)) + area + 1), area > 0
    return bce + (dice * named).sum() / named.sum().clamp(min=1)


def presence_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of `presence` and whether the image holds what the sentence names, a scalar.

    Args:
        logits: (B, h, w). target: (B, h, w) in [0, 1]; empty where the sentence names nothing.
    """
    probability = presence(logits).clamp(1e-4, 1 - 1e-4)
    return F.binary_cross_entropy(probability, (target.flatten(1).amax(1) > 0).float())


def distillation_loss(
    student: Tensor, teacher: Tensor, kind: Literal["kl", "mse", "soft_bce"] = "kl", temperature: float = 1.0
) -> Tensor:
    """Distance of a masked branch from the main one, KD(student || sg(teacher)), a scalar.

    Args:
        student, teacher: (B, h, w) logits.
        kind: "kl", KL(teacher || student) of Bernoulli distributions; "soft_bce", the same plus the teacher's entropy;
            "mse", squared error of the probabilities. All are means over pixels.
        temperature: divides the logits of "kl" and "soft_bce", whose loss is multiplied by its square.
    """
    student, teacher = student.float(), teacher.detach().float()
    if kind == "mse":
        return F.mse_loss(student.sigmoid(), teacher.sigmoid())
    student, teacher = student / temperature, teacher / temperature
    target = teacher.sigmoid()
    loss = F.binary_cross_entropy_with_logits(student, target)
    if kind == "kl":  # minus the entropy of the teacher: zero when the two agree
        loss = loss - F.binary_cross_entropy_with_logits(teacher, target)
    return loss * temperature**2
