"""Relations between two objects of an image, and the wearers of garments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cmmasksd.data.expressions.instances import Instance
from cmmasksd.data.expressions.shapes import Shape, contains, enclosed, overlap, resting, rim, touch
from cmmasksd.data.expressions.words import (
    BOARDS,
    BODY,
    CARRIED,
    GROUNDED,
    MOUNTS,
    ON_SEATS,
    ON_TABLES,
    PERSONS,
    SEATS,
    WORN,
)


class Region(NamedTuple):
    """An annotated region and its measured shape."""

    instance: Instance
    shape: Shape


def relations(region: Region, anchor: Region, side: float, *, vague: bool) -> Iterator[tuple[str, bool]]:
    """The relations in which an object might be said to stand to another, and whether it surely does.

    Args:
        region, anchor: the object and the other one.
        side: longer side of the image in pixels.
        vague: it is not known what the region holds.
    """
    name, other = region.instance.category, anchor.instance.category
    a, b = region.shape, anchor.shape
    (ax, ay), (bx, by) = a.centres[0], b.centres[0]
    sizes = [(s.box[2] - s.box[0], s.box[3] - s.box[1]) for s in (a, b)]
    (aw, ah), (bw, bh) = sizes
    shared_x = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    shared_y = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    worn = WORN | BODY
    apart = name not in worn and other not in worn and not {name, other} <= CARRIED | PERSONS
    near = 0.03 * side
    for axis, sign, relation in ((0, 1, "left"), (0, -1, "right"), (1, 1, "above"), (1, -1, "below")):
        gap = max((q[axis] - p[axis]) * sign for p, q in zip(a.centres, b.centres, strict=True))
        edge = (b.box[axis + 2] - a.box[axis]) if sign > 0 else (a.box[axis + 2] - b.box[axis])
        if not (gap > -near or (vague and edge > 0)):
            continue
        shared, across, least = (shared_x, shared_y, (ah, bh)) if axis == 0 else (shared_y, shared_x, (aw, bw))
        along = (aw, bw) if axis == 0 else (ah, bh)
        distance, sideways = (abs(bx - ax), abs(by - ay)) if axis == 0 else (abs(by - ay), abs(bx - ax))
        surely = apart and gap > 0 and shared <= 0.15 * min(along) and across >= 0.3 * min(least)
        surely = surely and sideways <= (0.7 if axis == 0 else 0.5) * distance
        yield relation, surely and (axis == 0 or not {name, other} & GROUNDED)
    gap = max(-shared_x, -shared_y)
    if gap <= 0.25 * side:
        level = abs(a.box[3] - b.box[3]) <= 0.2 * max(ah, bh) and shared_y >= 0.6 * min(ah, bh)
        close = -0.15 * min(aw, bw) <= -shared_x <= min(0.3 * min(aw, bw), 0.06 * side)
        yield "next to", apart and level and close and 1 / 6 <= a.area / b.area <= 6
    if gap <= near:
        yield "on", not vague and _on(region, anchor, side)
    if shared_x >= -near and other == "umbrella":
        roof = b.box[1] <= a.box[1] + 0.1 * ah and b.box[3] <= a.box[1] + 0.5 * ah and bw >= 0.8 * aw
        yield "under", name in PERSONS and roof and shared_x >= 0.8 * aw and gap <= 0
    orders = region.instance.order, anchor.instance.order
    if gap <= near:
        known = None not in orders and orders[0] != orders[1]
        touching = known and apart and touch(region.instance.mask, anchor.instance.mask, a, b)
        for relation, first in (("in front of", 0), ("behind", 1)):
            if not known or orders[first] < orders[1 - first]:  # type: ignore[operator]
                yield relation, touching


def _on(region: Region, support: Region, side: float) -> bool:
    """Whether an object surely lies, sits or stands on another."""
    name, other = region.instance.category, support.instance.category
    a, b = region.shape, support.shape
    x = a.centres[0][0]
    if not b.box[0] <= x <= b.box[2]:
        return False
    height = b.box[3] - b.box[1]
    masks = region.instance.mask, support.instance.mask
    if (name in ON_SEATS and other in SEATS) or (name in ON_TABLES and other == "dining table"):
        return a.box[3] <= b.box[3] - 0.03 * height and resting(*masks, a) >= 0.5
    if name in PERSONS and other in MOUNTS:
        above = a.box[1] < b.box[1] + 0.1 * height and a.box[3] <= b.box[3] - 0.08 * height
        return above and enclosed(*masks, a) >= 0.2
    if name in PERSONS and other in BOARDS:
        tall = a.box[3] - a.box[1]
        low = b.centres[0][1] > a.box[1] + 0.8 * tall and b.box[3] - b.box[1] < 0.5 * tall
        return low and a.box[3] <= b.box[3] + 0.02 * side and resting(*masks, a) >= 0.15
    return False


def belonging(garment: Region, person: Region, side: float) -> tuple[bool, bool]:
    """Whether a garment or bag surely is a person's, and whether somebody might think so."""
    a, b = garment.shape, person.shape
    grown = 0.03 * side
    box = (b.box[0] - grown, b.box[1] - grown, b.box[2] + grown, b.box[3] + grown)
    if not overlap(a.box, box):
        return False, False
    mask, body = garment.instance.mask, person.instance.mask
    inside = np.count_nonzero(mask & body) / a.area
    if inside >= 0.8:
        return True, True
    edge = rim(mask, a)
    touched = float(body[edge].mean()) if len(edge[0]) else 0.0
    if garment.instance.category in CARRIED:
        tall = b.box[3] - b.box[1]
        body_box = (b.box[0], b.box[1] + 0.1 * tall, b.box[2], b.box[3] - 0.15 * tall)
        held = garment.instance.category != "suitcase" and contains(body_box, a.centres[1])
        return touched >= 0.4 and held, True
    return touched >= 0.5 and all(contains(b.box, centre) for centre in a.centres), True
