"""Data sets by name: the one place that knows every reader."""

from __future__ import annotations

from pathlib import Path

from cmmasksd.config import DATASETS
from cmmasksd.data.samples import ReferringDataset
from cmmasksd.data.scenes import STYLES, SceneDataset
from cmmasksd.errors import UserError, shown


def open_dataset(
    name: str, split: str, *, root: Path | None = None, references: int = 0, seed: int = 0, scene_size: int = 128
) -> ReferringDataset:
    """Open one split of a data set by its name in the command line.

    Args:
        name: one of `cmmasksd.config.DATASETS`.
        split: name of the split.
        root: folder of RefCOCO's releases, or file or folder of own data (see `cmmasksd.data.readers.manifest`).
        references, seed, scene_size: see `SceneDataset` (generated scenes only).

    Raises:
        UserError: the name is unknown, or the reader refuses the files.
    """
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
