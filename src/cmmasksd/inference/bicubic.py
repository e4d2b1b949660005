"""torch's antialiased bicubic resize of bytes, in numpy.

torch computes it in integers with 16-bit weights; they are repeated here, so both give the same pixels to the last bit.
"""

from __future__ import annotations

import numpy as np

from cmmasksd.model.placement import columns_first


def resize_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3) uint8, equal to torch's antialiased bicubic on bytes."""
    steps = [(1, width), (0, height)]
    for axis, target in reversed(steps) if columns_first(image.shape[:2], (height, width)) else steps:
        source = image.shape[axis]
        if source == target:
            continue
        first, weights, precision = _bicubic_weights(source, target)
        lines = np.moveaxis(image, axis, 0)  # (source, …, 3)
        total = np.full((target, *lines.shape[1:]), 1 << (precision - 1), np.int32)
        for tap in range(weights.shape[1]):
            total += weights[:, tap, None, None] * lines[np.minimum(first + tap, source - 1)]
        image = np.moveaxis((total >> precision).clip(0, 255).astype(np.uint8), 0, axis)
    return image


def _bicubic_weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The first source line of each target line (target,), integer weights (target, taps), and their binary places."""
    scale = source / target
    shrink = max(scale, 1.0)
    centre = scale * (np.arange(target) + 0.5)
    first = np.maximum((centre - 2 * shrink + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + 2 * shrink + 0.5).astype(np.int64), source) - first
    tap = np.arange(count.max())
    x = np.abs((first[:, None] + tap - centre[:, None] + 0.5) / shrink)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((x - 5) * x + 8) * x * -0.5 + 2, 0.0))
    weights[tap >= count[:, None]] = 0
    weights /= weights.sum(1, keepdims=True)
    precision = 0
    while precision < 22 and int(0.5 + weights.max() * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    return first, np.trunc(weights * (1 << precision) + np.copysign(0.5, weights)).astype(np.int32), precision
