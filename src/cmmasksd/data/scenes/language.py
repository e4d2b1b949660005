"""Sentences that name one object of a scene.

A sentence is never drawn from a template and hoped to be true. It starts as a logical description whose meaning is
evaluated twice: strictly for the object that it names, and loosely for all others (with a margin around every "left
of"), so that nobody would argue about the answer. Attributes that the sentence does not need are left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cmmasksd.data.scenes.meaning import EXTREMES, RELATIONS, Meaning
from cmmasksd.data.scenes.vocabulary import GENERIC, SHAPES, WORDS, SceneObject

_EFFORT = tuple(  # for every subset of ATTRIBUTES (as bits): two or three words are said more often than one or four,
    (3.0, 1.0, 0.0, 0.4, 1.5)[bits.bit_count()] + 1.3 * (not bits & 8) + 0.5 * (not bits & 4)  # nouns and colours most
    for bits in range(16)
)
_FEWER = tuple(tuple(bits ^ 1 << i for i in range(4) if bits >> i & 1) for bits in range(16))
"""For every subset of ATTRIBUTES (as bits), those with one attribute less."""


def _subsets(draw: random.Random) -> list[int]:
    """All subsets of ATTRIBUTES as bits, in a random order that people's habits bias (_EFFORT)."""
    chance = draw.random
    effort = [usual + 1.2 * chance() for usual in _EFFORT]
    return sorted(range(16), key=effort.__getitem__)


def _minimal(table: Sequence[int], bits: int, loose: int, bit: int) -> bool:
    """True when the attributes name the object among `loose`, and none of them can be left out."""
    if table[bits] & loose != bit:
        return False
    for fewer in _FEWER[bits]:  # noqa: SIM110 (the loop is twice as fast as `all`, and this the hottest of all lines)
        if table[fewer] & loose == bit:
            return False
    return True


def phrase_of(draw: random.Random, values: Sequence[str]) -> str:
    words = [draw.choice(WORDS.get(value, (value,))) for value in values]
    if not values or values[-1] not in SHAPES:
        words.append(draw.choice(GENERIC))
    return " ".join(words)


def _noun_phrase(draw: random.Random, thing: SceneObject, bits: int) -> str:
    return phrase_of(draw, [value for i, value in enumerate(thing.attributes) if bits >> i & 1])


def _by_attributes(meaning: Meaning, target: int, draw: random.Random) -> int | None:
    """A minimal subset of attributes (as bits) that only the target has."""
    table, bit = meaning.sharing(target), 1 << target
    if table[15] != bit:
        return None
    return next(bits for bits in _subsets(draw) if _minimal(table, bits, -1, bit))


def say_location(draw: random.Random, kind: str, name: str, phrase: str) -> str:
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


def _short_sentence(meaning: Meaning, target: int, draw: random.Random) -> str | None:
    """RefCOCO's manner: a few attributes and a place."""
    table, bit = meaning.sharing(target), 1 << target
    zones = [("zone", name, loose) for name, (strict, loose) in meaning.zones().items() if strict & bit]
    orders = [("extreme", name, meaning.outermost(target, *way)) for name, way in EXTREMES.items()]
    draw.shuffle(zones)
    draw.shuffle(orders)
    chance = draw.random()
    # In RefCOCO 45 % of the sentences name a region and 10 % an order: an order is for what no region singles out, and
    # not even always for that.
    ways = [orders, zones] if chance < 0.03 else [zones, orders] if chance < 0.4 else [zones]
    ways = [[place for place in places if table[15] & place[2] == bit] for places in ways]  # else true of others too
    if chance > 0.93:
        ways.insert(0, [("second", name, -1) for _, name, _ in orders])
    subsets = [bits for bits in _subsets(draw)[:8] if table[bits] != bit]  # else the place would add nothing
    for places in ways:
        for bits in subsets if places else ():
            for kind, name, loose in places:
                if kind == "second":
                    way = EXTREMES[name]
                    found = meaning.second(table[bits], *way) == target
                    found = found and all(meaning.second(table[fewer], *way) != target for fewer in _FEWER[bits])
                else:
                    found = _minimal(table, bits, loose, bit)
                if found:
                    return say_location(draw, kind, name, _noun_phrase(draw, meaning.objects[target], bits))
    return None


def _long_sentence(meaning: Meaning, target: int, draw: random.Random) -> str | None:
    """G-Ref's manner: the object, and where it stands to one or two others."""
    table, bit = meaning.sharing(target), 1 << target
    anchors = list(meaning.anchors(target))
    draw.shuffle(anchors)
    if draw.random() < 0.5:
        anchors.sort(key=lambda a: a[0] not in ("behind", "front"))  # overlaps are rare: take them where they are
    chains = [(a,) for a in anchors[:6]] + [(a, b) for a in anchors[:3] for b in anchors[:3] if a[1] < b[1]]
    subsets = _subsets(draw)[:8]
    all_words = table[15]
    for chain in chains:
        loose = chain[0][2] & chain[-1][2]
        if all_words & loose != bit:
            continue  # true of another with all the words
        for bits in subsets:
            found = table[bits]
            if found & loose != bit or found == bit or not _minimal(table, bits, loose, bit):
                continue  # true of another, or the relation or an attribute adds nothing
            if len(chain) == 2 and any(table[bits] & one == bit for _, _, one in chain):
                continue  # one of the two relations would do
            touched = -1
            for relation, anchor, one in chain:
                touched &= one | meaning.touching(relation, anchor) if relation in ("behind", "front") else one
            if table[bits] & touched != bit:
                continue  # a corner of another lies there too
            tails = []
            for relation, anchor, _ in chain:
                named = _by_attributes(meaning, anchor, draw)
                assert named is not None  # only objects that attributes name are anchors
                tails.append(f"{RELATIONS[relation]} the {_noun_phrase(draw, meaning.objects[anchor], named)}")
            link = draw.choice(("", "that is ", "which is ")) if len(chain) == 1 else "that is "
            return f"the {_noun_phrase(draw, meaning.objects[target], bits)} {link}{' and '.join(tails)}"
    return None


def make_sentence(meaning: Meaning, target: int, style: str, draw: random.Random) -> str | None:
    if style == "scenesg":
        return _long_sentence(meaning, target, draw)
    if style == "scenes" and draw.random() < 0.8:
        return _short_sentence(meaning, target, draw)
    named = _by_attributes(meaning, target, draw)
    return None if named is None else _noun_phrase(draw, meaning.objects[target], named)
