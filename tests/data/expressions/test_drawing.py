"""Photographs to train on: a draw's sentences are true of what it shows, and the same chance draws the same."""

import pickle
import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmmasksd.config import AugmentConfig, DataConfig
from cmmasksd.data.datasets import open_dataset, open_training_dataset
from cmmasksd.data.expressions.drawing import DrawnDataset, crop, mirror
from cmmasksd.errors import UserError
from data.expressions.layouts import COLOURS, HEIGHT, WIDTH, instance, random_scene, write_instances

NOTHING = AugmentConfig(flip=0, crop=0, paste=0, light=0, no_target=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of twenty images each."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = random.Random(1)
    for name in ("first", "second"):
        images = []
        while len(images) < 20:
            scene, pixels = random_scene(rng, ["dog", "cat", "couch", "gizmo"], certain=True)
            if scene:
                images.append((pixels, scene))
        write_instances(folder / name, images)
    return folder


def opened(root: Path, augment: AugmentConfig = NOTHING) -> DrawnDataset:
    data = open_training_dataset(DataConfig(name="instances", root=root, augment=augment))
    assert isinstance(data, DrawnDataset)
    return data


def all_draws(data: DrawnDataset, seed: int = 0):
    return [data.draw(group[:4], random.Random(f"{seed}/{group[0]}")) for group in data.groups()]


def test_splits_share_no_image(root):
    data = opened(root)
    val = open_dataset(DataConfig(name="instances", root=root).validation)
    shown = {data.draw(group[:4], random.Random(0)).image.tobytes() for group in data.groups()}
    held_out = {val.image(val[group[0]]).tobytes() for group in val.groups()}
    assert held_out
    assert shown.isdisjoint(held_out)
    assert all(len(group) % 4 == 0 for group in data.groups())
    assert sorted(index for group in data.groups() for index in group) == list(range(len(data)))


def test_splits_with_folders_of_their_own(tmp_path):
    rng, scenes = random.Random(2), []
    while len(scenes) < 6:
        scene, pixels = random_scene(rng, ["dog", "cat"], certain=True)
        if scene:
            scenes.append((pixels, scene))
    write_instances(tmp_path / "train", scenes[:4])
    write_instances(tmp_path / "valid", scenes[4:], name="_annotations.coco.json")
    config = DataConfig(name="instances", root=tmp_path, augment=NOTHING)
    data, val = open_training_dataset(config), open_dataset(config.validation)
    assert len(data.groups()) == 4
    assert val.split == "val"
    held_out = {pixels.tobytes() for pixels, _ in scenes[4:]}
    assert {val.image(reference).tobytes() for reference in map(val.__getitem__, range(len(val)))} <= held_out
    config.val_split = "test"
    with pytest.raises(UserError, match="has no folder of the split 'test': it has train, val"):
        open_dataset(config.validation)


def test_a_draw_depends_on_chance_alone(root):
    data = opened(root, AugmentConfig(paste=1.0))
    again = pickle.loads(pickle.dumps(data))
    for one, other in zip(all_draws(data), all_draws(again), strict=True):
        assert np.array_equal(one.image, other.image)
        assert [text for text, _ in one.expressions] == [text for text, _ in other.expressions]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(one.expressions, other.expressions, strict=True))
    others = all_draws(data, seed=1)
    assert any(
        one.expressions[0][0] != other.expressions[0][0] for one, other in zip(all_draws(data), others, strict=True)
    )


def test_sentences_are_those_of_the_mirrored_image(root):
    plain, mirrored = opened(root), opened(root, AugmentConfig(flip=1, crop=0, paste=0, light=0, no_target=0))
    sides = 0
    for group, seed in product(plain.groups(), range(4)):
        before, after = (data.draw(group[:4], random.Random(seed)) for data in (plain, mirrored))
        assert np.array_equal(after.image, before.image[:, ::-1])
        named = {text.removeprefix("the "): mask for text, mask in after.expressions}
        for first, second in (("left", "right"), ("right", "left")):
            for text, mask in named.items():
                other = named.get(text.replace(first, second))
                if text.split()[0] == first and other is not None:  # "left dog" and "right dog"
                    sides += 1
                    at, across = (np.nonzero(x)[1].mean() for x in (mask, other))
                    assert (at < across) == (first == "left"), text
    assert sides > 3


def test_pasted_objects_are_in_the_image_and_in_the_sentences(root):
    plain, pasted = opened(root), opened(root, AugmentConfig(flip=0, crop=0, paste=1, light=0, no_target=0))
    changed = 0
    for group in plain.groups():
        before = plain.draw(group[:4], random.Random(group[0]))
        after = pasted.draw(group[:4], random.Random(group[0]))
        differs = (before.image != after.image).any(-1)
        changed += bool(differs.any())
        for _, mask in after.expressions:
            assert mask.any()
    assert changed > 5


def test_sentences_about_nothing_have_empty_masks(root):
    draws = all_draws(opened(root, AugmentConfig(flip=0, crop=0, paste=0, light=0, no_target=1)))
    empty = [text for drawn in draws for text, mask in drawn.expressions if not mask.any()]
    assert len(empty) > 0.8 * len(draws)
    assert all(sum(not mask.any() for _, mask in drawn.expressions) <= 1 for drawn in draws)


def test_an_object_that_a_crop_halves_is_named_no_more():
    pixels = np.zeros((120, 160, 3), np.uint8)
    scene = [instance("dog", 0, 0, 160, 120), instance("cat", 2, 2, 30, 118)]
    seen = set()
    for seed in range(40):
        image, cut = crop(pixels, scene, random.Random(seed))
        assert image.shape[0] >= 0.6 * 120 - 1
        for part in cut:
            assert part.mask.shape == image.shape[:2]
            whole = next(i for i in scene if i.category == part.category)
            assert part.crowd == (part.mask.sum() < 0.5 * whole.mask.sum())
            seen.add(part.crowd)
    assert seen == {True, False}
    image, turned = mirror(pixels, scene)
    assert turned[1].mask[2:118, -30:-2].all()
    assert turned[1].mask.sum() == scene[1].mask.sum()


def test_a_photograph_that_exif_turns_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene = [instance("gizmo", 10, 40, 50, 80)]
    pixels = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    pixels[scene[0].mask] = COLOURS["red"]
    path = write_instances(tmp_path, [(pixels, scene)] * 6)
    for file in (tmp_path / "images").iterdir():
        Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(file, exif=exif)
    draws = all_draws(opened(path))
    assert draws
    for image, expressions in draws:
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert all((image[mask] == COLOURS["red"]).all() for _, mask in expressions if mask.any())


def test_light_changes_the_image_and_not_the_sentences(root):
    plain, lit = opened(root), opened(root, AugmentConfig(flip=0, crop=0, paste=0, light=0.5, no_target=0))
    group = plain.groups()[0]
    before, after = (data.draw(group[:4], random.Random(0)) for data in (plain, lit))
    assert not np.array_equal(before.image, after.image)
    assert [text for text, _ in before.expressions] == [text for text, _ in after.expressions]


def test_photographs_on_which_nothing_can_be_named(tmp_path):
    pixels = np.full((120, 160, 3), 90, np.uint8)
    write_instances(tmp_path, [(pixels, [instance("dog", 5, 5, 8, 8), instance("dog", 50, 50, 54, 54)])] * 12)
    data = opened(tmp_path / "instances.json")
    with pytest.raises(UserError, match="nothing on 8 photographs can be named"):
        data.draw(data.groups()[0], random.Random(0))


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(UserError, match="instances is your own data: say with --root"):
        open_training_dataset(DataConfig(name="instances"))
    with pytest.raises(UserError, match="do not exist"):
        open_training_dataset(DataConfig(name="instances", root=tmp_path / "nowhere"))
    pixels = np.full((120, 160, 3), COLOURS["red"], np.uint8)
    write_instances(tmp_path, [(pixels, [instance("dog", 5, 5, 100, 100)])] * 12)
    val = DataConfig(name="instances", root=tmp_path / "instances.json")
    assert len(open_dataset(val.validation)) >= 1
    val.val_split = "test"
    with pytest.raises(UserError, match="instances has no split 'test'"):
        open_dataset(val.validation)
    data = opened(tmp_path / "instances.json")
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"does not exist"):
        data.draw(data.groups()[0], random.Random(0))
