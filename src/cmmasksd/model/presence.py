"""Presence: how sure the model is that the image holds what a sentence names at all.

A pure function of the mask logits, so every model and every export has one. It looks at the cells where the model is
most sure, as many as a small object fills, so a small object that is found counts as much as a large one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads MIN_SCORE, and exported models run without torch
    import numpy as np
    from torch import Tensor

MIN_SCORE = 0.0
"""Default of the presence below which a sentence is not found: by default, its mask alone decides."""

SHARE = 256
"""One in this many cells is looked at."""


def presence(logits: Tensor) -> Tensor:
    """The mean probability of the most probable 1/256 of the canvas (at least one cell). Differentiable.

    Args:
        logits: (K, h, w) of the whole canvas, as the decoder returns them.

    Returns:
        (K,) float32 in [0, 1].
    """
    cells = logits.float().flatten(1)
    return cells.topk(max(1, cells.shape[1] // SHARE), dim=1).values.sigmoid().mean(1)


def presence_numpy(logits: np.ndarray) -> np.ndarray:
    """`presence` of exported models: (K, h, w) logits to (K,) float32."""
    import numpy as np

    cells = logits.astype(np.float32).reshape(len(logits), -1)
    count = max(1, cells.shape[1] // SHARE)
    return np.exp(-np.logaddexp(0, -np.partition(cells, -count)[:, -count:])).mean(1)
