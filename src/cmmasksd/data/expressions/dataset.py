"""The sentences of whole files of instances, as a data set.

Every image has its own random generator, so that its sentences do not depend on the other images. The digest of its
file name decides its split.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cmmasksd.config import ExpressionConfig
from cmmasksd.data.expressions.generate import describe_all, describe_nothing, unnamed
from cmmasksd.data.expressions.instances import InstanceFile
from cmmasksd.data.expressions.meaning import Meaning
from cmmasksd.data.expressions.words import Vocabulary
from cmmasksd.data.images import read_image
from cmmasksd.data.readers.annotated import AnnotatedImage, Annotation
from cmmasksd.data.samples import Expression, Reference, ReferenceList
from cmmasksd.errors import UserError, shown

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Source:
    """The image of a reference, and the annotation of its object (None where it names nothing)."""

    file: InstanceFile
    image: AnnotatedImage
    annotation: Annotation | None
    upright: bool


class ExpressionDataset(ReferenceList):
    """One split of the sentences; implements ``ReferringDataset``. A reference to nothing has an empty mask."""

    name = "expressions"

    def __init__(self, split: str, references: Sequence[Reference], sources: dict[int, Source]) -> None:
        self.split, self._references, self._sources = split, list(references), sources

    def source(self, reference: Reference) -> Source:
        """Image and annotation of a reference."""
        return self._sources[reference.ref_id]

    def image(self, reference: Reference) -> np.ndarray:
        """(H, W, 3) uint8 RGB, in the frame in which its masks were drawn."""
        source = self._sources[reference.ref_id]
        if source.image.path is None:
            raise UserError(f"{source.file.path} has no image files beside it: name their folder")
        return read_image(source.image.path, exif=source.upright)

    def mask(self, reference: Reference) -> np.ndarray:
        """(H, W) bool."""
        source = self._sources[reference.ref_id]
        mask = None if source.annotation is None else source.file.mask(source.image, source.annotation)
        return np.zeros((source.image.height, source.image.width), bool) if mask is None else mask


@dataclass
class Generated:
    """The splits that have sentences, and how many objects and images were left out, by reason."""

    splits: list[ExpressionDataset]
    left_out: Counter[str] = field(default_factory=Counter)


_COCO_FILES = ("instances.json", "_annotations.coco.json")  # the second is Roboflow's
_SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def instance_files(root: Path) -> list[InstanceFile]:
    """The annotation files of a data set.

    Args:
        root: a file or folder as `InstanceFile` takes it, or a folder of folders that hold an instances.json.
    """
    return [InstanceFile(path) for path in _in_folders(root) or [root]]


def files_of_split(root: Path, split: str) -> list[InstanceFile]:
    """The annotation files of a split that has a folder of its own (train; val or valid; test); empty if none has.

    Raises:
        UserError: other splits have a folder, and this one has none.
    """
    folders = {_SPLIT_OF_FOLDER.get(path.parent.name): path for path in _in_folders(root)}
    if None in folders or not folders:
        return []
    if split not in folders:
        raise UserError(f"{root} has no folder of the split {shown(split)}: it has {', '.join(map(str, folders))}")
    return [InstanceFile(folders[split])]


def _in_folders(root: Path) -> list[Path]:
    return sorted(path for name in _COCO_FILES for path in root.glob(f"*/{name}")) if root.is_dir() else []


def split_photographs(
    files: Sequence[InstanceFile], split: str, settings: ExpressionConfig
) -> list[tuple[InstanceFile, AnnotatedImage]]:
    """The images of a split, as `generate` deals them out."""
    split_of = _deal([image.file_name for file in files for image in file.images], settings.val, settings.test)
    return [(file, image) for file in files for image in file.images if split_of[image.file_name] == split]


def generate(
    files: Sequence[InstanceFile],
    settings: ExpressionConfig,
    vocabulary: Vocabulary | None = None,
    *,
    only: str | None = None,
) -> Generated:
    """Make the sentences of all images of some files.

    Args:
        files: the annotations.
        settings: kinds and shares of the sentences.
        vocabulary: the nouns.
        only: the one split to make; None: all.

    Raises:
        UserError: an annotation or image is damaged, or no object can be named.
    """
    from tqdm import tqdm

    names = [image.file_name for file in files for image in file.images]
    split_of = _deal(names, settings.val, settings.test)
    references: dict[str, list[Reference]] = {split: [] for split in SPLITS}
    sources: dict[int, Source] = {}
    left_out: Counter[str] = Counter()
    image_id = sent_id = 0

    def add(image_id: int, source: Source, texts: Iterable[str]) -> None:
        nonlocal sent_id
        ref_id = len(sources) + 1
        expressions = []
        for text in texts:
            sent_id += 1
            expressions.append(Expression(sent_id, text))
        split = split_of[source.image.file_name]
        ann_ids = () if source.annotation is None else (ref_id,)
        references[split].append(Reference(ref_id, image_id, ann_ids, split, tuple(expressions)))
        sources[ref_id] = source

    with tqdm(total=len(names), desc="expressions", unit="image", disable=None) as progress:
        for place, file in enumerate(files):
            left_out.update(file.left_out)
            for image in file.images:
                progress.update()
                image_id += 1
                if only is not None and split_of[image.file_name] != only:
                    continue
                if image.path is not None and not image.path.is_file():
                    left_out["images without a file"] += 1
                    continue
                upright = image.path is not None and file.is_upright(image)
                instances = file.instances(image)
                left_out["masks without area"] += len(image.annotations) - len(instances)
                pixels = None if image.path is None else read_image(image.path, exif=upright)
                meaning = Meaning(
                    instances,
                    pixels,
                    vocabulary=vocabulary,
                    min_area=settings.min_area,
                    size=(image.height, image.width),
                )
                rng = random.Random(f"{settings.seed}/{place}/{image.file_name}")
                descriptions = describe_all(meaning, rng, per_object=settings.per_object, keep=settings.keep)
                texts: dict[int, list[str]] = {}
                for description in descriptions:
                    assert description.target is not None
                    texts.setdefault(description.target, []).append(description.text)
                left_out.update(unnamed(meaning, set(texts)))
                annotations = {annotation.ann_id: annotation for annotation in image.annotations}
                for target, sentences in texts.items():
                    add(image_id, Source(file, image, annotations[instances[target].ann_id], upright), sentences)
                for text in _no_target(meaning, file, settings, len(descriptions), rng):
                    add(image_id, Source(file, image, None, upright), [text])
    if not sources:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items() if count)
        raise UserError(f"no object of {files[0].path} can be named ({reasons or 'it has no annotation'})")
    splits = [ExpressionDataset(split, chosen, sources) for split, chosen in references.items() if chosen]
    return Generated(splits, +left_out)


def _no_target(
    meaning: Meaning, file: InstanceFile, settings: ExpressionConfig, count: int, rng: random.Random
) -> Iterable[str]:
    """Different sentences that name nothing, as many as make their share beside `count` others on average."""
    wanted = settings.no_target / (1 - settings.no_target) * max(count, 1)
    number = int(wanted) + (rng.random() < wanted % 1)
    descriptions = [describe_nothing(meaning, file.categories, rng) for _ in range(number)]
    return dict.fromkeys(description.text for description in descriptions if description is not None)


def _deal(names: Iterable[str], val: float, test: float) -> dict[str, str]:
    """Split of every file name, by its digest; a split with a share has at least one image."""
    order = sorted((hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest(), name) for name in set(names))
    place = [int(digest[:8], 16) / 16**8 for digest, _ in order]
    last_val = max(sum(p < val for p in place), val > 0)
    last_test = last_val + max(sum(val <= p < val + test for p in place), test > 0)
    if last_test >= len(order) and order:
        raise UserError(f"{len(order)} images cannot be dealt out to {', '.join(SPLITS)}: give more, or smaller shares")
    return {
        name: "val" if at < last_val else "test" if at < last_test else "train" for at, (_, name) in enumerate(order)
    }
