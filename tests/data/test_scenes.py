"""Generated scenes: every sentence is read back from its text alone and looked up in the scene by brute force.

The reader and the evaluator below share nothing with the generator: they know English ("leftmost", "partly behind") and
the list of objects, no bit masks and no margins. Everything the training relies on is checked besides: which pairs of
colour and shape are held out, that a scene depends on (seed, split, index, style) alone, and what the pixels show.
"""

import functools
import itertools
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

import cmmasksd
from cmmasksd.data.samples import Reference, ReferringDataset
from cmmasksd.data.scenes import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SPLITS,
    STYLES,
    Scene,
    SceneDataset,
    caption,
    describe,
    facts,
    make_scene,
    referring,
    render,
    twin,
)
from cmmasksd.data.scenes.drawing import _crop, stencil
from cmmasksd.data.scenes.vocabulary import FILLS, MIN_VISIBLE, REFERENCES_PER_SCENE, SIZES, SceneObject
from cmmasksd.errors import UserError

SCORED = ("train", "val", "testA", "testB")
PER_SPLIT = 270  # scenes of each style and split: 3240 in all

# ------------------------------------------------------------------------------------------------ reading the sentences

ADJECTIVES = {
    "small": ("size", "small"),
    "little": ("size", "small"),
    "medium": ("size", "medium"),
    "large": ("size", "large"),
    "big": ("size", "large"),
    "solid": ("fill", "solid"),
    "plain": ("fill", "solid"),
    "striped": ("fill", "striped"),
    "dotted": ("fill", "dotted"),
    "spotted": ("fill", "dotted"),
} | {c: ("colour", c) for c in ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")}
NOUNS = {s: ("shape", s) for s in ("circle", "square", "triangle", "star", "cross", "heart", "crescent", "diamond")}
NOUNS["moon"] = ("shape", "crescent")
ANY_NOUN = {"thing", "shape", "object", "one"}
SIDES = {"left", "right", "top", "bottom"}
ZONES = SIDES | {"top left", "top right", "bottom left", "bottom right", "middle"}
EXTREMES = {"leftmost": "left", "rightmost": "right", "topmost": "top", "lowest": "bottom", "bottommost": "bottom"}
RELATIONS = ("to the left of", "to the right of", "above", "below", "partly behind", "in front of")
PLACE_WORDS = {*SIDES, *EXTREMES, "middle", "center", "second", "from", "the", "on", "at", "in"}
RELATION_WORDS = {"that", "which", "is", "and", *(word for phrase in RELATIONS for word in phrase.split())}


@dataclass(frozen=True)
class Said:
    """What a sentence says: attributes of the object, where it is, and how it stands to other objects."""

    attributes: tuple[tuple[str, str], ...]
    place: tuple[str, str] | None = None  # ("zone" | "extreme" | "second", where)
    relations: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()


def read_noun_phrase(words: list[str]) -> tuple[tuple[str, str], ...]:
    """Adjectives, then one noun: "large striped heart"."""
    *adjectives, noun = words
    values = [ADJECTIVES[word] for word in adjectives]
    if noun not in ANY_NOUN:
        values.append(NOUNS[noun])
    assert len({name for name, _ in values}) == len(values), f"an attribute occurs twice: {words}"
    return tuple(values)


def read(sentence: str) -> Said:
    """The meaning of a sentence, from its words alone. Fails on any word or order of words that English has not."""
    if any(re.search(rf"\b{relation}\b", sentence) for relation in RELATIONS):
        return read_long(sentence)
    words = sentence.split()
    if words[0] == "second":
        *phrase, preposition, article, side = words[1:]
        assert (preposition, article) == ("from", "the")
        assert side in SIDES
        return Said(read_noun_phrase(phrase), ("second", side))
    if words[0] in EXTREMES:
        return Said(read_noun_phrase(words[1:]), ("extreme", EXTREMES[words[0]]))
    place: list[str] = []
    while words[0] in SIDES or words[0] in ("middle", "center"):
        place.append(words.pop(0))
    if not place:
        end = next((i for i, word in enumerate(words) if word in ANY_NOUN or word in NOUNS), 0) + 1
        words, place = words[:end], words[end:]
        if place and place[0] in ("on", "at", "in"):
            assert place[1] == "the"
            place = place[2:]
    zone = " ".join("middle" if word == "center" else word for word in place)
    assert not zone or zone in ZONES, f"no place: {zone!r} in {sentence!r}"
    return Said(read_noun_phrase(words), ("zone", zone) if zone else None)


def read_long(sentence: str) -> Said:
    """ "the A that is above the B and partly behind the C"."""
    head, *rest = re.split(rf" ({'|'.join(RELATIONS)}) the ", " " + sentence)
    match = re.fullmatch(r" the (.+?)(?: that is| which is)?", head)
    assert match, f"no head in {sentence!r}"
    anchors = [anchor.removesuffix(" and") for anchor in rest[1::2]]
    assert all(anchor.endswith(" and") for anchor in rest[1:-1:2]), f"relations run together in {sentence!r}"
    relations = tuple((name, read_noun_phrase(anchor.split())) for name, anchor in zip(rest[::2], anchors, strict=True))
    return Said(read_noun_phrase(match[1].split()), None, relations)


# ---------------------------------------------------------------------------------------------- what the sentences mean


def drawn(scene: Scene, index: int) -> np.ndarray:
    """All pixels of an object, hidden or not, (scene_size, scene_size) bool."""
    o, mask = scene.objects[index], np.zeros((scene.scene_size, scene.scene_size), bool)
    shape = stencil(o.shape, o.radius, o.turn) >= 0.5
    half = shape.shape[0] // 2
    mask[o.y - half : o.y + half + 1, o.x - half : o.x + half + 1] = shape
    return mask


def matching(scene: Scene, attributes) -> list[int]:
    return [i for i, o in enumerate(scene.objects) if all(getattr(o, name) == value for name, value in attributes)]


def in_zone(scene: Scene, o: SceneObject, zone: str, slack: float) -> bool:
    """ "left" is the left half, "middle" the middle third both ways; slack widens them."""
    x, y = o.x / scene.scene_size, o.y / scene.scene_size
    if zone == "middle":
        return all(1 / 3 - slack <= at <= 2 / 3 + slack for at in (x, y))
    half = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}
    return all(half[side] < 0.5 + slack for side in zone.split())


def along(o: SceneObject, side: str) -> int:
    """How far from a side of the image an object lies, up to a constant."""
    return {"left": o.x, "right": -o.x, "top": o.y, "bottom": -o.y}[side]


def stands(scene: Scene, index: int, relation: str, anchor: int, slack: float) -> bool:
    """Beside and above: further in that direction than in the other. Behind: pixels lie under it. Slack widens both."""
    if index == anchor:
        return False
    o, other = scene.objects[index], scene.objects[anchor]
    if relation in ("partly behind", "in front of"):
        if (index < anchor) != (relation == "partly behind"):
            return False  # later objects are drawn over earlier ones
        reach = o.radius + other.radius
        if max(abs(o.x - other.x), abs(o.y - other.y)) > reach + 2:
            return False  # even the frames of their stencils are apart
        if slack and (o.x - other.x) ** 2 + (o.y - other.y) ** 2 < reach**2:
            return True
        return bool((drawn(scene, index) & drawn(scene, anchor)).any())
    dx, dy = o.x - other.x, o.y - other.y
    ahead, aside = {
        "to the left of": (-dx, dy),
        "to the right of": (dx, dy),
        "above": (-dy, dx),
        "below": (dy, dx),
    }[relation]
    slack *= scene.scene_size
    return ahead > -slack and abs(aside) <= (abs(ahead) if not slack else 1.6 * abs(ahead) + slack)


def candidates(scene: Scene, parsed: Said, slack: float = 0.0) -> set[int]:
    """All objects that the words are true of. With slack: those of which somebody might say so."""
    objects = matching(scene, parsed.attributes)
    for relation, description in parsed.relations:
        anchors = matching(scene, description)
        objects = [i for i in objects if any(stands(scene, i, relation, anchor, slack) for anchor in anchors)]
    if parsed.place is None:
        return set(objects)
    kind, where = parsed.place
    if kind == "zone":
        return {i for i in objects if in_zone(scene, scene.objects[i], where, slack)}
    positions = sorted(along(scene.objects[i], where) for i in objects)
    if kind == "second" and slack and any(b - a < slack * scene.scene_size for a, b in itertools.pairwise(positions)):
        return set(objects)  # their order can be argued about
    wanted = positions[kind == "second"] + slack * scene.scene_size
    if kind == "second" and not slack:
        return {i for i in objects if along(scene.objects[i], where) == wanted}
    return {i for i in objects if along(scene.objects[i], where) <= wanted}


def thing(words: str, x: int, y: int, radius: int) -> SceneObject:
    size, fill, colour, shape = words.split()
    return SceneObject(shape, colour, size, fill, x, y, radius)


HAND_MADE = Scene(
    128,
    (
        thing("large solid red square", 40, 40, 20),
        thing("small striped blue star", 60, 34, 9),  # over the square's right edge
        thing("medium dotted blue star", 100, 30, 14),
        thing("small solid red circle", 30, 100, 9),
        thing("medium solid green crescent", 70, 66, 14),
        thing("medium solid blue star", 84, 104, 14),
    ),
    (),
    look=0,
)


@pytest.mark.parametrize(
    ("sentence", "objects"),
    [
        ("red one", {0, 3}),
        ("little thing", {1, 3}),
        ("plain moon", {4}),
        ("leftmost star", {1}),
        ("rightmost blue object", {2}),
        ("lowest medium shape", {5}),
        ("bottommost star", {5}),
        ("topmost star", {2}),
        ("second star from the left", {5}),
        ("second thing from the top", {1}),
        ("left star", {1}),
        ("star on the right", {2, 5}),
        ("top right star", {2}),
        ("star bottom right", {5}),
        ("star in the top left", {1}),
        ("thing at the bottom", {3, 4, 5}),
        ("center thing", {4}),
        ("solid shape in the middle", {4}),
        ("the star to the right of the square", {1, 2}),
        ("the star below the moon", {5}),
        ("the star above the moon", {1, 2}),
        ("the thing that is below the red square", {3, 5}),
        ("the thing which is to the left of the green one", {0, 3}),
        ("the thing partly behind the striped star", {0}),
        ("the star that is in front of the square", {1}),
        ("the one in front of the moon", set()),
        ("the star that is above the medium solid star and to the right of the dotted star", set()),
        ("the star that is above the moon and to the right of the little star", {2}),
    ],
)
def test_the_reader_understands_english(sentence, objects):
    assert candidates(HAND_MADE, read(sentence)) == objects


def test_the_reader_refuses_what_is_no_sentence():
    for sentence in ("red leftmost star", "red red star", "star red", "left", "the star the square", "star at left"):
        with pytest.raises((AssertionError, KeyError, IndexError)):
            read(sentence)


# ------------------------------------------------------------------------------------------------------- every sentence


@functools.cache
def scenes_of(style: str) -> list[tuple[str, int, Scene]]:
    """A few scenes of every split, mostly 128 pixels wide."""
    made = [(split, index, make_scene(3, split, index, style=style)) for split in SCORED for index in range(PER_SPLIT)]
    for scene_size in (64, 96, 200, 400):
        made += [
            ("train", index, make_scene(3, "train", index, style=style, scene_size=scene_size)) for index in range(20)
        ]
    return made


@functools.cache
def sentences_of(style: str) -> list[tuple[Scene, int, str, Said]]:
    return [
        (scene, target, sentence, read(sentence))
        for _, _, scene in scenes_of(style)
        for target, sentences in scene.references
        for sentence in sentences
    ]


def all_scenes() -> list[tuple[str, int, Scene]]:
    return [made for style in STYLES for made in scenes_of(style)]


def fewer(parsed: Said) -> list[Said]:
    """The description with one thing left out: an attribute, the place, or a relation."""
    shorter = [replace(parsed, place=None)] if parsed.place else []
    for name in ("attributes", "relations"):
        parts = getattr(parsed, name)
        shorter += [replace(parsed, **{name: tuple(part for part in parts if part != idle)}) for idle in parts]
    return shorter


@pytest.mark.parametrize("style", STYLES)
def test_every_sentence_is_true_of_its_object_alone(style):
    false = [
        f"{sentence!r} names {sorted(named)}, not {target}, in {scene}"
        for scene, target, sentence, parsed in sentences_of(style)
        if (named := candidates(scene, parsed)) != {target}
    ]
    assert not false, f"{len(false)} of {len(sentences_of(style))} sentences are false: {false[:3]}"


def test_a_corner_behind_the_anchor_counts():
    """Squares reach out of their discs with their corners: here "the square partly behind" once named two of them."""
    scene = make_scene(0, "train", 11012, style="scenesg")
    for target, sentences in scene.references:
        for sentence in sentences:
            assert candidates(scene, read(sentence)) == {target}


def test_an_anchor_is_one_object_and_every_word_of_it_counts():
    anchors = [(scene, words) for scene, _, _, parsed in sentences_of("scenesg") for _, words in parsed.relations]
    assert len(anchors) > 4000
    for scene, words in anchors:
        assert len(matching(scene, words)) == 1, words
        for left_out in words:
            assert len(matching(scene, [word for word in words if word != left_out])) > 1, (words, left_out)


@pytest.mark.parametrize("style", STYLES)
def test_every_word_matters(style):
    """Leave any word out and somebody could take the sentence for another object (in most cases: everybody)."""
    doubtful = 0
    shorter = [(*example, less) for *example, parsed in sentences_of(style) for less in fewer(parsed)]
    for scene, target, text, less in shorter:
        assert candidates(scene, less, slack=0.065) != {target}, f"{text!r} needs no more than {less}, in {scene}"
        doubtful += candidates(scene, less) == {target}
    assert len(shorter) > 4000
    assert doubtful < 0.25 * len(shorter)


def test_the_short_style_says_places():
    kinds = Counter(parsed.place[0] if parsed.place else "none" for _, _, _, parsed in sentences_of("scenes"))
    total = kinds.total()
    assert not any(parsed.relations for _, _, _, parsed in sentences_of("scenes"))
    # as in RefCOCO, where 45 % of the sentences name a region and 10 % an order
    assert 0.35 * total < kinds["zone"] < 0.55 * total
    assert 0.05 * total < kinds["extreme"] < 0.2 * total
    assert 0.005 * total < kinds["second"] < 0.05 * total
    assert kinds["none"] < 0.5 * total
    places = {parsed.place for _, _, _, parsed in sentences_of("scenes") if parsed.place}
    assert {where for kind, where in places if kind == "zone"} == ZONES
    assert {where for kind, where in places if kind == "extreme"} == SIDES


def test_the_plus_style_says_neither_place_nor_relation():
    words = {word for _, _, sentence, _ in sentences_of("scenes+") for word in sentence.split()}
    assert not words & (PLACE_WORDS | RELATION_WORDS)
    assert not any(parsed.place or parsed.relations for _, _, _, parsed in sentences_of("scenes+"))


def test_the_long_style_says_relations():
    descriptions = [parsed for _, _, _, parsed in sentences_of("scenesg")]
    assert all(each.relations and not each.place for each in descriptions)
    counts = Counter(name for each in descriptions for name, _ in each.relations)
    for beside in ("to the left of", "to the right of", "above", "below"):
        assert counts[beside] > 0.15 * len(descriptions)
    assert counts["partly behind"] > 0
    assert sum(len(each.relations) == 2 for each in descriptions) > 0.02 * len(descriptions)
    length = {style: np.mean([len(text.split()) for _, _, text, _ in sentences_of(style)]) for style in STYLES}
    assert length["scenesg"] > 2 * max(length["scenes"], length["scenes+"])


def test_the_vocabulary_is_closed():
    words = {style: {word for _, _, text, _ in sentences_of(style) for word in text.split()} for style in STYLES}
    things = ADJECTIVES.keys() | NOUNS.keys() | ANY_NOUN
    assert words["scenes"] == things | PLACE_WORDS
    assert words["scenes+"] == things
    # "in front of" may be missing: no two objects cover the same one, so it names its object without any attribute,
    # and sentences without attributes are not said
    assert things | RELATION_WORDS - {"in", "front"} <= words["scenesg"] <= things | RELATION_WORDS


def test_scenes_stay_what_the_shipped_clip_was_trained_on():
    """The seeds mean these very scenes. Whoever changes them must pretrain again."""
    scene = make_scene(0, "train", 0)
    assert scene.objects[0] == SceneObject("square", "white", "small", "solid", 37, 95, 11, 2)
    assert [make_scene(0, "train", 0, style=style).references[0] for style in STYLES] == [
        (5, ("right square",)),
        (2, ("cyan object", "cyan thing")),
        (8, ("the heart below the circle", "the heart below the striped heart")),
    ]


# --------------------------------------------------------------------------------------------------- what is in a scene


def test_objects_have_every_attribute():
    objects = [o for _, _, scene in all_scenes() for o in scene.objects]
    assert {o.shape for o in objects} == set(SHAPES)
    assert {o.colour for o in objects} == set(COLOURS)
    assert {o.size for o in objects} == set(SIZES)
    assert {o.fill for o in objects} == set(FILLS)
    assert len(SHAPES) >= 8
    assert len(COLOURS) >= 8
    assert len(SIZES) == len(FILLS) == 3


def test_three_to_ten_objects():
    counts = Counter(len(scene.objects) for _, _, scene in all_scenes())
    assert set(counts) == set(range(3, 11))
    assert min(counts.values()) > 0.01 * counts.total()


@pytest.mark.parametrize("scene_size", [64, 128, 400])
def test_sizes_do_not_overlap(scene_size):
    radii: dict[str, set[int]] = {size: set() for size in SIZES}
    for _, _, scene in all_scenes():
        if scene.scene_size == scene_size:
            for o in scene.objects:
                radii[o.size].add(o.radius)
    assert max(radii["small"]) < min(radii["medium"])
    assert max(radii["medium"]) < min(radii["large"])


def test_distractors_share_attributes():
    """Most targets have a neighbour of which at least two of the four attributes are the same."""
    most = []
    for _, _, scene in all_scenes():
        for target, _ in scene.references:
            others = [o.attributes for i, o in enumerate(scene.objects) if i != target]
            values = scene.objects[target].attributes
            most.append(max(sum(a == b for a, b in zip(values, other, strict=True)) for other in others))
    assert np.mean(np.array(most) >= 2) > 0.85
    assert np.mean(np.array(most) >= 3) > 0.6


def test_held_out_pairs_appear_in_test_b_only():
    assert len(HELD_OUT) == len({colour for colour, _ in HELD_OUT}) == len({shape for _, shape in HELD_OUT}) == 8
    seen: dict[str, set[tuple[str, str]]] = {split: set() for split in SCORED}
    for split, _, scene in all_scenes():
        seen[split] |= {(o.colour, o.shape) for o in scene.objects}
        if split == "testB":
            assert all((scene.objects[t].colour, scene.objects[t].shape) in HELD_OUT for t, _ in scene.references)
    every = set(itertools.product(COLOURS, SHAPES))
    for split in ("train", "val", "testA"):
        assert seen[split] == every - HELD_OUT
    assert seen["testB"] == every


def test_pretraining_captions_show_held_out_pairs():
    scenes = [make_scene(0, "pretrain", index) for index in range(60)]
    assert {(o.colour, o.shape) for scene in scenes for o in scene.objects} >= HELD_OUT


def test_every_scene_has_its_references():
    for _, _, scene in all_scenes():
        targets = [target for target, _ in scene.references]
        assert len(targets) == len(set(targets)) == REFERENCES_PER_SCENE
        assert all(1 <= len(texts) == len(set(texts)) <= 2 for _, texts in scene.references)
        for o in scene.objects:
            assert o.radius < min(o.x, o.y)
            assert max(o.x, o.y) < scene.scene_size - o.radius - 1


# ------------------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("drop", [0.0, 0.15, 0.5, 1.0])
def test_a_description_is_true_of_its_object(drop):
    draw = random.Random(0)
    attributes, places = [], []
    for _, _, scene in scenes_of("scenes+")[::4]:
        for index in range(len(scene.objects)):
            parsed = read(describe(scene, index, draw, drop=drop).text)
            assert index in candidates(scene, parsed), f"{parsed} is not true of {scene.objects[index]}"
            assert parsed.attributes or parsed.place
            attributes.append(len(parsed.attributes))
            places.append(parsed.place is not None)
    assert np.mean(attributes) == pytest.approx(4 * (1 - drop), abs=0.2)
    assert drop or np.mean(places) > 0.85, "a full description says where, unless the object is on a border of regions"


def claimed(scene: Scene, claims: int) -> set[int]:
    return {index for index, true in enumerate(facts(scene)) if claims & true == claims}


def test_claims_are_facts_of_the_objects_that_a_description_may_be_true_of():
    """In its own scene and another: at least the objects that it is true of, at most those somebody might say it of."""
    draw = random.Random(1)
    scenes = [scene for _, _, scene in scenes_of("scenes")[::6]]
    true = 0
    for scene, other in itertools.pairwise(scenes):
        for drop in (0.0, 0.5, 0.9):
            text, claims = describe(scene, draw.randrange(len(scene.objects)), draw, drop=drop)
            for place in (scene, other):
                claiming = claimed(place, claims)
                assert candidates(place, read(text)) <= claiming <= candidates(place, read(text), slack=0.065), text
            true += bool(claiming)
    assert 0.1 * 3 * len(scenes) < true < 0.9 * 3 * len(scenes)


@pytest.mark.parametrize("style", STYLES)
def test_claims_of_a_referring_sentence_are_its_objects_attributes(style):
    for scene, target, sentence, parsed in sentences_of(style)[::5]:
        text, claims = referring(sentence)
        assert text == sentence
        assert claimed(scene, claims) == set(matching(scene, parsed.attributes))
        assert target in claimed(scene, claims)


def test_a_caption_describes_different_objects_in_full():
    draw = random.Random(0)
    for _, _, scene in scenes_of("scenes")[::4]:
        text, claims = caption(scene, draw)
        phrases = text.split(", ")
        assert len(phrases) == len(claims) == 3
        meant = [candidates(scene, read(phrase.removeprefix("a "))) for phrase in phrases]
        assert any(len(set(objects)) == 3 for objects in itertools.product(*meant)), (phrases, scene)
        assert all(phrase.startswith("a ") and len(read(phrase[2:]).attributes) == 4 for phrase in phrases)
        assert all(objects <= claimed(scene, claim) for objects, claim in zip(meant, claims, strict=True))
    assert len(caption(scene, draw, most=1)[1]) == 1


def test_a_twin_differs_in_one_object():
    draw = random.Random(2)
    moved, differing = 0, Counter()
    scenes = [scene for _, _, scene in scenes_of("scenes")[::5]]
    for scene in scenes:
        other, index = twin(scene, draw)
        assert (other.look, other.scene_size, other.references) == (scene.look, scene.scene_size, ())
        assert [i for i, (a, b) in enumerate(zip(scene.objects, other.objects, strict=True)) if a != b] == [index]
        before, after = scene.objects[index], other.objects[index]
        assert after.radius < min(after.x, after.y)
        assert max(after.x, after.y) < scene.scene_size - after.radius - 1
        if (after.x, after.y) != (before.x, before.y):
            moved += 1
            assert replace(after, x=before.x, y=before.y) == before
        names = ("size", "fill", "colour", "shape")
        differing.update(name for name in names if getattr(before, name) != getattr(after, name))
        assert (before.size == after.size) == (before.radius == after.radius)
        images, owners = zip(render(scene), render(other), strict=True)
        shows = (owners[0] == index) | (owners[1] == index)
        near = np.zeros_like(shows)  # edges are antialiased, those of objects in front of it too
        for dy, dx in itertools.product(range(-2, 3), repeat=2):
            near |= np.roll(shows, (dy, dx), (0, 1))
        assert (images[0] != images[1])[~near].any(-1).sum() < 10
    assert 0.1 * len(scenes) < moved < 0.5 * len(scenes)
    assert min(differing.values()) > 0.1 * len(scenes)
    assert len(differing) == 4


# --------------------------------------------------------------------------------------------------------------- pixels


@functools.cache
def drawn_scenes() -> list[tuple[Scene, np.ndarray, np.ndarray]]:
    """A hundred rendered scenes of 128 pixels."""
    scenes = [scene for _, _, scene in all_scenes() if scene.scene_size == 128]
    return [(scene, *render(scene)) for scene in scenes[:: len(scenes) // 100]]


@pytest.mark.parametrize("scene_size", [64, 96, 128, 200, 400])
def test_an_image_has_the_size_of_its_canvas(scene_size):
    scene = make_scene(0, "train", 1, scene_size=scene_size)
    image, owner = render(scene)
    assert image.shape == (scene_size, scene_size, 3)
    assert image.dtype == np.uint8
    assert owner.shape == (scene_size, scene_size)
    assert set(np.unique(owner)) == set(range(-1, len(scene.objects)))
    edges = np.concatenate([image[:4].reshape(-1, 3), image[-4:].reshape(-1, 3)])
    assert edges.std() > 1, "the border is one flat colour"


@pytest.mark.parametrize("scene_size", [64, 160, 161, 200, 321, 400, 700])
def test_a_crop_is_one_piece_of_the_endless_tile(scene_size):
    rows, columns = np.mgrid[:320, :320]
    for seed in range(4):
        at = _crop(np.stack([rows, columns]), scene_size, random.Random(seed))
        assert at.shape == (2, scene_size, scene_size)
        assert (np.diff(at[0], axis=0) % 320 == 1).all()
        assert (np.diff(at[1], axis=1) % 320 == 1).all()
        assert (np.diff(at[0], axis=1) == 0).all()
        assert (np.diff(at[1], axis=0) == 0).all()


def test_each_pixel_belongs_to_the_frontmost_object():
    for scene, _, owner in drawn_scenes()[:40]:
        expected = np.full(owner.shape, -1)
        for index in range(len(scene.objects)):
            expected[drawn(scene, index)] = index
        np.testing.assert_array_equal(owner, expected)


@pytest.mark.parametrize("scene_size", [64, 128])
def test_objects_are_hidden_in_part_only(scene_size):
    least = []  # visible fraction of the most hidden object of each scene
    for index in range(80):
        scene = make_scene(0, "val", index, scene_size=scene_size)
        _, owner = render(scene)
        least.append(min((owner == nth).sum() / drawn(scene, nth).sum() for nth in range(len(scene.objects))))
    assert min(least) > MIN_VISIBLE - 0.02  # corners of squares reach out of their discs and may hide a little more
    assert 0.15 < np.mean(np.array(least) < 0.97) < 0.9
    assert min(least) < 0.85, "nothing is hidden by more than a corner"


def test_an_object_has_the_colour_and_the_fill_that_are_said_of_it():
    for scene, image, owner in drawn_scenes():
        for index, o in enumerate(scene.objects):
            pixels = image[owner == index].astype(float)
            nominal = {colour: np.array(level) for colour, level in COLOURS.items()}
            dark = pixels.sum(1) < 0.7 * nominal[o.colour].sum()
            colour = np.median(pixels[~dark], axis=0)
            assert min(COLOURS, key=lambda name: abs(nominal[name] - colour).sum()) == o.colour
            low, high = {"solid": (0, 0.15), "striped": (0.25, 0.7), "dotted": (0.15, 0.5)}[o.fill]
            assert low <= dark.mean() <= high, o


def test_backgrounds_are_textured_and_noisy():
    for _, image, owner in drawn_scenes():
        grey, background = image.astype(float).mean(2), owner < 0
        beside = background[:, 1:] & background[:, :-1]
        assert np.diff(image.astype(float), axis=1)[beside].std() > 2, "no noise"
        windows = np.lib.stride_tricks.sliding_window_view
        smooth = windows(grey, (8, 8))[::2, ::2].mean((2, 3))
        assert smooth[windows(background, (8, 8))[::2, ::2].all((2, 3))].std() > 1, "no texture"


def test_shapes_can_be_told_apart():
    for a, b in itertools.combinations(SHAPES, 2):
        for turns in itertools.product((-2, 0, 2), repeat=2):
            first, second = (stencil(shape, 9, turn) >= 0.5 for shape, turn in zip((a, b), turns, strict=True))
            assert (first & second).sum() < 0.88 * (first | second).sum(), f"a {a} looks like a {b}"


def test_a_stencil_is_antialiased_and_fills_its_frame():
    for shape in SHAPES:
        cover = stencil(shape, 20, 1)
        assert cover.shape == (43, 43)
        assert cover.min() == 0
        assert cover.max() == 1
        assert 0 < ((cover > 0) & (cover < 1)).mean() < 0.2
        rows, columns = np.nonzero(cover >= 0.5)
        assert max(np.ptp(rows), np.ptp(columns)) >= 1.6 * 20


# ---------------------------------------------------------------------------------------------------------- determinism

DIGEST = """
import hashlib
from cmmasksd.data.scenes import SPLITS, STYLES, make_scene, render
digest = hashlib.sha256()
for style in STYLES:
    for split in SPLITS:
        for index in (0, 7):
            scene = make_scene(11, split, index, style=style)
            digest.update(repr((scene, scene.look)).encode())
            for array in render(scene):
                digest.update(array.tobytes())
print(digest.hexdigest())
"""


def test_another_process_draws_the_same_scenes(capsys):
    exec(DIGEST, {})
    here = capsys.readouterr().out
    source = str(Path(cmmasksd.__file__).parents[1])
    for salt in ("1", "2"):  # of the hashes of strings, which decide the order of sets
        environment = os.environ | {"PYTHONPATH": source, "PYTHONHASHSEED": salt}
        command = [sys.executable, "-c", DIGEST]
        elsewhere = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
        assert elsewhere.stdout == here


def test_seed_split_index_and_style_all_matter():
    scenes = [
        make_scene(0, "train", 0),
        make_scene(1, "train", 0),
        make_scene(0, "val", 0),
        make_scene(0, "train", 1),
        make_scene(0, "train", 0, style="scenes+"),
    ]
    assert len({scene.objects for scene in scenes}) == len({scene.look for scene in scenes}) == 5
    assert make_scene(0, "train", 0) == scenes[0]
    images = [render(scene)[0] for scene in scenes]
    assert len({image.tobytes() for image in images}) == 5
    np.testing.assert_array_equal(render(scenes[0])[0], images[0])


class Items(Dataset):
    """What training loads of a data set: a reference with its image and mask."""

    def __init__(self) -> None:
        self.data = SceneDataset("scenesg", "train", 12, scene_size=64)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Reference, np.ndarray, np.ndarray]:
        reference = self.data[index]
        return reference, self.data.image(reference), self.data.mask(reference)


def itself(item):
    return item


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_number_of_workers_changes_nothing(workers):
    order = [5, 0, 11, 3, 4, 2, 8, 7, 1, 10, 6, 9]  # so that no worker draws its scenes one after the other
    context = "fork" if workers else None
    loader = DataLoader(
        Items(), batch_size=None, sampler=order, num_workers=workers, collate_fn=itself, multiprocessing_context=context
    )
    for index, (reference, image, mask) in zip(order, loader, strict=True):
        fresh = SceneDataset("scenesg", "train", 12, scene_size=64)
        assert reference == fresh[index]
        np.testing.assert_array_equal(image, fresh.image(reference))
        np.testing.assert_array_equal(mask, fresh.mask(reference))


# --------------------------------------------------------------------------------------------------------- the data set


@pytest.mark.parametrize(("asked", "given"), [(1, 3), (3, 3), (4, 6), (30, 30)])
def test_length_is_rounded_up_to_whole_scenes(asked, given):
    data: ReferringDataset = SceneDataset("scenes", "val", asked)
    assert len(data) == given
    assert [list(group) for group in data.groups()] == [[i, i + 1, i + 2] for i in range(0, given, 3)]
    for outside in (given, -1, -given):
        with pytest.raises(IndexError):
            data[outside]


def test_references_of_a_group_share_an_image_and_differ_in_mask():
    data: ReferringDataset = SceneDataset("scenes+", "testA", 12, seed=4, scene_size=96)
    assert (data.name, data.split) == ("scenes+", "testA")
    for nth, group in enumerate(data.groups()):
        scene = make_scene(4, "testA", nth, style="scenes+", scene_size=96)
        image, owner = render(scene)
        references = [data[i] for i in group]
        assert len({reference.image_id for reference in references}) == 1
        for reference, (target, sentences) in zip(references, scene.references, strict=True):
            assert reference.split == "testA"
            assert tuple(expression.text for expression in reference.expressions) == sentences
            np.testing.assert_array_equal(data.image(reference), image)
            mask = data.mask(reference)
            assert mask.dtype == bool
            assert mask.any()
            np.testing.assert_array_equal(mask, owner == target)


def test_identifiers_are_unique_across_splits():
    images, references, annotations, sentences = [], [], [], []
    for split in SPLITS:
        data = SceneDataset("scenes", split, 60)
        images += {reference.image_id for reference in data}
        references += [reference.ref_id for reference in data]
        annotations += [identifier for reference in data for identifier in reference.ann_ids]
        sentences += [expression.sent_id for reference in data for expression in reference.expressions]
    for identifiers in (images, references, annotations, sentences):
        assert len(identifiers) == len(set(identifiers))
    assert len(references) == 60 * len(SPLITS)


@pytest.mark.parametrize(
    ("wrong", "value", "remedy"),
    [
        ({"name": "scenes++"}, "'scenes++'", "choose one of scenes, scenes+, scenesg"),
        ({"split": "test"}, "'test'", "choose one of train, val, testA, testB"),
        ({"scene_size": 63}, "63", "use at least 64"),
        ({"references": 0}, "0 references", "ask for at least 1"),
        ({"references": -3}, "-3 references", "ask for at least 1"),
    ],
)
def test_mistakes_are_named_with_their_remedy(wrong, value, remedy):
    with pytest.raises(UserError) as caught:
        SceneDataset(**({"name": "scenes", "split": "val", "references": 3} | wrong))
    message = str(caught.value)
    assert value in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize(("references", "scene_size"), [(10**9, 64), (3, 10**9)])
def test_a_data_set_that_would_take_all_memory_is_refused(references, scene_size):
    with pytest.raises(UserError, match="too large: "):
        SceneDataset("scenes", "val", references, scene_size=scene_size)
