"""Claims: what is strictly true of an object, each with all objects of which somebody might say it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cmmasksd.data.expressions.meaning import CORNERS, MAX_ORDINAL, ORDERS, Meaning, bits
from cmmasksd.data.expressions.shapes import overlap
from cmmasksd.data.expressions.words import BODY, CARRIED, PERSONS, WORN


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that is strictly true of an object.

    Attributes:
        kind: "colour", "zone", "corner" (in it), "order", "ordinal", "middle" (of three), "size", "nearest" (to a
            corner), "relation" (to `anchor`), "has" (a garment, `anchor`) or "of" (its wearer, `anchor`).
        value: the colour, zone, order or relation; for "ordinal" the place and the order, such as "2 leftmost".
        loose: the objects (bits) of which somebody might say it, the object itself among them.
        anchor: index of the other object.
        colour: colour of a garment that somebody has, where it is part of the claim.
    """

    kind: str
    value: str
    loose: int
    anchor: int | None = None
    colour: str | None = None


def true_claims(meaning: Meaning, target: int, noun: str) -> list[Claim]:
    """All that is strictly true of an object, which is called `noun`."""
    bit, (strict, kind) = 1 << target, meaning.noun(noun)
    claims = []
    if (colour := meaning.colour(target)) is not None and colour != noun:
        claims.append(Claim("colour", colour, meaning.coloured(colour)))
    if meaning.names[target] not in WORN | BODY:
        claims += [Claim("zone", name, loose) for name, (surely, loose) in meaning.zones().items() if surely & bit]
        claims += [Claim("corner", name, meaning.zones()[name][1]) for name in CORNERS if meaning.in_corner(name) & bit]
    counted = meaning.names[target] not in WORN | BODY and strict & ~bit
    if counted and not meaning.vague & bit:
        claims += _among(meaning, target, kind)
    for anchor in meaning.anchors():
        if anchor != target and not meaning.noun(meaning.nouns(anchor)[0])[1] & bit:
            claims += [
                Claim("relation", name, loose | meaning.vague & _may_relate(meaning, anchor), anchor)
                for name, surely, loose in meaning.related(anchor)
                if surely & bit
            ]
    return [*claims, *_dress(meaning, target)]


def _may_relate(meaning: Meaning, anchor: int) -> int:
    """Vague regions near enough to an anchor that something in them might stand in any relation to it."""
    box, grown = meaning.shapes[anchor].box, 0.25 * meaning.side
    around = (box[0] - grown, box[1] - grown, box[2] + grown, box[3] + grown)
    return bits(overlap(shape.box, around) for shape in meaning.shapes)


def _among(meaning: Meaning, target: int, kind: int) -> Iterator[Claim]:
    """What tells a target from the others of its kind by order and size."""
    bit = 1 << target
    for name, (axis, sign) in ORDERS.items():
        yield Claim("order", name, meaning.outermost(target, axis, sign))
    others = [index for index in range(len(meaning.shapes)) if kind >> index & 1 and index != target]
    not_larger = (not meaning.larger(target, index) for index in range(len(meaning.shapes)))
    yield Claim("size", "largest", bit | meaning.vague | bits(not_larger))
    x0, y0, x1, y1 = meaning.shapes[target].box
    if x0 > 1 and y0 > 1 and x1 < meaning.width - 1 and y1 < meaning.height - 1 and not kind & meaning.tiny:
        smaller = (not meaning.larger(index, target) for index in range(len(meaning.shapes)))
        yield Claim("size", "smallest", bit | meaning.vague | bits(smaller))
    for corner in CORNERS:
        if loose := meaning.nearest(target, corner):
            yield Claim("nearest", corner, loose)
    strict = all(meaning.names[index] == meaning.names[target] for index in others)
    for name, (axis, sign) in ORDERS.items():
        line = meaning.line(kind, axis)[::sign] if strict else []
        if target in line and 2 <= (place := line.index(target) + 1) <= min(MAX_ORDINAL, len(line) - 1):
            yield Claim("ordinal", f"{place} {name}", bit | ~kind)
    line = meaning.line(kind, 0) if strict else []
    if len(line) == 3 and line[1] == target and not meaning.along(0, 0)[1] & kind & ~bit:
        yield Claim("middle", "middle", bit | ~kind)


def _dress(meaning: Meaning, target: int) -> Iterator[Claim]:
    """A person's garments, or a garment's person."""
    name = meaning.names[target]
    things = [i for i, other in enumerate(meaning.names) if other in WORN | CARRIED or other == "hair"]
    people = [i for i, other in enumerate(meaning.names) if other in PERSONS]
    if meaning.vague >> target & 1:
        return
    if name in PERSONS:
        for thing in things:
            if not meaning.nameable >> thing & 1 or meaning.vague >> thing & 1 or not meaning.belongs(thing, target)[0]:
                continue
            if any(meaning.belongs(thing, other)[1] for other in people if other != target):
                continue
            alike = [i for i in things if meaning.same_kind(thing, i)]
            colours = [colour] if (colour := meaning.colour(thing)) is not None else []
            for colour in colours if meaning.names[thing] == "hair" else [None, *colours]:
                worn = alike if colour is None else [i for i in alike if meaning.coloured(colour) >> i & 1]
                loose = bits(
                    bool(meaning.vague >> other & 1) or any(meaning.belongs(i, other)[1] for i in worn)
                    for other in range(len(meaning.names))
                )
                yield Claim("has", meaning.names[thing], loose, thing, colour)
    elif name in WORN | CARRIED:
        for person in people:
            unique = person in meaning.anchors() and meaning.belongs(target, person)[0]
            if unique and not any(meaning.belongs(target, other)[1] for other in people if other != person):
                loose = bits(
                    bool(meaning.vague >> i & 1) or meaning.belongs(i, person)[1] for i in range(len(meaning.names))
                )
                yield Claim("of", "person", loose | 1 << target, person)
