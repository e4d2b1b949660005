"""Attributes and positions of a scene's objects, and the fraction of each that others hide."""

from __future__ import annotations

import math
import random

import numpy as np

from cmmasksd.data.scenes.drawing import footprint
from cmmasksd.data.scenes.vocabulary import HELD_OUT, MIN_VISIBLE, SIZES, VALUES, SceneObject


def below(draw: random.Random, n: int) -> int:
    """`draw.randrange(n)` without its checks, which take longer than the draw."""
    bits = n.bit_length()
    value = draw.getrandbits(bits)
    while value >= n:
        value = draw.getrandbits(bits)
    return value


def _draw_attributes(draw: random.Random, split: str, earlier: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Attributes of the next object: in 3 of 4 cases an earlier one's with one or two changed, as a distractor."""
    held_out_wanted = split == "testB" and draw.random() < 0.6
    while True:
        if earlier and draw.random() < 0.75:
            values = list(earlier[below(draw, len(earlier))])
            changes = (1, 1, 2)[below(draw, 3)]
            changed = [below(draw, 4)]
            if changes == 2:
                other = below(draw, 3)
                changed.append(3 if other == changed[0] else other)
            for attribute in changed:
                known = VALUES[attribute]
                values[attribute] = known[below(draw, len(known))]
        else:
            values = [known[below(draw, len(known))] for known in VALUES]
        held_out = (values[2], values[3]) in HELD_OUT
        if held_out == held_out_wanted or split == "pretrain" or (split == "testB" and not held_out_wanted):
            return tuple(values)


def hidden_fraction(back: SceneObject, front: SceneObject) -> float:
    """Fraction of the pixels of `back` that `front` covers."""
    dy, dx = front.y - back.y, front.x - back.x
    reach = back.radius + front.radius + 2
    if abs(dy) > reach or abs(dx) > reach:
        return 0.0
    under, pixels = footprint(back.shape, back.radius, back.turn)
    over, _ = footprint(front.shape, front.radius, front.turn)
    top, left = dy + back.radius - front.radius, dx + back.radius - front.radius
    n, m = under.shape[0], over.shape[0]
    a = under[max(0, top) : min(n, top + m), max(0, left) : min(n, left + m)]
    b = over[max(0, -top) : min(m, n - top), max(0, -left) : min(m, n - left)]
    return int(np.count_nonzero(a & b)) / pixels


def lay_out(draw: random.Random, split: str, scene_size: int) -> tuple[list[SceneObject], dict[tuple[int, int], float]]:
    """Objects from back to front, and the hidden fraction of back by overlapping (back, front) indices."""
    objects: list[SceneObject] = []
    attributes: list[tuple[str, ...]] = []
    discs: list[tuple[int, int, int]] = []
    hidden: dict[tuple[int, int], float] = {}
    covered: set[int] = set()
    hypot = math.hypot
    for _ in range(3 + below(draw, 8)):
        values = _draw_attributes(draw, split, attributes)
        size, fill, colour, shape = values
        radius = max(3, round(SIZES[size] * scene_size / 128) + below(draw, 3) - 1)
        turn = below(draw, 5) - 2
        room = scene_size - 2 * radius - 2
        for _ in range(12):
            x, y = radius + 1 + below(draw, room), radius + 1 + below(draw, room)
            near = []
            for index, (left, top, extent) in enumerate(discs):
                distance = hypot(x - left, y - top) / (radius + extent)
                if distance < 1:
                    if distance < 0.7 or index in covered:
                        break  # too close, or a second object would cover it
                    near.append(index)
            else:
                thing = SceneObject(shape, colour, size, fill, x, y, radius, turn)
                fractions = {(index, len(objects)): hidden_fraction(objects[index], thing) for index in near}
                if all(fraction <= 1 - MIN_VISIBLE for fraction in fractions.values()):
                    hidden |= fractions
                    covered.update(near)
                    objects.append(thing)
                    attributes.append(values)
                    discs.append((x, y, radius))
                    break
    return objects, hidden
