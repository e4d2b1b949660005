"""Wording of descriptions: a noun, and the claims that tell its object from all others."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cmmasksd.data.expressions.claims import Claim
from cmmasksd.data.expressions.meaning import Meaning
from cmmasksd.data.expressions.words import ADORNMENTS, BODY, CARRIED, MOUNTS, PERSONS, PRONOUNS, WORN

_ORDER = {
    "leftmost": ("leftmost",),
    "rightmost": ("rightmost",),
    "topmost": ("topmost", "highest"),
    "bottommost": ("lowest", "bottommost"),
}
_OF_TWO = {"leftmost": "left", "rightmost": "right", "topmost": "upper", "bottommost": "lower"}
_FROM = {"leftmost": "left", "rightmost": "right", "topmost": "top", "bottommost": "bottom"}
_ORDINALS = {"2": "second", "3": "third", "4": "fourth"}
_SIZES = {"largest": ("largest", "biggest"), "smallest": ("smallest",)}
_RELATIONS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above",),
    "below": ("below",),
    "next to": ("next to", "beside"),
    "on": ("on",),
    "under": ("under",),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
BEFORE_NOUN = frozenset(("order", "ordinal", "size"))
"""Kinds of claims that always stand before the noun."""


def word(meaning: Meaning, target: int | None, noun: str, claims: Sequence[Claim], rng: random.Random) -> str:
    """Word a description.

    Args:
        meaning: meaning of the image.
        target: index of the object; None where the description is true of nothing.
        noun: what the object is called.
        claims: at most one of each of place, colour, and relation.
        rng: chooses between words for the same thing.
    """
    before: list[str] = []
    after: list[str] = []
    pronoun = noun in PRONOUNS
    for claim in sorted(claims, key=lambda claim: claim.anchor is not None):  # nothing may seem to be said of an anchor
        match claim.kind:
            case "colour":
                if noun in PERSONS | PRONOUNS:
                    after.insert(0, rng.choice((f"in {claim.value}", f"dressed in {claim.value}")))
                else:
                    before.append(claim.value)
            case "zone":
                # "left dog" is also the left one of two that are both on the right
                before_noun = not pronoun and target is not None and rng.random() < 0.35
                _place(claim.value, before if before_noun else None, after, rng)
            case "corner":
                after.append(f"in the {claim.value} corner")
            case "nearest":
                after.append(f"{rng.choice(('nearest', 'closest to'))} the {claim.value} corner")
            case "order":
                pair = meaning.noun(noun)[1].bit_count() == 2
                word_of = _OF_TWO[claim.value] if pair else rng.choice(_ORDER[claim.value])
                before.insert(0, word_of)
            case "ordinal":
                place, name = claim.value.split()
                before.insert(0, _ORDINALS[place])
                after.append(f"from the {_FROM[name]}")
            case "middle":
                if pronoun or rng.random() < 0.5:
                    after.append(rng.choice(("in the middle", "in the middle of the three")))
                else:
                    before.insert(0, "middle")
            case "size":
                before.insert(0, rng.choice(_SIZES[claim.value]))
            case "relation" | "of":
                after.append(_relation(meaning, target, claim, rng))
            case "has":
                after.append(_has(meaning, claim, rng))
    phrase = " ".join([*before, noun, *after])
    article = not pronoun and rng.random() < (0.9 if "ordinal" in {claim.kind for claim in claims} else 0.4)
    if article and target is None and not claims:
        article = rng.random() < 0.5
    return f"the {phrase}" if article else phrase


def _place(zone: str, before: list[str] | None, after: list[str], rng: random.Random) -> None:
    if before is not None:
        before.insert(0, zone)
    elif zone == "middle":
        after.append(rng.choice(("in the middle", "in the center")))
    elif " " in zone:
        after.append(rng.choice((f"at the {zone}", f"on the {zone}")))
    elif zone in ("left", "right"):
        after.append(rng.choice((f"on the {zone}", f"on the {zone} side", f"at {zone}")))
    else:
        after.append(rng.choice((f"at the {zone}", f"in the {zone} part")))


def _relation(meaning: Meaning, target: int | None, claim: Claim, rng: random.Random) -> str:
    assert claim.anchor is not None
    noun = meaning.vocabulary.nouns(meaning.names[claim.anchor])[0]
    if claim.kind == "of":
        worn = target is not None and meaning.names[target] in WORN
        return rng.choice((f"of the {noun}", f"that the {noun} is wearing") if worn else (f"of the {noun}",))
    words = rng.choice(_RELATIONS[claim.value])
    if claim.value == "on" and meaning.names[claim.anchor] in MOUNTS and rng.random() < 0.6:
        words = "riding"
    return f"{words} the {noun}"


def _has(meaning: Meaning, claim: Claim, rng: random.Random) -> str:
    assert claim.anchor is not None
    name = meaning.names[claim.anchor]
    noun = rng.choice(meaning.vocabulary.nouns(name))
    thing = noun if claim.colour is None else f"{claim.colour} {noun}"
    if name in BODY:
        return f"with {thing}"
    several = noun == "footwear" or (noun.endswith("s") and not noun.endswith("ss"))
    article = rng.choice(("the ", "")) if several else rng.choice(("the ", "an " if thing[0] in "aeiou" else "a "))
    if name in CARRIED:
        return f"with {article}{thing}"
    if name in ADORNMENTS:
        return f"{rng.choice(('wearing', 'with'))} {article}{thing}"
    return f"{rng.choice(('in', 'wearing'))} {article}{thing}"
