"""What every data set must offer (`ReferringDataset`): one contract that the tests of all of them inherit."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmmasksd.config import SplitConfig
from cmmasksd.data.datasets import open_dataset
from cmmasksd.data.masks import mask_to_polygons
from cmmasksd.data.readers.refer_release import write_refer_release
from cmmasksd.data.samples import Reference, ReferringDataset
from cmmasksd.data.scenes import SceneDataset


class DatasetContract:
    """Subclasses give a fixture `data`: a split of at least two images, one of them with several references."""

    name: str
    split = "train"

    def references(self, data: ReferringDataset) -> list[Reference]:
        return [data[index] for index in range(len(data))]

    def test_it_has_a_name_and_a_split(self, data: ReferringDataset):
        assert (data.name, data.split) == (self.name, self.split)
        assert {reference.split for reference in self.references(data)} == {self.split}

    def test_a_loop_ends_after_its_last_reference(self, data: ReferringDataset):
        assert list(data) == self.references(data)
        with pytest.raises(IndexError):
            data[len(data)]

    def test_ids_are_unique(self, data: ReferringDataset):
        references = self.references(data)
        assert len({reference.ref_id for reference in references}) == len(references) > 2
        sent_ids = [expression.sent_id for reference in references for expression in reference.expressions]
        assert len(set(sent_ids)) == len(sent_ids)

    def test_groups_hold_each_index_once_and_are_the_images(self, data: ReferringDataset):
        groups = [list(group) for group in data.groups()]
        assert sorted(index for group in groups for index in group) == list(range(len(data)))
        images = [{data[index].image_id for index in group} for group in groups]
        assert all(len(image) == 1 for image in images)
        assert len(set.union(*images)) == len(groups) > 1
        assert max(map(len, groups)) > 1
        assert [list(group) for group in data.groups()] == groups

    def test_images_and_masks_have_one_size(self, data: ReferringDataset):
        for reference in self.references(data):
            image, mask = data.image(reference), data.mask(reference)
            assert image.dtype == np.uint8
            assert mask.dtype == bool
            assert image.shape == (*mask.shape, 3)
            assert mask.any()

    def test_images_and_masks_are_the_callers_own(self, data: ReferringDataset):
        reference = data[0]
        image, mask = data.image(reference), data.mask(reference)
        before = image.copy(), mask.copy()
        image[:], mask[:] = 7, ~mask
        np.testing.assert_array_equal(data.image(reference), before[0])
        np.testing.assert_array_equal(data.mask(reference), before[1])

    def test_a_worker_has_the_same_data(self, data: ReferringDataset):
        copy = pickle.loads(pickle.dumps(data))
        assert (copy.name, copy.split, len(copy)) == (data.name, data.split, len(data))
        for index in reversed(range(len(data))):
            assert copy[index] == data[index]
            np.testing.assert_array_equal(copy.image(copy[index]), data.image(data[index]))
            np.testing.assert_array_equal(copy.mask(copy[index]), data.mask(data[index]))


def scenes() -> SceneDataset:
    return SceneDataset("scenes", "train", 9, seed=3, scene_size=64)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as a manifest of PNG images and, in turn, masks of each kind."""
    folder, data, rows = tmp_path_factory.mktemp("manifest"), scenes(), []
    for index in range(len(data)):
        reference = data[index]
        image, mask = f"{reference.image_id}.png", data.mask(reference)
        Image.fromarray(data.image(reference)).save(folder / image)
        Image.fromarray(mask).save(folder / f"mask{index}.png")
        value = {"mask": f"mask{index}.png"} if index % 2 else {"polygon": mask_to_polygons(mask)}
        rows.append({"image": image, "expressions": [e.text for e in reference.expressions], "split": "train"} | value)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


class TestScenes(DatasetContract):
    name = "scenes"

    @pytest.fixture
    def data(self) -> ReferringDataset:
        return open_dataset(SplitConfig("scenes", "train", references=9, scene_seed=3, scene_size=64))


class TestScenesPlus(DatasetContract):
    name = "scenes+"
    split = "testB"

    @pytest.fixture
    def data(self) -> ReferringDataset:
        return open_dataset(SplitConfig("scenes+", "testB", references=9, scene_size=64))


class TestScenesG(DatasetContract):
    name = "scenesg"
    split = "val"

    @pytest.fixture
    def data(self) -> ReferringDataset:
        return open_dataset(SplitConfig("scenesg", "val", references=9, scene_size=64))


class TestRefer(DatasetContract):
    name = "refcoco"

    @pytest.fixture
    def data(self, tmp_path_factory: pytest.TempPathFactory) -> ReferringDataset:
        root = tmp_path_factory.mktemp("refer")
        write_refer_release(root, [scenes()])
        return open_dataset(SplitConfig("refcoco", "train", root=root))


class TestReferSample(DatasetContract):
    name = "refcoco"
    split = "val"

    @pytest.fixture
    def data(self, real_data: Path) -> ReferringDataset:
        return open_dataset(SplitConfig("refcoco", "val", root=real_data / "refer-coco128"))


class TestManifest(DatasetContract):
    name = "manifest"

    @pytest.fixture
    def data(self, manifest: Path) -> ReferringDataset:
        return open_dataset(SplitConfig("manifest", "train", root=manifest / "rows.jsonl"))


class TestLabelme(DatasetContract):
    name = "manifest"
    split = "all"

    @pytest.fixture
    def data(self, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> ReferringDataset:
        folder, data = tmp_path_factory.mktemp("labelme"), scenes()
        for group in data.groups():
            name = f"{data[group[0]].image_id}"
            (folder / f"{name}.png").write_bytes((manifest / f"{name}.png").read_bytes())
            shapes = [
                {"label": f"object {index}", "points": np.reshape(polygon, (-1, 2)).tolist(), "group_id": index}
                for index in group
                for polygon in mask_to_polygons(data.mask(data[index]))
            ]
            (folder / f"{name}.json").write_text(json.dumps({"shapes": shapes, "imagePath": f"{name}.png"}))
        return open_dataset(SplitConfig("manifest", "all", root=folder))
