"""Data sets are opened by their names; a wrong name or folder is one line."""

import numpy as np
import pytest

from cmmasksd.config import SplitConfig
from cmmasksd.data.datasets import open_dataset
from cmmasksd.data.scenes import SceneDataset
from cmmasksd.errors import UserError


def test_open_dataset_opens_scenes():
    data = open_dataset(SplitConfig("scenes+", "testB", references=9, scene_seed=4, scene_size=64))
    assert (data.name, data.split, len(data)) == ("scenes+", "testB", 9)
    same = SceneDataset("scenes+", "testB", 9, seed=4, scene_size=64)
    assert data[3] == same[3]
    assert np.array_equal(data.image(data[3]), same.image(same[3]))


@pytest.mark.parametrize(
    ("name", "split", "root", "said"),
    [
        ("refcocoo", "val", None, "unknown data set 'refcocoo': choose one of scenes, .*refcoco"),
        ("scenes", "val", "here", "no folder: leave out --root"),
        ("refcoco", "val", None, "--root"),
        ("scenes", "pretrain", None, "captions only: choose one of train"),
        ("scenes", "tset", None, "no split 'tset'"),
    ],
)
def test_open_dataset_says_what_is_wrong(name, split, root, said, tmp_path):
    with pytest.raises(UserError, match=said):
        open_dataset(SplitConfig(name, split, root=None if root is None else tmp_path))
