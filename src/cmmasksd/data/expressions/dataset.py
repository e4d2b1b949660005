"""The sentences of whole files of instances, as a data set that is written as a REFER release or a manifest.

Every image has its own random generator, so that its sentences do not depend on the other images. The digest of its
file name decides its split.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cmmasksd.config import ExpressionConfig
from cmmasksd.data.expressions.generate import describe_all, describe_nothing, unnamed
from cmmasksd.data.expressions.instances import AnnotatedImage, Annotation, InstanceFile
from cmmasksd.data.expressions.meaning import Meaning
from cmmasksd.data.expressions.words import Vocabulary, read_synonyms
from cmmasksd.data.images import image_size, is_turned, read_image
from cmmasksd.data.masks import mask_to_rle
from cmmasksd.data.readers.refer_release import write_refer_release
from cmmasksd.data.samples import Expression, Reference, group_by_image
from cmmasksd.errors import UserError, shown
from cmmasksd.files import whole_file

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Source:
    """The image of a reference, and the annotation of its object (None where it names nothing)."""

    file: InstanceFile
    image: AnnotatedImage
    annotation: Annotation | None
    upright: bool


class ExpressionDataset:
    """One split of the sentences; implements ``ReferringDataset``. A reference to nothing has an empty mask."""

    name = "expressions"

    def __init__(self, split: str, references: Sequence[Reference], sources: dict[int, Source]) -> None:
        self.split, self._references, self._sources = split, list(references), sources

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, index: int) -> Reference:
        return self._references[index]

    def source(self, reference: Reference) -> Source:
        """Where a reference comes from."""
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

    def groups(self) -> list[list[int]]:
        """Indices of the references that share an image."""
        return group_by_image(self._references)


@dataclass
class Generated:
    """The splits that have sentences, and how many objects and images were left out, by reason."""

    splits: list[ExpressionDataset]
    left_out: Counter[str] = field(default_factory=Counter)


def generate(
    files: Sequence[InstanceFile], settings: ExpressionConfig, vocabulary: Vocabulary | None = None
) -> Generated:
    """Make the sentences of all images of some files.

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
            for image in file.images:
                progress.update()
                image_id += 1
                if image.path is not None and not image.path.is_file():
                    left_out["images without a file"] += 1
                    continue
                upright = image.path is not None and _is_upright(image)
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


def _is_upright(image: AnnotatedImage) -> bool:
    """Whether the masks of an image are drawn on the image as EXIF turns it, rather than on its stored pixels."""
    assert image.path is not None
    size = image.height, image.width
    if image_size(image.path) == size:
        return False
    if (turned := image_size(image.path, exif=True)) == size:
        return True
    raise UserError(
        f"image {image.path} is {turned[1]}x{turned[0]} pixels and its annotations are for "
        f"{image.width}x{image.height}: use the images that were annotated"
    )


def _deal(names: Iterable[str], val: float, test: float) -> dict[str, str]:
    """A split for every file name, by its digest; at least one image in every split that has a share."""
    order = sorted((hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest(), name) for name in set(names))
    place = [int(digest[:8], 16) / 16**8 for digest, _ in order]
    last_val = max(sum(p < val for p in place), val > 0)
    last_test = last_val + max(sum(val <= p < val + test for p in place), test > 0)
    if last_test >= len(order) and order:
        raise UserError(f"{len(order)} images cannot be dealt out to {', '.join(SPLITS)}: give more, or smaller shares")
    return {
        name: "val" if at < last_val else "test" if at < last_test else "train" for at, (_, name) in enumerate(order)
    }


def write_expressions(
    instances: Sequence[Path],
    out: Path,
    settings: ExpressionConfig,
    *,
    images: Sequence[Path] = (),
    synonyms: Path | None = None,
) -> str:
    """Make the sentences of annotation files and write them.

    Args:
        instances: the annotation files.
        out: FILE.jsonl for a manifest, or a folder for a REFER release.
        settings: kinds and shares of the sentences.
        images: image folder of each file, or one for all; see `InstanceFile`.
        synonyms: file of nouns; see `read_synonyms`.

    Returns:
        A summary in a few lines.

    Raises:
        UserError: a file is damaged, or the arguments contradict each other.
    """
    manifest = out.suffix.lower() == ".jsonl"
    if not manifest and out.suffix.lower() in (".csv", ".json"):
        raise UserError(f"--out {out} is neither FILE.jsonl nor a folder: choose one of them")
    if not manifest and settings.no_target:
        raise UserError(
            "--no_target needs a manifest, since a REFER release has no sentences that name nothing: "
            "give --out FILE.jsonl"
        )
    if len(images) not in (0, 1, len(instances)):
        raise UserError(f"--images has {len(images)} folders for {len(instances)} files: give one for each")
    folders = images if len(images) == len(instances) else [*images, None][:1] * len(instances)
    files = [InstanceFile(path, folder) for path, folder in zip(instances, folders, strict=True)]
    nouns = read_synonyms(synonyms) if synonyms is not None else {}
    if synonyms is not None:
        _require_known(nouns, files, synonyms)
    lines = []
    for file in files:
        if file.image_folder is None:
            if not manifest:
                raise UserError(f"a REFER release holds the images of {file.path}: name their folder with --images")
            lines.append(f"{file.path}: no image files found, colours are left out (name their folder with --images)")
    generated = generate(files, settings, Vocabulary(nouns))
    if manifest:
        write_manifest(out, generated.splits)
    else:
        write_refer_release(out, generated.splits)
    references = [reference for split in generated.splits for reference in split]
    named = sum(len(reference.expressions) for reference in references if reference.ann_ids)
    nothing = sum(not reference.ann_ids for reference in references)
    image_count = len({reference.image_id for reference in references})
    lines += [
        f"{named} sentences for {len(references) - nothing} objects of {image_count} images, "
        f"and {nothing} that name nothing: {out}",
        "references: " + ", ".join(f"{split.split} {len(split)}" for split in generated.splits),
    ]
    if generated.left_out:
        lines.append("not named: " + ", ".join(f"{why} ({n})" for why, n in generated.left_out.most_common()))
    lines.append(f"train on them with --data.name {'manifest' if manifest else 'refcoco'} --data.root {out}")
    return "\n".join(lines)


def write_manifest(out: Path, splits: Sequence[ExpressionDataset]) -> int:
    """Write splits as a manifest, which ``ManifestDataset`` reads.

    Images that do not lie in the manifest's folder are copied into a folder beside it, called after the manifest.
    Images whose masks are drawn on pixels that EXIF would turn are written there anew, as PNG.

    Returns:
        How many image files were written.

    Raises:
        UserError: the manifest or its folder of images exists already.
    """
    folder = out.with_name(f"{out.stem}-images")
    for path in (out, folder):
        if path.exists():
            raise UserError(f"{path} already exists: delete it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    files: dict[int, str] = {}
    with ExitStack() as undo, whole_file(out) as part, part.open("w", encoding="utf-8") as lines:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        for dataset in splits:
            for reference in (dataset[index] for group in dataset.groups() for index in group):
                source = dataset.source(reference)
                if reference.image_id not in files:
                    files[reference.image_id] = _image_file(source, reference.image_id, out.parent, folder)
                row = {
                    "image": files[reference.image_id],
                    "expressions": [expression.text for expression in reference.expressions],
                    "rle": mask_to_rle(dataset.mask(reference)),
                    "split": dataset.split,
                    "id": reference.ref_id,
                }
                lines.write(json.dumps(row) + "\n")
        undo.pop_all()
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def _image_file(source: Source, image_id: int, root: Path, folder: Path) -> str:
    """The path of an image relative to a manifest's folder, to which it is copied where it lies elsewhere."""
    path = source.image.path
    if path is None:
        return source.image.file_name
    turned = not source.upright and is_turned(path)
    real, real_root = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if real.is_relative_to(real_root) and not turned:
        return real.relative_to(real_root).as_posix()
    folder.mkdir(exist_ok=True)
    copy = folder / f"{image_id:06d}{'.png' if turned else path.suffix.lower()}"
    if turned:
        from PIL import Image

        Image.fromarray(read_image(path)).save(copy)
    else:
        shutil.copyfile(path, copy)
    return copy.relative_to(root).as_posix()


def _require_known(synonyms: dict[str, tuple[str, ...]], files: Sequence[InstanceFile], where: Path) -> None:
    """Refuse synonyms of a class that no file has: a typing error would go unseen."""
    known = sorted({name for file in files for name in file.categories})
    for name in synonyms:
        if name not in known:
            some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
            raise UserError(
                f"{where} names the class {shown(name)}, which no file of instances has: expected some of {some}"
            )
