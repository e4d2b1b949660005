"""`cmmasksd data scenes`: a release that reads back as the scenes."""

import pickle
from pathlib import Path

import numpy as np

from cmmasksd.data.readers.refer import ReferDataset
from cmmasksd.data.scenes import SceneDataset


def test_scenes_as_a_release(release: Path):
    """Every sentence is kept, and every mask but for the polygons' rounding."""
    for split, count in {"train": 12, "val": 6, "testA": 6, "testB": 6}.items():
        read, made = (
            ReferDataset("refcoco", release, split),
            SceneDataset("scenes", split, count, seed=0, scene_size=64),
        )
        assert len(read) == len(made) == count
        for index in range(count):
            a, b = read[index], made[index]
            assert [e.text for e in a.expressions] == [e.text for e in b.expressions]
            one, other = read.mask(a), made.mask(b)
            assert (one & other).sum() / (one | other).sum() >= 0.98
            assert np.abs(read.image(a).astype(int) - made.image(b)).mean() < 12
    refs = pickle.loads((release / "refcoco" / "refs(unc).p").read_bytes())
    assert {ref["split"] for ref in refs} == {"train", "val", "testA", "testB"}
