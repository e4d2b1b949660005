"""Data sets by their names: the one place that knows every reader."""

from __future__ import annotations

from pathlib import Path

from cmmasksd.data.samples import ReferringDataset
from cmmasksd.data.scenes import STYLES, SceneDataset
from cmmasksd.errors import UserError, shown


def open_dataset(
    name: str, split: str, *, root: Path | None = None, references: int = 0, seed: int = 0, scene_size: int = 128
) -> ReferringDataset:
    """Open one split of a data set by the name the command line uses.

    Args:
        name: see `cmmasksd.config.DATASETS`.
        split: of the data set.
        root: folder of the real data sets, or the file or folder of one's own (see `cmmasksd.data.readers.manifest`).
        references, seed, scene_size: of generated scenes, see `SceneDataset`.

    Raises:
        UserError: for an unknown name, and whatever the reader finds wrong.
    """
    from cmmasksd.config import DATASETS

    if name not in DATASETS:
        raise UserError(f"unknown data set {shown(name)}: choose one of {', '.join(DATASETS)}")
    if name in STYLES:
        if root is not None:
            raise UserError(f"{name} is generated and has no folder: leave out --root (given: {root})")
        if split == "pretrain":
            raise UserError("the split 'pretrain' has captions only: choose one of train, val, testA, testB")
        return SceneDataset(name, split, references or 1500, seed=seed, scene_size=scene_size)
    if name == "manifest":
        if root is None:
            raise UserError(
                "manifest is your own data: say with --root (when training: --data.root) which .jsonl or .csv file, or "
                "which folder of labelme files"
            )
        from cmmasksd.data.readers.manifest import ManifestDataset

        return ManifestDataset(root, split)
    if root is None:
        raise UserError(
            f"{name} is read from files: say with --root (when training: --data.root) which folder holds refcoco/… "
            "and images/train2014/…"
        )
    from cmmasksd.data.readers.refer import ReferDataset

    return ReferDataset(name, root, split)
