"""Each kind of word, and what makes a sentence ambiguous."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cmmasksd.data.expressions import Instance, Vocabulary, describe
from cmmasksd.data.expressions.claims import true_claims
from cmmasksd.data.expressions.colours import may_be_called, measure_colours, sure_colour
from cmmasksd.data.expressions.generate import describe_nothing, unnamed
from cmmasksd.data.expressions.meaning import Meaning
from cmmasksd.data.expressions.shapes import measure_shape
from cmmasksd.data.expressions.words import class_key, read_synonyms
from cmmasksd.errors import UserError
from data.expressions.layouts import COLOURS, HEIGHT, WIDTH, box_mask, instance

LEFT, RIGHT = (10, 40, 50, 80), (105, 40, 150, 80)


def texts(scene: Sequence[Instance], target: int, image: np.ndarray | None = None, **more: float) -> set[str]:
    """All that is said of an object by many draws, without the article."""
    wordings = set()
    for seed in range(60):
        for description in describe(scene, random.Random(seed), image=image, keep=more.get("keep", 0)):
            if description.target == target:
                wordings.add(description.text.removeprefix("the "))
    return wordings


def claims(scene: Sequence[Instance], target: int, image: np.ndarray | None = None) -> set[tuple[str, str]]:
    meaning = Meaning(scene, image)
    return {(claim.kind, claim.value) for claim in true_claims(meaning, target, meaning.nouns(target)[0])}


# ------------------------------------------------------------------------------------------------------------- words


def test_an_object_alone_of_its_class_is_called_by_each_noun_and_no_more():
    scene = [instance("couch", *LEFT), instance("gizmo", *RIGHT)]
    assert texts(scene, 0) == {"couch", "sofa"}
    assert texts(scene, 1) == {"gizmo"}


def test_person_words_are_true():
    assert texts([instance("person", *LEFT)], 0) == {"person", "somebody", "someone"}
    assert "woman" not in " ".join(texts([instance("person", *LEFT)], 0, keep=1))
    assert texts([instance("woman", *LEFT)], 0) == {"woman", "lady", "person"}


def test_pronouns_take_no_adjective():
    wordings = texts([instance("person", *LEFT), instance("person", *RIGHT)], 0)
    assert {"left person", "somebody on the left"} <= wordings
    assert not [text for text in wordings if text.endswith(("somebody", "someone")) and " " in text]


def test_classes_that_people_mix_up_do_not_name_an_object_alone():
    scene = [instance("car", *LEFT), instance("truck", *RIGHT)]
    assert "car" not in texts(scene, 0)
    assert "car on the left" in texts(scene, 0)
    assert "car" in texts([instance("car", *LEFT), instance("dog", *RIGHT)], 0)


def test_a_kind_of_classes_is_named_only_where_all_classes_are_known():
    assert "animal" in texts([instance("dog", *LEFT), instance("couch", *RIGHT)], 0)
    assert "animal" not in texts([instance("dog", *LEFT), instance("cat", *RIGHT)], 0)
    assert "animal" not in texts([instance("dog", *LEFT), instance("capybara", *RIGHT)], 0)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("aeroplane", "airplane"),
        ("diningtable", "dining table"),
        ("T-shirt", "t-shirt"),
        ("Sofa", "couch"),
        ("traffic_light", "traffic light"),
        ("cell-phone", "cell phone"),
        ("My  Gizmo", "my gizmo"),
    ],
)
def test_spellings_of_classes(name: str, key: str):
    assert class_key(name) == key


def test_synonyms_replace_the_nouns(tmp_path: Path):
    file = tmp_path / "words.yaml"
    file.write_text("gizmo: [gizmo, small device]\nDog: hound\n")
    vocabulary = Vocabulary(read_synonyms(file))
    assert vocabulary.nouns("gizmo") == ("gizmo", "small device")
    scene = [instance("dog", *LEFT), instance("gizmo", *RIGHT)]
    made = describe(scene, random.Random(0), vocabulary=vocabulary, per_object=9, keep=0)
    assert {d.text.removeprefix("the ") for d in made} == {"hound", "gizmo", "small device"}


@pytest.mark.parametrize(
    "content", ["", "[a]", "gizmo: []", "gizmo: [1]", "gizmo: ['']", "1: x", "a: [b", "gizmo: [' ']"]
)
def test_synonyms_that_are_none(tmp_path: Path, content: str):
    (tmp_path / "words.yaml").write_text(content)
    with pytest.raises(UserError, match=r"words\.yaml"):
        read_synonyms(tmp_path / "words.yaml")
    with pytest.raises(UserError, match="does not exist"):
        read_synonyms(tmp_path / "absent.yaml")


# ---------------------------------------------------------------------------------------------- places, order and size


@pytest.mark.parametrize(
    ("box", "zones"),
    [
        ((5, 45, 40, 75), {"left"}),
        ((120, 45, 155, 75), {"right"}),
        ((65, 5, 95, 30), {"top"}),
        ((65, 90, 95, 115), {"bottom"}),
        ((65, 45, 95, 75), {"middle"}),
        ((5, 5, 35, 30), {"left", "top", "top left"}),
        ((125, 90, 155, 115), {"right", "bottom", "bottom right"}),
        ((0, 0, WIDTH, HEIGHT), set()),
        ((45, 45, 115, 75), {"middle"}),
        ((60, 50, 85, 75), set()),
    ],
)
def test_zones(box: tuple[int, int, int, int], zones: set[str]):
    if box == (60, 50, 85, 75):  # its centre is neither in the middle nor clearly to the left
        box = (55, 45, 72, 75)
        zones = {"left"} if 0.4 * WIDTH >= (55 + 72) / 2 else set()
    assert {value for kind, value in claims([instance("dog", *box)], 0) if kind == "zone"} == zones


def test_a_zone_that_another_of_its_kind_might_be_said_to_lie_in_does_not_name():
    scene = [instance("dog", 5, 45, 40, 75), instance("dog", 60, 45, 90, 75)]
    assert "dog on the left" not in texts(scene, 0)
    assert texts(scene, 0) == {"left dog", "left animal"}


def test_order_needs_a_margin():
    apart = [instance("dog", 10, 40, 40, 80), instance("dog", 30, 40, 62, 80)]
    level = [instance("dog", 10, 10, 40, 40), instance("dog", 14, 70, 44, 100)]
    assert ("order", "leftmost") in claims(apart, 0)
    assert texts(apart, 0) == {"left dog", "left animal"}
    assert not {"left dog", "leftmost dog"} & texts(level, 0)


def test_ordinals_count_from_both_ends():
    row = [instance("dog", x, 45, x + 20, 75) for x in (5, 45, 85, 125)]
    assert {"second dog from the left", "third dog from the right"} & texts(row, 1)
    assert {"third dog from the left", "second dog from the right"} & texts(row, 2)
    assert ("ordinal", "2 leftmost") in claims(row, 1)
    assert ("ordinal", "4 leftmost") not in claims(row, 3)
    assert not any(kind == "ordinal" for kind, _ in claims(row[:2], 1))
    assert ("middle", "middle") not in claims(row, 1)
    three = [instance("dog", x, 45, x + 20, 75) for x in (5, 70, 135)]
    assert ("middle", "middle") in claims(three, 1)


def test_size_needs_a_margin():
    scene = [instance("dog", 10, 40, 60, 100), instance("dog", 100, 50, 120, 70)]
    assert {"largest dog", "biggest dog"} & texts(scene, 0)
    assert ("size", "smallest") in claims(scene, 1)
    near = [instance("dog", 10, 40, 60, 100), instance("dog", 90, 40, 135, 95)]
    loose = {claim.kind: claim.loose for claim in true_claims(Meaning(near), 0, "dog")}
    assert loose["size"] == 0b11


def test_the_smallest_is_not_one_that_the_border_cuts():
    scene = [instance("dog", 0, 50, 20, 70), instance("dog", 60, 40, 120, 100)]
    assert ("size", "smallest") not in claims(scene, 0)


# ------------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((200, 25, 30), "red"),
        ((240, 130, 20), "orange"),
        ((245, 215, 40), "yellow"),
        ((40, 140, 50), "green"),
        ((30, 60, 190), "blue"),
        ((110, 40, 140), "purple"),
        ((250, 150, 190), "pink"),
        ((110, 70, 40), "brown"),
        ((245, 245, 245), "white"),
        ((130, 130, 130), "gray"),
        ((15, 15, 15), "black"),
        ((70, 200, 200), None),
        ((200, 170, 130), None),
    ],
)
def test_colours_have_their_names(rgb: tuple[int, int, int], name: str | None):
    image = np.full((HEIGHT, WIDTH, 3), rgb, dtype=np.uint8)
    shares = measure_colours(image, box_mask(10, 10, 60, 60))
    assert shares is not None
    assert sure_colour(shares) == name
    assert name is None or may_be_called(shares, name)


def test_two_colours_are_none_but_black_and_white():
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    mask = box_mask(20, 20, 60, 60)
    for other, name in (((245, 245, 245), "black and white"), ((200, 25, 30), None)):
        image[20:40] = other
        shares = measure_colours(image, mask)
        assert shares is not None
        assert sure_colour(shares) == name


def test_colours_are_left_out_without_an_image_and_of_few_pixels():
    image = np.full((HEIGHT, WIDTH, 3), COLOURS["red"], dtype=np.uint8)
    scene = [instance("gizmo", *LEFT)]
    assert any("red" in text for text in texts(scene, 0, image, keep=1))
    assert not any("red" in text for text in texts(scene, 0, keep=1))
    assert measure_colours(image, box_mask(0, 0, 10, 10)) is None


def test_a_person_is_in_a_colour_and_an_animal_has_only_those_of_fur():
    image = np.full((HEIGHT, WIDTH, 3), COLOURS["red"], dtype=np.uint8)
    assert {"person in red", "somebody in red"} <= texts([instance("person", *LEFT)], 0, image, keep=1)
    assert not any("red" in text for text in texts([instance("dog", *LEFT)], 0, image, keep=1))


def test_colours_given_with_the_instances_need_no_image():
    image = np.full((HEIGHT, WIDTH, 3), COLOURS["red"], dtype=np.uint8)
    image[:, WIDTH // 2 :] = COLOURS["blue"]
    scene = [instance("gizmo", *LEFT), instance("gizmo", *RIGHT)]
    measured = [replace(x, colours=measure_colours(image, x.mask)) for x in scene]
    assert "red gizmo" in texts(measured, 0)
    flipped = [replace(x, mask=x.mask[:, ::-1]) for x in measured]
    assert {"red gizmo", "right gizmo"} <= texts(flipped, 0)
    assert "left gizmo" not in texts(flipped, 0)


# ----------------------------------------------------------------------------------------------------------- relations


def test_sides_of_another_object():
    scene = [instance("dog", 5, 50, 35, 90), instance("cat", 60, 50, 90, 90), instance("dog", 115, 50, 150, 90)]
    assert ("relation", "left") in claims(scene, 0)
    assert ("relation", "right") in claims(scene, 2)
    assert any(text.endswith("left of the cat") for text in texts(scene, 0))


def test_above_is_not_said_of_what_stands_on_the_ground():
    boxes = (60, 10, 90, 40), (60, 70, 90, 110)
    assert ("relation", "above") in claims([instance("gizmo", *boxes[0]), instance("widget", *boxes[1])], 0)
    assert ("relation", "above") not in claims([instance("dog", *boxes[0]), instance("cat", *boxes[1])], 0)


def test_next_to_is_close_and_level():
    beside = [instance("dog", 40, 50, 70, 90), instance("cat", 74, 50, 104, 90)]
    assert ("relation", "next to") in claims(beside, 0)
    assert ("relation", "next to") not in claims([beside[0], instance("cat", 110, 50, 140, 90)], 0)
    assert ("relation", "next to") not in claims([beside[0], instance("cat", 74, 10, 104, 60)], 0)


def test_on_needs_what_it_lies_on_below_it():
    couch = box_mask(20, 50, 140, 110)
    dog = box_mask(60, 40, 90, 80)
    assert ("relation", "on") in claims([Instance("dog", dog), Instance("couch", couch & ~dog)], 0)
    floor = box_mask(60, 70, 90, 118)
    assert ("relation", "on") not in claims([Instance("dog", floor), Instance("couch", couch & ~floor)], 0)


def test_a_rider_is_on_a_horse_and_somebody_behind_it_is_not():
    horse = box_mask(30, 60, 130, 100) | box_mask(115, 30, 130, 60)
    rider = box_mask(70, 25, 85, 85)
    assert ("relation", "on") in claims([Instance("person", rider), Instance("horse", horse & ~rider)], 0)
    behind = box_mask(70, 25, 85, 60)
    assert ("relation", "on") not in claims([Instance("person", behind), Instance("horse", horse)], 0)


def test_depth_is_said_only_where_it_is_known():
    near, far = box_mask(40, 40, 90, 100), box_mask(70, 30, 130, 90)
    scene = [Instance("dog", near, order=1), Instance("cat", far & ~near, order=2)]
    assert ("relation", "in front of") in claims(scene, 0)
    assert ("relation", "behind") in claims(scene, 1)
    unknown = [replace(x, order=None) for x in scene]
    assert not {value for _, value in claims(unknown, 0)} & {"in front of", "behind"}


def test_garments_and_their_wearer():
    image = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    left, right = box_mask(20, 10, 60, 115), box_mask(100, 10, 140, 115)
    skirt, other = box_mask(25, 60, 55, 90), box_mask(105, 60, 135, 90)
    image[skirt], image[other] = COLOURS["red"], COLOURS["blue"]
    scene = [Instance("person", left), Instance("person", right), Instance("skirt", skirt), Instance("skirt", other)]
    wordings = texts(scene, 0, image)
    assert {"person in the red skirt", "somebody wearing a red skirt"} <= wordings
    assert not any(text.endswith(("in a skirt", "in the skirt")) for text in wordings)
    assert texts(scene, 2, image) == {"red skirt"}
    alone = [scene[0], scene[2]]
    assert {"skirt", "red skirt", "skirt of the person"} <= texts(alone, 1, image, keep=0.7)


def test_a_garment_of_nobody_says_nothing_of_a_person():
    scene = [instance("person", 10, 10, 50, 110), instance("hat", 100, 50, 130, 80)]
    assert not any(kind == "has" for kind, _ in claims(scene, 0))


# ----------------------------------------------------------------------------------------------------------- ambiguity


@pytest.mark.parametrize(
    "other",
    [{"crowd": True}, {"verified": False}],
    ids=["crowd", "unverified"],
)
def test_vague_regions_make_counting_impossible(other: dict[str, bool]):
    scene = [instance("dog", *LEFT), instance("dog", *RIGHT, **other)]
    meaning = Meaning(scene)
    assert meaning.nameable == 0b01
    assert texts(scene, 0) >= {"dog on the left", "dog on the left side", "left dog"}
    assert all("left" in text and "most" not in text for text in texts(scene, 0))
    for claim in true_claims(meaning, 0, "dog"):
        if claim.kind in ("order", "size", "nearest"):
            assert claim.loose == 0b11
    assert not any(claim.kind in ("ordinal", "middle") for claim in true_claims(meaning, 0, "dog"))


def test_an_unverified_mask_is_named_only_alone():
    alone = [instance("dog", *LEFT, verified=False), instance("cat", *RIGHT)]
    assert "dog" in texts(alone, 0)
    beside = [instance("dog", *LEFT, verified=False), instance("dog", *RIGHT, verified=False)]
    assert not describe(beside, random.Random(0))
    assert unnamed(Meaning(beside), set()) == {"not verified and not alone": 2}


def test_tiny_objects_are_neither_named_nor_overlooked():
    scene = [instance("dog", 10, 40, 50, 80), instance("dog", 30, 100, 34, 104)]
    assert not any(text == "dog" or "leftmost" in text for text in texts(scene, 0))
    assert "largest dog" in texts(scene, 0)
    assert texts(scene, 1) == set()
    assert unnamed(Meaning(scene), {0}) == {"too small": 1}


def test_two_masks_on_the_same_pixels_are_not_named():
    scene = [instance("dog", 10, 40, 60, 80), instance("dog", 12, 42, 60, 80), instance("cat", *RIGHT)]
    assert texts(scene, 0) == texts(scene, 1) == set()
    assert {"cat", "kitty"} <= texts(scene, 2)
    assert unnamed(Meaning(scene), {2}) == {"overlapping or misplaced masks": 2}


def test_a_garment_that_is_not_where_it_is_worn_is_not_named():
    person = Instance("person", box_mask(20, 10, 60, 115))
    assert "dress" in texts([person, Instance("dress", box_mask(25, 30, 55, 90))], 1)
    assert texts([person, Instance("dress", box_mask(25, 60, 55, 90))], 1) == set()
    assert "skirt" in texts([person, Instance("skirt", box_mask(25, 60, 55, 90))], 1)
    assert texts([person, Instance("skirt", box_mask(25, 30, 55, 90))], 1) == set()


def test_a_crowd_is_never_an_anchor():
    scene = [instance("dog", 5, 50, 35, 90), instance("cat", 60, 50, 90, 90, crowd=True)]
    assert not any(kind == "relation" for kind, _ in claims(scene, 0))


def test_nothing_is_said_to_be_absent_that_a_crowd_could_hold():
    scene = [instance("dog", *LEFT), instance("person", 10, 10, 150, 110, crowd=True)]
    image = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    for seed in range(100):
        made = describe_nothing(
            Meaning(scene, image), {"dog": 5, "person": 5, "cat": 5, "sheep": 5}, random.Random(seed)
        )
        assert made is not None
        assert made.noun not in ("person", "somebody", "someone")


def test_empty_masks_are_refused_and_empty_scenes_say_nothing():
    assert describe([], random.Random(0)) == []
    with pytest.raises(ValueError, match="instance 0 has an empty mask"):
        describe([Instance("dog", np.zeros((HEIGHT, WIDTH), bool))], random.Random(0))
    assert measure_shape(np.zeros((4, 4), bool)) is None
