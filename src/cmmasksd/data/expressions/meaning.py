"""Predicates of the objects of an annotated image. Sets of objects are bit masks in plain ints.

Every predicate has two sets: the strict one holds the objects that clearly have it, the loose one every object of which
somebody might say it. Positions are those of the image as it is seen. Each object has two centres, of its box and of
its mask: strictly both must agree, loosely either is enough.

Regions of which it is not known what they hold (crowds, masks that nobody verified, two masks of one kind on the same
pixels) are in nearly every loose set: whatever could be said of an object there makes a sentence ambiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

import numpy as np

from cmmasksd.data.expressions.colours import (
    MAX_OTHER,
    MIN_SHARE,
    may_be_called,
    measure_colours,
    naming_colours,
    sure_colour,
)
from cmmasksd.data.expressions.instances import Instance
from cmmasksd.data.expressions.relations import Region, belonging, relations
from cmmasksd.data.expressions.shapes import contains, measure_shape, overlap
from cmmasksd.data.expressions.words import BELOW_WAIST, FROM_CHEST, PERSONS, Vocabulary

ZONES = {
    # name: for each axis (0 is x), whether objects lie low (-1), high (1) or in between (0) along it
    "left": {0: -1},
    "right": {0: 1},
    "top": {1: -1},
    "bottom": {1: 1},
    "top left": {0: -1, 1: -1},
    "top right": {0: 1, 1: -1},
    "bottom left": {0: -1, 1: 1},
    "bottom right": {0: 1, 1: 1},
    "middle": {0: 0, 1: 0},
}
ORDERS = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
"""Name -> axis, and 1 where the object comes first along it or -1 where it comes last."""
CORNERS = tuple(name for name, axes in ZONES.items() if len(axes) == 2 and all(axes.values()))
MAX_ORDINAL = 4
_MOST_ORDERED = 6  # objects of a kind that anybody would count along a line


class Meaning:
    """Predicates of the objects of one image.

    Args:
        instances: all annotated regions of the image; none may be empty.
        image: (H, W, 3) uint8 RGB; None where nothing is to be said of colours that the instances do not bring.
        vocabulary: the nouns.
        min_area: share of the image below which an object is not named.
        size: (height, width); needed where there are no instances.

    Attributes:
        nameable: the objects (bits) that a sentence may name.
        vague: the regions (bits) of which it is not known what they hold.
        tiny: the objects (bits) that are too small to be named or counted.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        image: np.ndarray | None = None,
        *,
        vocabulary: Vocabulary | None = None,
        min_area: float = 0.004,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.instances, self.image = list(instances), image
        self.vocabulary = vocabulary or Vocabulary()
        self.height, self.width = size or self.instances[0].mask.shape
        self.side = max(self.height, self.width)
        shapes = [measure_shape(instance.mask) for instance in self.instances]
        if None in shapes:
            raise ValueError(f"instance {shapes.index(None)} has an empty mask: leave it out")
        self.shapes = [shape for shape in shapes if shape is not None]
        self._regions = [Region(*pair) for pair in zip(self.instances, self.shapes, strict=True)]
        self.names = [instance.category for instance in self.instances]
        self._colours: dict[int, dict[str, tuple[float, float]] | None] = {}
        self._nouns: dict[str, tuple[int, int]] = {}
        self._zones: dict[str, tuple[int, int]] = {}
        self._anchors: list[int] | None = None
        self._related: dict[int, list[tuple[str, int, int]]] = {}
        self._belongs: dict[tuple[int, int], tuple[bool, bool]] = {}
        least = min_area * self.height * self.width
        self.tiny = bits(shape.area < least for shape in self.shapes)
        self.vague = bits(instance.crowd or not instance.verified for instance in self.instances) | self._doubled()
        self.vague |= self._misplaced()
        self.nameable = 0
        for index, instance in enumerate(self.instances):
            bit = 1 << index
            if instance.crowd or self.tiny & bit or not (nouns := self.vocabulary.nouns(instance.category)):
                continue
            if not self.vague & bit or (not instance.verified and self.noun(nouns[0])[1] == bit):
                self.nameable |= bit

    def _doubled(self) -> int:
        """Objects that share most of their pixels with another that might be called the same."""
        doubled = 0
        for first, second in combinations(range(len(self.shapes)), 2):
            a, b = self.shapes[first], self.shapes[second]
            if overlap(a.box, b.box) and self.same_kind(second, first):
                shared = np.count_nonzero(self.instances[first].mask & self.instances[second].mask)
                if shared >= 0.5 * min(a.area, b.area):
                    doubled |= 1 << first | 1 << second
        return doubled

    def _misplaced(self) -> int:
        """Garments that are not where the person wears them: a "dress" from the waist on is somebody's skirt."""
        misplaced = 0
        for person, name in enumerate(self.names):
            if name not in PERSONS:
                continue
            _, top, _, bottom = self.shapes[person].box
            for index, garment in enumerate(self.names):
                start = (self.shapes[index].box[1] - top) / (bottom - top)
                odd = start < 0.25 if garment in BELOW_WAIST else start > 0.33 if garment in FROM_CHEST else False
                if odd and self.belongs(index, person)[0]:
                    misplaced |= 1 << index
        return misplaced

    def same_kind(self, first: int, second: int) -> bool:
        """Whether an object might be called what another is called."""
        a, b = self.names[first], self.names[second]
        return a == b or any(self.vocabulary.loosely(noun, b) for noun in self.vocabulary.nouns(a))

    # ------------------------------------------------------------------------------------------------ single objects

    def noun(self, noun: str) -> tuple[int, int]:
        """The objects that a noun is true of: (strict, loose) sets."""
        if noun not in self._nouns:
            strict = bits(self.vocabulary.strictly(noun, name) for name in self.names)
            self._nouns[noun] = strict, bits(self.vocabulary.loosely(noun, name) for name in self.names)
        return self._nouns[noun]

    def nouns(self, index: int) -> tuple[str, ...]:
        """Everything that an object may be called, the usual noun first."""
        name = self.names[index]
        return (*self.vocabulary.nouns(name), *self.vocabulary.kinds(name, self.names))

    def colours(self, index: int) -> dict[str, tuple[float, float]] | None:
        """See `measure_colours`; None where they are not known."""
        if index not in self._colours:
            instance = self.instances[index]
            measured = instance.colours
            if measured is None and self.image is not None:
                measured = measure_colours(self.image, instance.mask)
            self._colours[index] = measured
        return self._colours[index]

    def colour(self, index: int) -> str | None:
        """The colour that an object surely has and may be named by."""
        name = self.names[index]
        allowed = naming_colours(name)
        if not allowed or self.vague >> index & 1 or (shares := self.colours(index)) is None:
            return None
        colour = sure_colour(shares, 0.45 if name in PERSONS else MIN_SHARE)
        return colour if colour in allowed else None

    def coloured(self, colour: str, most: float = MAX_OTHER) -> int:
        """The objects that somebody might name by a colour: more than this share of their pixels might have it."""
        return self.vague | bits(
            may_be_called(self.colours(index), colour, most / 2 if name in PERSONS else most)
            for index, name in enumerate(self.names)
        )

    def zones(self) -> dict[str, tuple[int, int]]:
        """For every zone of the image, the objects in it: (strict, loose) sets."""
        if not self._zones:
            for name, axes in ZONES.items():
                strict = loose = -1
                for axis, side in axes.items():
                    on_axis = self.along(axis, side)
                    strict, loose = strict & on_axis[0], loose & on_axis[1]
                if name == "middle":
                    strict &= ~bits(shape.area > 0.5 * self.width * self.height for shape in self.shapes)
                    middle = self.width / 2, self.height / 2
                    loose |= bits(contains(shape.box, middle) for shape in self.shapes)
                self._zones[name] = strict, loose
        return self._zones

    def along(self, axis: int, side: int) -> tuple[int, int]:
        """Objects at the start (-1), the end (1) or the middle (0) of an axis: (strict, loose) sets."""
        length = (self.width, self.height)[axis]
        strict = loose = 0
        for index, shape in enumerate(self.shapes):
            low, high = shape.box[axis] / length, shape.box[axis + 2] / length
            first, last = sorted(centre[axis] / length for centre in shape.centres)
            if side > 0:
                low, high, first, last = 1 - high, 1 - low, 1 - last, 1 - first
            vague = self.vague >> index & 1
            if side:
                strict |= (last <= 0.4 and high <= 0.65) << index
                loose |= ((low if vague else first) < 0.53) << index
            else:
                strict |= (first >= 0.4 and last <= 0.6) << index
                loose |= ((low < 0.75 and high > 0.25) if vague else (first <= 0.75 and last >= 0.25)) << index
        return strict, loose

    def in_corner(self, name: str) -> int:
        """Objects that surely lie in a corner of the image, such as "top left"."""
        inside = self.zones()[name][0]
        for axis, side in ZONES[name].items():
            length = (self.width, self.height)[axis]
            for index, shape in enumerate(self.shapes):
                far = max(abs(centre[axis] - (length if side > 0 else 0)) for centre in shape.centres)
                end = length - shape.box[axis] if side > 0 else shape.box[axis + 2]
                if far > 0.28 * length or end > 0.5 * length:
                    inside &= ~(1 << index)
        return inside

    # ------------------------------------------------------------------------------------------------- among its kind

    def before(self, first: int, second: int, axis: int, sign: int) -> bool:
        """Whether an object clearly comes before another along an axis (sign 1) or against it (-1)."""
        a, b = self.shapes[first], self.shapes[second]
        low_a, high_a, low_b, high_b = a.box[axis], a.box[axis + 2], b.box[axis], b.box[axis + 2]
        margin = max(0.06 * self.side, 0.25 * min(high_a - low_a, high_b - low_b))
        gap = min((y[axis] - x[axis]) * sign for x, y in zip(a.centres, b.centres, strict=True))
        slack = 0.01 * self.side
        edges = min((low_b - low_a) * sign, (high_b - high_a) * sign) >= -slack
        return gap >= margin and edges

    def outermost(self, target: int, axis: int, sign: int) -> int:
        """The target and all objects that do not clearly come after it: the loose set of an extreme."""
        unknown = self.vague | self.tiny
        return 1 << target | bits(
            bool(unknown >> other & 1) or not self.before(target, other, axis, sign)
            for other in range(len(self.shapes))
        )

    def larger(self, first: int, second: int) -> bool:
        """Whether an object is clearly larger than another, in the image."""
        a, b = self.shapes[first], self.shapes[second]
        wide = a.box[2] - a.box[0] >= 1.2 * (b.box[2] - b.box[0])
        return wide and a.box[3] - a.box[1] >= 1.2 * (b.box[3] - b.box[1]) and a.area >= 2 * b.area

    def line(self, among: int, axis: int) -> list[int]:
        """The objects of a set in their order along an axis; empty where it is not clear or they are not in line."""
        members = [index for index in range(len(self.shapes)) if among >> index & 1]
        if among & (self.vague | self.tiny) or not 3 <= len(members) <= _MOST_ORDERED:
            return []
        spread = [np.ptp([self.shapes[index].centres[0][way] for index in members]) for way in (0, 1)]
        members.sort(key=lambda index: self.shapes[index].centres[0][axis])
        clear = all(self.before(a, b, axis, 1) for a, b in pairwise(members))
        return members if clear and spread[axis] >= 1.2 * spread[1 - axis] else []

    def nearest(self, target: int, corner: str) -> int:
        """The target and all objects that are not clearly farther from a corner; 0 where the target is not near it."""
        point = [(self.width, self.height)[axis] if ZONES[corner][axis] > 0 else 0 for axis in (0, 1)]
        if not self.zones()[corner][1] >> target & 1:
            return 0

        def distances(index: int) -> list[float]:
            return [float(np.hypot(x - point[0], y - point[1])) for x, y in self.shapes[index].centres]

        reach = 1.4 * max(distances(target)) + 0.05 * self.side
        unknown = self.vague | self.tiny
        return 1 << target | bits(
            bool(unknown >> other & 1) or min(distances(other)) < reach for other in range(len(self.shapes))
        )

    # ------------------------------------------------------------------------------------------------------ relations

    def anchors(self) -> list[int]:
        """Objects that a noun alone names, to which others may be related."""
        if self._anchors is None:
            self._anchors = [
                index
                for index in range(len(self.names))
                if self.nameable >> index & 1 and self.noun(self.nouns(index)[0])[1] == 1 << index
            ]
        return self._anchors

    def related(self, anchor: int) -> list[tuple[str, int, int]]:
        """For every relation in which objects stand to the anchor: (relation, strict set, loose set)."""
        if anchor in self._related:
            return self._related[anchor]
        strict: dict[str, int] = {}
        loose: dict[str, int] = {}
        for index in range(len(self.shapes)):
            if index == anchor:
                continue
            vague = bool(self.vague >> index & 1)
            for name, surely in relations(self._regions[index], self._regions[anchor], self.side, vague=vague):
                loose[name] = loose.get(name, 0) | 1 << index
                if surely and not vague:
                    strict[name] = strict.get(name, 0) | 1 << index
        self._related[anchor] = [(name, surely, loose[name]) for name, surely in strict.items()]
        return self._related[anchor]

    def belongs(self, garment: int, person: int) -> tuple[bool, bool]:
        """See `belonging`."""
        if (garment, person) not in self._belongs:
            self._belongs[garment, person] = belonging(self._regions[garment], self._regions[person], self.side)
        return self._belongs[garment, person]


def bits(flags: Iterable[bool]) -> int:
    """The set of the objects whose flag is true."""
    return sum(1 << index for index, flag in enumerate(flags) if flag)
