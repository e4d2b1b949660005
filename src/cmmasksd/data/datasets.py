"""Data sets by name: the one place that knows every reader."""

from __future__ import annotations

from cmmasksd.config import DATASETS, SplitConfig
from cmmasksd.data.samples import ReferringDataset
from cmmasksd.data.scenes import STYLES, SceneDataset
from cmmasksd.errors import UserError, shown


def open_dataset(config: SplitConfig) -> ReferringDataset:
    """Open one split of a data set.

    Raises:
        UserError: the data set is unknown, `root` is missing or superfluous, or the reader refuses the files.
    """
    name, split, root = config.data, config.split, config.root
    if name not in DATASETS:
        raise UserError(f"unknown data set {shown(name)}: choose one of {', '.join(DATASETS)}")
    if name in STYLES:
        if root is not None:
            raise UserError(f"{name} is generated and has no folder: leave out --root (given: {root})")
        if split == "pretrain":
            raise UserError("the split 'pretrain' has captions only: choose one of train, val, testA, testB")
        return SceneDataset(name, split, config.references, seed=config.scene_seed, scene_size=config.scene_size)
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
