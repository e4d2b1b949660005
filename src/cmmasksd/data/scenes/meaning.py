"""Which words are true of which objects of a scene. Sets of objects are bit masks in plain ints.

Each location and each relation has two sets: the objects that it is strictly true of, and the larger, loose set of
objects that somebody might use it for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from cmmasksd.data.scenes.layout import hidden_fraction
from cmmasksd.data.scenes.vocabulary import SceneObject

_SPANS = {
    # name: (axis, from, to) in fractions of the scene's side, strict and loose
    "left": ((0, 0.0, 0.42), (0, 0.0, 0.52)),
    "right": ((0, 0.58, 1.0), (0, 0.48, 1.0)),
    "top": ((1, 0.0, 0.42), (1, 0.0, 0.52)),
    "bottom": ((1, 0.58, 1.0), (1, 0.48, 1.0)),
    "middle column": ((0, 0.36, 0.64), (0, 0.28, 0.72)),
    "middle row": ((1, 0.36, 0.64), (1, 0.28, 0.72)),
}
ZONES = {
    **{name: (name,) for name in ("left", "right", "top", "bottom")},
    **{f"{row} {column}": (row, column) for row in ("top", "bottom") for column in ("left", "right")},
    "middle": ("middle row", "middle column"),
}
EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}
_MARGIN = 0.06  # least distance of neighbours that an order compares, as a fraction of the scene's side
RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
    "behind": "partly behind",
    "front": "in front of",
}


class Meaning:
    """For every word of a scene, the set of objects (bits) that it is true of.

    A location or relation that is strictly true of a target names it, together with attributes, when no other object of
    its loose set has them all.

    Args:
        objects: the objects, from back to front.
        hidden: fraction of back that front hides, by (back, front) indices.
        scene_size: side of the scene in pixels.
    """

    def __init__(self, objects: Sequence[SceneObject], hidden: dict[tuple[int, int], float], scene_size: int) -> None:
        self.objects, self.hidden, self.scene_size = objects, hidden, scene_size
        self.margin = _MARGIN * scene_size
        having: dict[str, int] = {}
        for index, thing in enumerate(objects):
            for value in thing.attributes:
                having[value] = having.get(value, 0) | 1 << index
        self._having = having
        self._sharing: dict[int, list[int]] = {}
        self._related: dict[int, tuple[tuple[str, int, int], ...]] = {}
        self._anchors: dict[int, list[tuple[str, int, int]]] = {}
        self._zones: dict[str, tuple[int, int]] = {}

    def zones(self) -> dict[str, tuple[int, int]]:
        """The objects in each region of the image: (strict, loose) sets."""
        if not self._zones:
            centres = [o.x for o in self.objects], [o.y for o in self.objects]
            spans = {}
            for name, bounds in _SPANS.items():
                sets = []
                for axis, low, high in bounds:
                    low, high = low * self.scene_size, high * self.scene_size
                    sets.append(sum([1 << i for i, centre in enumerate(centres[axis]) if low <= centre <= high]))
                spans[name] = sets
            for name, parts in ZONES.items():
                strict = loose = -1
                for part in parts:
                    strict, loose = strict & spans[part][0], loose & spans[part][1]
                self._zones[name] = (strict, loose)
        return self._zones

    def sharing(self, target: int) -> list[int]:
        """The objects that share the target's attributes, for each of the 16 subsets of ATTRIBUTES (as bits)."""
        table = self._sharing.get(target)
        if table is None:
            table = [(1 << len(self.objects)) - 1]
            for value in self.objects[target].attributes:
                having = self._having[value]
                table += [objects & having for objects in table]
            self._sharing[target] = table
        return table

    def second(self, among: int, axis: int, sign: int) -> int | None:
        """The second of `among` (bits) along an axis; None if they are fewer than three or neighbours are too close."""
        order = sorted([((o.y if axis else o.x) * sign, i) for i, o in enumerate(self.objects) if among >> i & 1])
        if len(order) < 3 or any(b[0] - a[0] < self.margin for a, b in pairwise(order)):
            return None
        return order[1][1]

    def outermost(self, target: int, axis: int, sign: int) -> int:
        """The objects that do not clearly come after the target along an axis: the loose set of an extreme."""
        first, margin = self.objects[target], self.margin
        if axis:
            return sum(1 << i for i, o in enumerate(self.objects) if (o.y - first.y) * sign < margin)
        return sum(1 << i for i, o in enumerate(self.objects) if (o.x - first.x) * sign < margin)

    def related(self, anchor: int) -> tuple[tuple[str, int, int], ...]:
        """The relations of objects to the anchor: (relation, strict set, loose set)."""
        if anchor in self._related:
            return self._related[anchor]
        centre = self.objects[anchor]
        near, far = 0.04 * self.scene_size, 0.09 * self.scene_size
        strict, loose = dict.fromkeys(RELATIONS, 0), dict.fromkeys(RELATIONS, 0)
        for i, o in enumerate(self.objects):
            if i == anchor:
                continue
            bit, dx, dy = 1 << i, o.x - centre.x, o.y - centre.y
            width, height = abs(dx), abs(dy)
            if height <= 1.6 * width + near:
                name = "left" if dx < 0 else "right"
                loose[name] |= bit
                if width < near:  # nearly above or below: loosely, it is on either side
                    loose["right" if dx < 0 else "left"] |= bit
                elif width >= far and height <= 0.8 * width:
                    strict[name] |= bit
            if width <= 1.6 * height + near:
                name = "above" if dy < 0 else "below"
                loose[name] |= bit
                if height < near:
                    loose["below" if dy < 0 else "above"] |= bit
                elif height >= far and width <= 0.8 * height:
                    strict[name] |= bit
        for (back, front), fraction in self.hidden.items():
            if anchor in (back, front):
                name, bit = ("behind", 1 << back) if front == anchor else ("front", 1 << front)
                loose[name] |= bit
                if fraction >= 0.06:
                    strict[name] |= bit
        self._related[anchor] = tuple([(name, objects, loose[name]) for name, objects in strict.items() if objects])
        return self._related[anchor]

    def touching(self, relation: str, anchor: int) -> int:
        """Objects with at least one pixel behind or in front of the anchor.

        These are a few more than in `hidden`: corners of squares and triangles lie outside of their discs.
        """
        other = self.objects[anchor]
        if relation == "behind":
            return sum(1 << i for i, o in enumerate(self.objects[:anchor]) if hidden_fraction(o, other))
        return sum(1 << i for i, o in enumerate(self.objects) if i > anchor and hidden_fraction(other, o))

    def anchors(self, target: int) -> list[tuple[str, int, int]]:
        """The relations that are strictly true of the target: (relation, anchor, loose set).

        An anchor is an object that its attributes name.
        """
        if target not in self._anchors:
            attributes = [o.attributes for o in self.objects]
            self._anchors[target] = [
                (relation, anchor, loose)
                for anchor, values in enumerate(attributes)
                if anchor != target and attributes.count(values) == 1
                for relation, strict, loose in self.related(anchor)
                if strict >> target & 1
            ]
        return self._anchors[target]
