"""What can be said of the objects of an annotated image. Sets of objects are bit masks in plain ints.

Every claim is evaluated twice: strictly for the object that it is made of, where it must hold clearly, and loosely for
all others: its loose set holds every object of which somebody might say it. Positions are those of the image as it is
seen. Each object has two centres, of its box and of its mask: strictly both must agree, loosely either is enough.

Regions of which it is not known what they hold (crowds, masks that nobody verified, two masks of one kind on the same
pixels) are in nearly every loose set: whatever could be said of an object there makes a sentence ambiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cmmasksd.data.expressions.attributes import (
    COLOURS,
    MAX_OTHER,
    MIN_SHARE,
    Shape,
    may_be_called,
    measure_colours,
    measure_shape,
    sure_colour,
)
from cmmasksd.data.expressions.instances import Instance
from cmmasksd.data.expressions.words import (
    ANIMALS,
    BELOW_WAIST,
    BOARDS,
    BODY,
    CARRIED,
    FROM_CHEST,
    GROUNDED,
    MOUNTS,
    ON_SEATS,
    ON_TABLES,
    PERSONS,
    SEATS,
    WORN,
    Vocabulary,
)

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

_NO_COLOURS = frozenset(
    (
        *("skin", "glasses", "tv", "laptop", "cell phone", "clock", "sink", "microwave", "traffic light", "stop sign"),
        *(
            "fork",
            "knife",
            "spoon",
            "scissors",
            "wine glass",
            "bottle",
            "bowl",
            "bicycle",
            "tennis racket",
            "parking meter",
        ),
        *("pizza", "sandwich", "hot dog", "broccoli", "carrot", "orange", "banana", "zebra", "giraffe"),
    )
)
_ANIMAL_COLOURS = frozenset(("black", "white", "brown", "gray", "black and white"))
_CLOTHES_COLOURS = frozenset(("red", "green", "blue", "yellow", "black", "white", "purple"))  # the rest could be skin
_HAIR_COLOURS = frozenset(("black", "brown"))


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that is strictly true of an object.

    Attributes:
        kind: "colour", "zone", "corner" (in it), "order", "ordinal", "middle" (of three), "size", "nearest" (to a
            corner), "relation" (to `anchor`), "has" (a garment, `anchor`) or "of" (its wearer, `anchor`).
        value: the colour, zone, order or relation; for "ordinal" the place and the order, such as "2 leftmost".
        loose: the objects (bits) of which somebody might say it, the object itself among them.
        anchor: index of the other object.
        colour: of a garment that somebody has, where it is part of the claim.
    """

    kind: str
    value: str
    loose: int
    anchor: int | None = None
    colour: str | None = None


class Meaning:
    """What can be said of the objects of one image.

    Args:
        instances: all annotated regions of the image; none may be empty.
        image: (H, W, 3) uint8 RGB; None where nothing is to be said of colours that the instances do not bring.
        vocabulary: the nouns.
        min_area: share of the image below which an object is never named.
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
        self.shapes: list[Shape] = [shape for shape in shapes if shape is not None]
        self.names = [instance.category for instance in self.instances]
        self._colours: dict[int, dict[str, tuple[float, float]] | None] = {}
        self._nouns: dict[str, tuple[int, int]] = {}
        self._zones: dict[str, tuple[int, int]] = {}
        self._anchors: list[int] | None = None
        self._related: dict[int, list[tuple[str, int, int]]] = {}
        self._belongs: dict[tuple[int, int], tuple[bool, bool]] = {}
        least = min_area * self.height * self.width
        self.tiny = _bits(shape.area < least for shape in self.shapes)
        self.vague = _bits(instance.crowd or not instance.verified for instance in self.instances) | self._doubled()
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
        found = 0
        for first, one in enumerate(self.shapes):
            for second in range(first):
                other = self.shapes[second]
                if not _overlap(one.box, other.box) or not self._one_kind(first, second):
                    continue
                shared = np.count_nonzero(self.instances[first].mask & self.instances[second].mask)
                if shared >= 0.5 * min(one.area, other.area):
                    found |= 1 << first | 1 << second
        return found

    def _misplaced(self) -> int:
        """Garments that are not where the person wears them: a "dress" from the waist on is somebody's skirt."""
        found = 0
        for person, name in enumerate(self.names):
            if name not in PERSONS:
                continue
            _, top, _, bottom = self.shapes[person].box
            for index, garment in enumerate(self.names):
                start = (self.shapes[index].box[1] - top) / (bottom - top)
                odd = start < 0.25 if garment in BELOW_WAIST else start > 0.33 if garment in FROM_CHEST else False
                if odd and self.belongs(index, person)[0]:
                    found |= 1 << index
        return found

    def _one_kind(self, first: int, second: int) -> bool:
        a, b = self.names[first], self.names[second]
        return a == b or any(self.vocabulary.loosely(noun, b) for noun in self.vocabulary.nouns(a))

    # ------------------------------------------------------------------------------------------------ single objects

    def noun(self, noun: str) -> tuple[int, int]:
        """The objects that a noun is true of: (strict, loose) sets."""
        if noun not in self._nouns:
            strict = _bits(self.vocabulary.strictly(noun, name) for name in self.names)
            self._nouns[noun] = strict, _bits(self.vocabulary.loosely(noun, name) for name in self.names)
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
        allowed = self.colours_of(name)
        if not allowed or self.vague >> index & 1 or (shares := self.colours(index)) is None:
            return None
        colour = sure_colour(shares, 0.45 if name in PERSONS else MIN_SHARE)
        return colour if colour in allowed else None

    def colours_of(self, name: str) -> frozenset[str]:
        """The colours by which people name objects of a class."""
        if name in _NO_COLOURS:
            return frozenset()
        if name in PERSONS:
            return _CLOTHES_COLOURS
        if name == "hair":
            return _HAIR_COLOURS
        if name in ANIMALS and name not in ("bird", "teddy bear"):
            return _ANIMAL_COLOURS | {"orange"} if name == "cat" else _ANIMAL_COLOURS
        return frozenset(COLOURS) - {"black and white"}

    def coloured(self, colour: str, most: float = MAX_OTHER) -> int:
        """The objects that somebody might name by a colour: more than this share of their pixels might have it."""
        return self.vague | _bits(
            may_be_called(self.colours(index), colour, most / 2 if name in PERSONS else most)
            for index, name in enumerate(self.names)
        )

    def zones(self) -> dict[str, tuple[int, int]]:
        """For every zone of the image, the objects in it: (strict, loose) sets."""
        if not self._zones:
            for name, axes in ZONES.items():
                strict = loose = -1
                for axis, side in axes.items():
                    on_axis = self._along(axis, side)
                    strict, loose = strict & on_axis[0], loose & on_axis[1]
                if name == "middle":
                    strict &= ~_bits(shape.area > 0.5 * self.width * self.height for shape in self.shapes)
                    middle = self.width / 2, self.height / 2
                    loose |= _bits(_contains(shape.box, middle) for shape in self.shapes)
                self._zones[name] = strict, loose
        return self._zones

    def _along(self, axis: int, side: int) -> tuple[int, int]:
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
        found = self.zones()[name][0]
        for axis, side in ZONES[name].items():
            length = (self.width, self.height)[axis]
            for index, shape in enumerate(self.shapes):
                far = max(abs(centre[axis] - (length if side > 0 else 0)) for centre in shape.centres)
                end = length - shape.box[axis] if side > 0 else shape.box[axis + 2]
                if far > 0.28 * length or end > 0.5 * length:
                    found &= ~(1 << index)
        return found

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
        return 1 << target | _bits(
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
        return 1 << target | _bits(
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
            for name, surely in self._relations(index, anchor):
                loose[name] = loose.get(name, 0) | 1 << index
                if surely and not self.vague >> index & 1:
                    strict[name] = strict.get(name, 0) | 1 << index
        self._related[anchor] = [(name, found, loose[name]) for name, found in strict.items()]
        return self._related[anchor]

    def _relations(self, index: int, anchor: int) -> Iterator[tuple[str, bool]]:
        """The relations in which an object might be said to stand to another, and whether it surely does."""
        name, other = self.names[index], self.names[anchor]
        a, b = self.shapes[index], self.shapes[anchor]
        (ax, ay), (bx, by) = a.centres[0], b.centres[0]
        sizes = [(s.box[2] - s.box[0], s.box[3] - s.box[1]) for s in (a, b)]
        (aw, ah), (bw, bh) = sizes
        vague = bool(self.vague >> index & 1)
        shared_x = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
        shared_y = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
        worn = WORN | BODY
        apart = name not in worn and other not in worn and not {name, other} <= CARRIED | PERSONS
        near = 0.03 * self.side
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
        if gap <= 0.25 * self.side:
            level = abs(a.box[3] - b.box[3]) <= 0.2 * max(ah, bh) and shared_y >= 0.6 * min(ah, bh)
            close = -0.15 * min(aw, bw) <= -shared_x <= min(0.3 * min(aw, bw), 0.06 * self.side)
            yield "next to", apart and level and close and 1 / 6 <= a.area / b.area <= 6
        if gap <= near:
            yield "on", not vague and self._on(index, anchor)
        if shared_x >= -near and other == "umbrella":
            roof = b.box[1] <= a.box[1] + 0.1 * ah and b.box[3] <= a.box[1] + 0.5 * ah and bw >= 0.8 * aw
            yield "under", name in PERSONS and roof and shared_x >= 0.8 * aw and gap <= 0
        orders = self.instances[index].order, self.instances[anchor].order
        if gap <= near:
            known = None not in orders and orders[0] != orders[1]
            touching = known and apart and _touch(self.instances[index].mask, self.instances[anchor].mask, a, b)
            for relation, first in (("in front of", 0), ("behind", 1)):
                if not known or orders[first] < orders[1 - first]:  # type: ignore[operator]
                    yield relation, touching

    def _on(self, index: int, anchor: int) -> bool:
        """Whether an object surely lies, sits or stands on another."""
        name, other = self.names[index], self.names[anchor]
        a, b = self.shapes[index], self.shapes[anchor]
        x = a.centres[0][0]
        if not b.box[0] <= x <= b.box[2]:
            return False
        height = b.box[3] - b.box[1]
        mask, support = self.instances[index].mask, self.instances[anchor].mask
        if (name in ON_SEATS and other in SEATS) or (name in ON_TABLES and other == "dining table"):
            return a.box[3] <= b.box[3] - 0.03 * height and _resting(mask, support, a) >= 0.5
        if name in PERSONS and other in MOUNTS:
            above = a.box[1] < b.box[1] + 0.1 * height and a.box[3] <= b.box[3] - 0.08 * height
            return above and _enclosed(mask, support, a) >= 0.2
        if name in PERSONS and other in BOARDS:
            tall = a.box[3] - a.box[1]
            low = b.centres[0][1] > a.box[1] + 0.8 * tall and b.box[3] - b.box[1] < 0.5 * tall
            return low and a.box[3] <= b.box[3] + 0.02 * self.side and _resting(mask, support, a) >= 0.15
        return False

    def belongs(self, garment: int, person: int) -> tuple[bool, bool]:
        """Whether a garment or bag surely is a person's, and whether somebody might think so."""
        if (garment, person) not in self._belongs:
            self._belongs[garment, person] = self._belonging(garment, person)
        return self._belongs[garment, person]

    def _belonging(self, garment: int, person: int) -> tuple[bool, bool]:
        a, b = self.shapes[garment], self.shapes[person]
        grown = 0.03 * self.side
        box = (b.box[0] - grown, b.box[1] - grown, b.box[2] + grown, b.box[3] + grown)
        if not _overlap(a.box, box):
            return False, False
        mask, body = self.instances[garment].mask, self.instances[person].mask
        inside = np.count_nonzero(mask & body) / a.area
        if inside >= 0.8:
            return True, True
        edge = _rim(mask, a)
        touched = float(body[edge].mean()) if len(edge[0]) else 0.0
        if self.names[garment] in CARRIED:
            tall = b.box[3] - b.box[1]
            body_box = (b.box[0], b.box[1] + 0.1 * tall, b.box[2], b.box[3] - 0.15 * tall)
            held = self.names[garment] != "suitcase" and _contains(body_box, a.centres[1])
            return touched >= 0.4 and held, True
        return touched >= 0.5 and all(_contains(b.box, centre) for centre in a.centres), True

    # --------------------------------------------------------------------------------------------------------- claims

    def claims(self, target: int, noun: str) -> list[Claim]:
        """All that is strictly true of an object, which is called `noun`."""
        bit, (strict, kind) = 1 << target, self.noun(noun)
        claims = []
        if (colour := self.colour(target)) is not None and colour != noun:
            claims.append(Claim("colour", colour, self.coloured(colour)))
        if self.names[target] not in WORN | BODY:
            claims += [Claim("zone", name, loose) for name, (surely, loose) in self.zones().items() if surely & bit]
            claims += [Claim("corner", name, self.zones()[name][1]) for name in CORNERS if self.in_corner(name) & bit]
        counted = self.names[target] not in WORN | BODY and strict & ~bit
        if counted and not self.vague & bit:
            claims += self._among(target, kind)
        for anchor in self.anchors():
            if anchor != target and not self.noun(self.nouns(anchor)[0])[1] & bit:
                claims += [
                    Claim("relation", name, loose | self.vague & self._may_relate(anchor), anchor)
                    for name, surely, loose in self.related(anchor)
                    if surely & bit
                ]
        return [*claims, *self._dress(target)]

    def _may_relate(self, anchor: int) -> int:
        """Vague regions near enough to an anchor that something in them might stand in any relation to it."""
        box, grown = self.shapes[anchor].box, 0.25 * self.side
        around = (box[0] - grown, box[1] - grown, box[2] + grown, box[3] + grown)
        return _bits(_overlap(shape.box, around) for shape in self.shapes)

    def _among(self, target: int, kind: int) -> Iterator[Claim]:
        """What tells a target from the others of its kind by order and size."""
        bit = 1 << target
        for name, (axis, sign) in ORDERS.items():
            yield Claim("order", name, self.outermost(target, axis, sign))
        others = [index for index in range(len(self.shapes)) if kind >> index & 1 and index != target]
        yield Claim("size", "largest", bit | self.vague | _bits(self._not_larger(target)))
        x0, y0, x1, y1 = self.shapes[target].box
        if x0 > 1 and y0 > 1 and x1 < self.width - 1 and y1 < self.height - 1 and not kind & self.tiny:
            smaller = (not self.larger(index, target) for index in range(len(self.shapes)))
            yield Claim("size", "smallest", bit | self.vague | _bits(smaller))
        for corner in CORNERS:
            if loose := self.nearest(target, corner):
                yield Claim("nearest", corner, loose)
        strict = all(self.names[index] == self.names[target] for index in others)
        for name, (axis, sign) in ORDERS.items():
            line = self.line(kind, axis)[::sign] if strict else []
            if target in line and 2 <= (place := line.index(target) + 1) <= min(MAX_ORDINAL, len(line) - 1):
                yield Claim("ordinal", f"{place} {name}", bit | ~kind)
        line = self.line(kind, 0) if strict else []
        if len(line) == 3 and line[1] == target and not self._along(0, 0)[1] & kind & ~bit:
            yield Claim("middle", "middle", bit | ~kind)

    def _not_larger(self, target: int) -> Iterator[bool]:
        return (not self.larger(target, index) for index in range(len(self.shapes)))

    def _dress(self, target: int) -> Iterator[Claim]:
        """A person's garments, or a garment's person."""
        name = self.names[target]
        things = [i for i, other in enumerate(self.names) if other in WORN | CARRIED or other == "hair"]
        people = [i for i, other in enumerate(self.names) if other in PERSONS]
        if self.vague >> target & 1:
            return
        if name in PERSONS:
            for thing in things:
                if not self.nameable >> thing & 1 or self.vague >> thing & 1 or not self.belongs(thing, target)[0]:
                    continue
                if any(self.belongs(thing, other)[1] for other in people if other != target):
                    continue
                alike = [i for i in things if self._one_kind(thing, i)]
                colours = [colour] if (colour := self.colour(thing)) is not None else []
                for colour in colours if self.names[thing] == "hair" else [None, *colours]:
                    worn = alike if colour is None else [i for i in alike if self.coloured(colour) >> i & 1]
                    loose = _bits(
                        bool(self.vague >> other & 1) or any(self.belongs(i, other)[1] for i in worn)
                        for other in range(len(self.names))
                    )
                    yield Claim("has", self.names[thing], loose, thing, colour)
        elif name in WORN | CARRIED:
            for person in people:
                unique = person in self.anchors() and self.belongs(target, person)[0]
                if unique and not any(self.belongs(target, other)[1] for other in people if other != person):
                    loose = _bits(
                        bool(self.vague >> i & 1) or self.belongs(i, person)[1] for i in range(len(self.names))
                    )
                    yield Claim("of", "person", loose | 1 << target, person)


def _bits(flags: Iterator[bool] | Sequence[bool]) -> int:
    return sum(1 << index for index, flag in enumerate(flags) if flag)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _contains(box: Sequence[float], point: tuple[float, float]) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _resting(mask: np.ndarray, support: np.ndarray, shape: Shape) -> float:
    """Share of an object's columns whose lowest pixel, or one of three below it, is the support's."""
    x0, y0, x1, y1 = shape.box
    part = mask[y0:y1, x0:x1]
    columns = np.flatnonzero(part.any(axis=0))
    lowest = y1 - 1 - part[::-1, columns].argmax(axis=0)
    rows = np.minimum(lowest[:, None] + np.arange(4), len(mask) - 1)
    return float(support[rows, (columns + x0)[:, None]].any(axis=1).mean())


def _enclosed(mask: np.ndarray, support: np.ndarray, shape: Shape) -> float:
    """Share of an object's rows in which the support shows on both of its sides."""
    _, y0, _, y1 = shape.box
    rows = mask[y0:y1]
    first, last = rows.argmax(axis=1), rows.shape[1] - 1 - rows[:, ::-1].argmax(axis=1)
    counts = np.concatenate([np.zeros((y1 - y0, 1), int), support[y0:y1].cumsum(axis=1)], axis=1)
    row = np.arange(y1 - y0)
    left, right = counts[row, first], counts[:, -1] - counts[row, last + 1]
    return float(((left > 0) & (right > 0) & rows.any(axis=1)).mean())


def _rim(mask: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels within three of an object, its own left out."""
    x0, y0, x1, y1 = shape.box
    top, left = max(0, y0 - 3), max(0, x0 - 3)
    part = mask[top : y1 + 3, left : x1 + 3]
    grown = np.pad(part, 3)
    for axis in (0, 1):
        size = part.shape[axis]
        grown = np.logical_or.reduce([grown.take(range(by, by + size), axis=axis) for by in range(7)])
    rows, columns = np.nonzero(grown & ~part)
    return rows + top, columns + left


def _touch(first: np.ndarray, second: np.ndarray, shape: Shape, other: Shape) -> bool:
    """Whether two objects overlap or come within three pixels of each other."""
    x0, y0, x1, y1 = shape.box
    if not _overlap((x0 - 3, y0 - 3, x1 + 3, y1 + 3), other.box):
        return False
    return bool((first & second).any() or second[_rim(first, shape)].any())
