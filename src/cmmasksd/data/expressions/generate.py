"""Sentences that each name one object of an annotated image, and sentences that name none.

A sentence starts as a logical description: a noun and claims. It is kept when it is strictly true of its object and not
even loosely true of any other. Redundant claims are left out; sometimes one is put back, so that sentences vary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from cmmasksd.data.expressions.claims import Claim, true_claims
from cmmasksd.data.expressions.colours import naming_colours
from cmmasksd.data.expressions.instances import Instance
from cmmasksd.data.expressions.language import BEFORE_NOUN, word
from cmmasksd.data.expressions.meaning import ZONES, Meaning
from cmmasksd.data.expressions.words import BODY, PERSONS, PRONOUNS, WORN, Vocabulary

_SLOTS = {
    **dict.fromkeys(("zone", "corner", "nearest", "order", "ordinal", "middle", "size"), "place"),
    **dict.fromkeys(("relation", "has", "of"), "relation"),
    "colour": "colour",
}
"""A description has at most one claim of each slot."""
_ALONE = frozenset(("ordinal", "middle"))  # these count all of the kind: nothing else may narrow it
_EFFORT = {  # the higher, the rarer the claim
    "colour": 0.3,
    "zone": 0.5,
    "corner": 1.3,
    "nearest": 1.6,
    "order": 0.8,
    "ordinal": 0.6,
    "middle": 0.5,
    "size": 0.9,
    "relation": 0.6,
    "has": 0.2,
    "of": 0.8,
}
_EXTRA = frozenset(("colour", "zone", "corner", "relation", "has", "of"))
"""Kinds of claims that may be added where they are not needed."""


@dataclass(frozen=True, slots=True)
class Description:
    """A sentence and what it claims.

    Attributes:
        target: index of the object that it names; None where it names nothing in the image.
        text: the sentence.
        noun: what it calls the object.
        claims: everything else that it says of it.
    """

    target: int | None
    text: str
    noun: str
    claims: tuple[Claim, ...]


def describe(
    scene: Sequence[Instance],
    rng: random.Random,
    *,
    image: np.ndarray | None = None,
    vocabulary: Vocabulary | None = None,
    per_object: int = 1,
    keep: float = 0.4,
    min_area: float = 0.004,
) -> list[Description]:
    """Sentences about the objects of an image.

    A flipped image has other sentences: flip masks and image first. Colours that were measured before can be kept in
    `Instance.colours`.

    Args:
        scene: all annotated regions of the image, crowds and small ones too.
        rng: the only source of chance.
        image: (H, W, 3) uint8 RGB; None to say nothing of colours that the instances do not bring.
        vocabulary: the nouns.
        per_object: number of different sentences for each object, at most.
        keep: probability that a sentence says something true that it does not need.
        min_area: share of the image below which an object is never named.

    Returns:
        The sentences, grouped by object in the order of the scene. Objects that nothing tells from others have none.
    """
    if not scene:
        return []
    meaning = Meaning(scene, image, vocabulary=vocabulary, min_area=min_area)
    return describe_all(meaning, rng, per_object=per_object, keep=keep)


def describe_all(meaning: Meaning, rng: random.Random, *, per_object: int = 1, keep: float = 0.4) -> list[Description]:
    """`describe` for an image whose meaning exists already."""
    descriptions = []
    for target in range(len(meaning.instances)):
        if not meaning.nameable >> target & 1:
            continue
        texts: set[str] = set()
        for _ in range(3 * per_object - 2):
            description = _describe(meaning, target, rng, keep)
            if description is None:
                break
            if description.text not in texts:
                texts.add(description.text)
                descriptions.append(description)
            if len(texts) == per_object:
                break
    return descriptions


def _describe(meaning: Meaning, target: int, rng: random.Random, keep: float) -> Description | None:
    nouns = list(meaning.nouns(target))
    effort = {noun: rng.random() + 0.25 * bool(place) for place, noun in enumerate(nouns)}
    for noun in sorted(nouns, key=effort.__getitem__):
        claims = true_claims(meaning, target, noun)
        if noun in PRONOUNS:
            claims = [claim for claim in claims if claim.kind not in BEFORE_NOUN]
        chosen = _needed(meaning, target, noun, claims, rng)
        if chosen is None:
            continue
        if rng.random() < keep:
            chosen = _with_extra(chosen, claims, rng)
        return Description(target, word(meaning, target, noun, chosen, rng), noun, chosen)
    return None


def _needed(
    meaning: Meaning, target: int, noun: str, claims: Sequence[Claim], rng: random.Random
) -> tuple[Claim, ...] | None:
    """Claims that, with the noun, name the target alone, and none of which can be left out."""
    bit, kind = 1 << target, meaning.noun(noun)[1]
    if kind == bit:
        return ()
    single = [(claim,) for claim in claims if claim.loose & kind == bit]
    options: list[tuple[Claim, ...]] = list(single)
    rest = [claim for claim in claims if claim.loose & kind != bit and claim.kind not in _ALONE]
    options += [pair for pair in combinations(rest, 2) if _fit(*pair) and pair[0].loose & pair[1].loose & kind == bit]
    efforts = [sum(_EFFORT[claim.kind] + 0.5 for claim in option) + 1.2 * rng.random() for option in options]
    return min(zip(efforts, options, strict=True), key=lambda pair: pair[0])[1] if options else None


def _with_extra(chosen: tuple[Claim, ...], claims: Sequence[Claim], rng: random.Random) -> tuple[Claim, ...]:
    """The claims, and another true one beside them where it fits."""
    if any(claim.kind in _ALONE for claim in chosen):
        return chosen
    fitting = [c for c in claims if c.kind in _EXTRA and all(_fit(c, other) for other in chosen)]
    if not fitting:
        return chosen
    kind = rng.choice(sorted({claim.kind for claim in fitting}))
    return (*chosen, rng.choice([claim for claim in fitting if claim.kind == kind]))


def _fit(claim: Claim, other: Claim) -> bool:
    """Whether two claims make one good phrase: not "on the left left of the cup"."""
    if _SLOTS[claim.kind] == _SLOTS[other.kind]:
        return False
    sides = {claim.value, other.value} & {"left", "right", "above", "below"}
    return not (
        {claim.kind, other.kind} & {"zone", "corner", "nearest"} and "relation" in {claim.kind, other.kind} and sides
    )


def describe_nothing(meaning: Meaning, categories: Mapping[str, int], rng: random.Random) -> Description | None:
    """A sentence that is true of nothing in the image, not even loosely of a part of a crowd.

    Args:
        meaning: meaning of the image.
        categories: all classes that were labelled in the image if it has them, with their numbers in the data set.
        rng: the only source of chance.

    Returns:
        A class that the image lacks, or one that it has with a colour or in a place where it has none.
    """
    present = sorted({name for name in meaning.names if meaning.vocabulary.nouns(name)})
    if any(name in WORN - {"tie"} for name in present):  # such sets label one person, and not the passers-by
        present = [name for name in present if name not in PERSONS]
    absent = sorted(name for name, count in categories.items() if count and meaning.vocabulary.nouns(name))
    weights = [categories[name] ** 0.5 for name in absent]
    for _ in range(12):
        wrong = present and rng.random() < 0.5
        name = rng.choice(present) if wrong else rng.choices(absent, weights)[0] if absent else None
        if name is None:
            return None
        noun = rng.choice(meaning.vocabulary.nouns(name))
        kind = meaning.noun(noun)[1]
        claims: tuple[Claim, ...] = ()
        if wrong or rng.random() < 0.3:
            colours = sorted(naming_colours(name))
            if colours and rng.random() < 0.6:
                colour = rng.choice(colours)
                if colour == noun:
                    continue
                claims = (Claim("colour", colour, meaning.coloured(colour, most=0.08)),)
            elif name not in WORN | BODY:
                zone = rng.choice(sorted(ZONES))
                claims = (Claim("zone", zone, meaning.zones()[zone][1]),)
        loose = kind
        for claim in claims:
            loose &= claim.loose
        if not loose and (claims or not wrong):
            return Description(None, word(meaning, None, noun, claims, rng), noun, claims)
    return None


def unnamed(meaning: Meaning, named: set[int]) -> Counter[str]:
    """Why the objects that no sentence names have none."""
    reasons: Counter[str] = Counter()
    for index, instance in enumerate(meaning.instances):
        if index in named:
            continue
        if instance.crowd:
            reasons["crowds"] += 1
        elif meaning.tiny >> index & 1:
            reasons["too small"] += 1
        elif not instance.verified:
            reasons["not verified and not alone"] += 1
        elif meaning.vague >> index & 1:
            reasons["overlapping or misplaced masks"] += 1
        elif not meaning.vocabulary.nouns(instance.category):
            reasons["of a class that has no noun"] += 1
        else:
            reasons["nothing tells it from others"] += 1
    return reasons
