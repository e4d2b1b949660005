"""Expressions that name one object of a scene.

An expression starts as a logical description that is evaluated twice: strictly for its target, and loosely (with a
margin around every "left of") for all other objects. It is used only if its answer is beyond doubt. Attributes that it
does not need are left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cmmasksd.data.scenes.meaning import EXTREMES, RELATIONS, Meaning
from cmmasksd.data.scenes.vocabulary import GENERIC, SHAPES, WORDS, SceneObject

_EFFORT = tuple(  # by subset of ATTRIBUTES (as bits): people prefer two or three words, and nouns and colours
    (3.0, 1.0, 0.0, 0.4, 1.5)[bits.bit_count()] + 1.3 * (not bits & 8) + 0.5 * (not bits & 4) for bits in range(16)
)
_FEWER = tuple(tuple(bits ^ 1 << i for i in range(4) if bits >> i & 1) for bits in range(16))
"""The subsets with one attribute less, by subset of ATTRIBUTES (as bits)."""


def _subsets(draw: random.Random) -> list[int]:
    """All subsets of ATTRIBUTES (as bits) in random order, those of little _EFFORT rather first."""
    chance = draw.random
    effort = [usual + 1.2 * chance() for usual in _EFFORT]
    return sorted(range(16), key=effort.__getitem__)


def _minimal(table: Sequence[int], bits: int, loose: int, bit: int) -> bool:
    """Whether the attributes name the object among `loose`, and none of them can be left out."""
    if table[bits] & loose != bit:
        return False
    for fewer in _FEWER[bits]:  # noqa: SIM110 (the hottest loop of all; `all` takes twice as long)
        if table[fewer] & loose == bit:
            return False
    return True


def phrase_of(draw: random.Random, values: Sequence[str]) -> str:
    """A noun phrase with the given values of attributes, in the order of ATTRIBUTES."""
    words = [draw.choice(WORDS.get(value, (value,))) for value in values]
    if not values or values[-1] not in SHAPES:
        words.append(draw.choice(GENERIC))
    return " ".join(words)


def _noun_phrase(draw: random.Random, thing: SceneObject, bits: int) -> str:
    return phrase_of(draw, [value for i, value in enumerate(thing.attributes) if bits >> i & 1])


def _by_attributes(meaning: Meaning, target: int, draw: random.Random) -> int | None:
    """A minimal subset of ATTRIBUTES (as bits) that names the target, if one does."""
    table, bit = meaning.sharing(target), 1 << target
    if table[15] != bit:
        return None
    return next(bits for bits in _subsets(draw) if _minimal(table, bits, -1, bit))


def say_location(draw: random.Random, kind: str, name: str, phrase: str) -> str:
    """A noun phrase with a location: kind "zone" (name: of ZONES), "extreme" or "second" (name: of EXTREMES)."""
    if kind == "second":
        axis_word = {"leftmost": "left", "rightmost": "right", "topmost": "top", "lowest": "bottom"}[name]
        return f"second {phrase} from the {axis_word}"
    if kind == "extreme":
        if name == "lowest":
            return f"{draw.choice(('lowest', 'bottommost'))} {phrase}"
        return f"{name} {phrase}"
    if name == "middle":
        return draw.choice((f"middle {phrase}", f"{phrase} in the middle", f"center {phrase}"))
    if " " in name:
        return draw.choice((f"{name} {phrase}", f"{phrase} {name}", f"{phrase} in the {name}"))
    preposition = "on" if name in ("left", "right") else "at"
    return draw.choice((f"{name} {phrase}", f"{phrase} {name}", f"{phrase} {preposition} the {name}"))


def _short_expression(meaning: Meaning, target: int, draw: random.Random) -> str | None:
    """In the style of RefCOCO: a few attributes and a location."""
    table, bit = meaning.sharing(target), 1 << target
    zones = [("zone", name, loose) for name, (strict, loose) in meaning.zones().items() if strict & bit]
    orders = [("extreme", name, meaning.outermost(target, *order)) for name, order in EXTREMES.items()]
    draw.shuffle(zones)
    draw.shuffle(orders)
    chance = draw.random()
    # In RefCOCO, 45 % of the expressions name a region and 10 % an order ("leftmost"): orders are mostly for targets
    # that no region singles out
    preferred = [orders, zones] if chance < 0.03 else [zones, orders] if chance < 0.4 else [zones]
    # other locations are true of another object with all the attributes
    preferred = [[location for location in kind if table[15] & location[2] == bit] for kind in preferred]
    if chance > 0.93:
        preferred.insert(0, [("second", name, -1) for _, name, _ in orders])
    subsets = [bits for bits in _subsets(draw)[:8] if table[bits] != bit]  # else the location would add nothing
    for locations in preferred:
        for bits in subsets if locations else ():
            for kind, name, loose in locations:
                if kind == "second":
                    axis, sign = EXTREMES[name]
                    names_target = meaning.second(table[bits], axis, sign) == target and all(
                        meaning.second(table[fewer], axis, sign) != target for fewer in _FEWER[bits]
                    )
                else:
                    names_target = _minimal(table, bits, loose, bit)
                if names_target:
                    return say_location(draw, kind, name, _noun_phrase(draw, meaning.objects[target], bits))
    return None


def _long_expression(meaning: Meaning, target: int, draw: random.Random) -> str | None:
    """In the style of G-Ref: the object, and its relation to one or two others."""
    table, bit = meaning.sharing(target), 1 << target
    anchors = list(meaning.anchors(target))
    draw.shuffle(anchors)
    if draw.random() < 0.5:
        anchors.sort(key=lambda a: a[0] not in ("behind", "front"))  # overlaps are rare: prefer them
    chains = [(a,) for a in anchors[:6]] + [(a, b) for a in anchors[:3] for b in anchors[:3] if a[1] < b[1]]
    subsets = _subsets(draw)[:8]
    for chain in chains:
        loose = chain[0][2] & chain[-1][2]
        if table[15] & loose != bit:
            continue  # true of another object with all the attributes
        for bits in subsets:
            sharing = table[bits]
            if sharing & loose != bit or sharing == bit or not _minimal(table, bits, loose, bit):
                continue  # true of another object, or the relation or an attribute adds nothing
            if len(chain) == 2 and any(sharing & related == bit for _, _, related in chain):
                continue  # one of the two relations is enough
            touching = -1
            for relation, anchor, related in chain:
                if relation in ("behind", "front"):
                    related |= meaning.touching(relation, anchor)
                touching &= related
            if sharing & touching != bit:
                continue  # also true of an object of which only a corner overlaps
            tails = []
            for relation, anchor, _ in chain:
                named = _by_attributes(meaning, anchor, draw)
                assert named is not None  # attributes name an anchor
                tails.append(f"{RELATIONS[relation]} the {_noun_phrase(draw, meaning.objects[anchor], named)}")
            link = draw.choice(("", "that is ", "which is ")) if len(chain) == 1 else "that is "
            return f"the {_noun_phrase(draw, meaning.objects[target], bits)} {link}{' and '.join(tails)}"
    return None


def make_expression(meaning: Meaning, target: int, style: str, draw: random.Random) -> str | None:
    """An expression that names the target in a style (of STYLES), if the first try succeeds."""
    if style == "scenesg":
        return _long_expression(meaning, target, draw)
    if style == "scenes" and draw.random() < 0.8:
        return _short_expression(meaning, target, draw)
    named = _by_attributes(meaning, target, draw)
    return None if named is None else _noun_phrase(draw, meaning.objects[target], named)
