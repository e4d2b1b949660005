"""Data sets by name: the one place that knows every reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cmmasksd.config import DATASETS, DataConfig, ExpressionConfig, SplitConfig
from cmmasksd.data.expressions.drawing import DrawnDataset
from cmmasksd.data.readers.rows import OWN_DATA
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
    if name == "instances":
        return _described(_annotations(root), split)
    if name == "manifest":
        if root is None:
            raise UserError(f"manifest is your own data: name by --root (when training: --data.root) a {OWN_DATA}")
        from cmmasksd.data.readers.manifest import ManifestDataset

        return ManifestDataset(root, split)
    if root is None:
        raise UserError(
            f"{name} is read from files: say with --root (when training: --data.root) which folder holds refcoco/… "
            "and images/train2014/…"
        )
    from cmmasksd.data.readers.refer import ReferDataset

    return ReferDataset(name, root, split)


_SENTENCES = ExpressionConfig()


def open_training_dataset(config: DataConfig) -> ReferringDataset | DrawnDataset:
    """Open the split to train on.

    Raises:
        UserError: as `open_dataset`.
    """
    if config.name != "instances":
        return open_dataset(config.training)
    from cmmasksd.data.expressions.dataset import files_of_split, instance_files, split_photographs

    root = _annotations(config.root)
    if files := files_of_split(root, config.train_split):
        photographs = [(file, image) for file in files for image in file.images]
    else:
        photographs = split_photographs(instance_files(root), config.train_split, _SENTENCES)
    return DrawnDataset(config.train_split, photographs, config.augment)


def _described(root: Path, split: str) -> ReferringDataset:
    """A split of annotated images with fixed sentences."""
    from cmmasksd.data.expressions.dataset import files_of_split, generate, instance_files

    if files := files_of_split(root, split):
        data = generate(files, replace(_SENTENCES, val=0)).splits[0]
        data.split = split
        return data
    if split not in ("train", "val"):
        raise UserError(f"instances has no split {shown(split)}: choose train, or val, a tenth of the images")
    return generate(instance_files(root), _SENTENCES, only=split).splits[0]


def _annotations(root: Path | None) -> Path:
    if root is None:
        raise UserError(
            "instances is your own data: say with --root (when training: --data.root) which annotation file it is, or "
            "which folder of a labelling tool"
        )
    return root
