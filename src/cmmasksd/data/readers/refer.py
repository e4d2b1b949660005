"""RefCOCO, RefCOCO+ and RefCOCOg, read from the files of their release as they are: no conversion, no index files.

    <root>/refcoco/refs(unc).p        <root>/refcoco+/refs(unc).p
    <root>/refcocog/refs(umd).p       <root>/refcocog/refs(google).p
    <root>/<folder>/instances.json    <root>/images/train2014/COCO_train2014_*.jpg

The format is REFER's (Kazemzadeh et al. 2014; Yu et al. 2016). We deviate from its ``refer.py`` where that misleads:
the refs file is a pickle from the internet, and is read without ever running what it may hold; crowd annotations are
decoded; a split is matched by its whole name; lengths come from the data. The text is the cleaned ``sent``, not
``raw``, with its white space evened out.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from cmmasksd.data.images import MAX_PIXELS, can_be_path, read_image
from cmmasksd.data.masks import decode_segmentation, usable_segmentation
from cmmasksd.data.readers.plain_pickle import load_plain_pickle
from cmmasksd.data.samples import Expression, Reference, is_blank
from cmmasksd.errors import UserError, shown

_SOURCES = {  # name: (folder, who made the splits)
    "refcoco": ("refcoco", "unc"),
    "refcoco+": ("refcoco+", "unc"),
    "refcocog-umd": ("refcocog", "umd"),
    "refcocog-google": ("refcocog", "google"),
}
NAMES = tuple(_SOURCES)
"""The names ``ReferDataset`` knows."""

MAX_REFS_BYTES = 128 * 1024 * 1024
"""Refs files beyond this are refused; the largest of the release has some 30 MB."""

log = logging.getLogger(__name__)

# Where the images lie under the root: our documentation's place, and that of the original toolbox.
IMAGE_FOLDERS = (Path("images/train2014"), Path("images/mscoco/images/train2014"))


class ReferDataset:
    """One split of RefCOCO, RefCOCO+ or RefCOCOg; implements ``ReferringDataset``.

    Everything is checked on construction except the pixels: a file that is missing should stop a run before it starts.
    What releases hold and nobody can learn from is left out then, and one line of the log says how much of it: empty
    sentences, polygons without area, and the references that have nothing else. Masks are decoded and images read on
    demand.

    Args:
        name: one of ``NAMES``.
        root: the folder that holds ``refcoco``, ``refcoco+``, ``refcocog`` and ``images``.
        split: as the refs file calls it, such as "train", "val", "testA".
        images: the folder of the image files, where it is not ``<root>/images/train2014``.

    Raises:
        UserError: a file is missing or damaged, or does not fit the others.
    """

    def __init__(self, name: str, root: str | Path, split: str, *, images: str | Path | None = None) -> None:
        self.name = name
        self.split = split
        refs_path, self._instances_path = _release_files(name, Path(root))
        refs = _read_refs(refs_path)
        chosen = [ref for ref in refs if ref["split"] == split]
        if not chosen:
            raise UserError(f"{name} has no split {shown(split)}: {refs_path} holds {_shown_splits(refs)}")
        left_out: Counter[str] = Counter()
        references = _references(chosen, refs_path, left_out)
        self._images, self._segmentations = _read_instances(self._instances_path, references, left_out)
        self._references = tuple(ref for ref in references if self._segmentations.keys() >= set(ref.ann_ids))
        if left_out:
            counts = ", ".join(f"{what} ({count})" for what, count in left_out.items())
            if not self._references:
                raise UserError(f"{name} {split} of {refs_path.parent} has nothing else than {counts}: check the files")
            log.warning("%s %s of %s: left out %s", name, split, refs_path.parent, counts)
        self._image_folder = _image_folder(Path(root), images)
        missing = [file for file, *_ in self._images.values() if not (self._image_folder / file).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self._images)} images of {name} {split} are missing from "
                f"{self._image_folder}, the first is {missing[0]}: unpack COCO's train2014.zip there, or name the "
                "folder that has them"
            )

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, index: int) -> Reference:
        return self._references[index]

    def image(self, reference: Reference) -> np.ndarray:
        """The reference's image, (H, W, 3) uint8 RGB, in the frame of the stored pixels (EXIF is not applied).

        Raises:
            UserError: the file is missing or damaged, or its size is not the one in instances.json.
        """
        file, height, width = self._images[reference.image_id]
        image = read_image(self._image_folder / file)
        if image.shape[:2] != (height, width):
            raise UserError(
                f"image {self._image_folder / file} is {image.shape[1]}x{image.shape[0]} pixels but "
                f"{self._instances_path} says {width}x{height}: its masks would not fit, use the original file"
            )
        return image

    def mask(self, reference: Reference) -> np.ndarray:
        """The reference's object, (H, W) bool: the union of its annotations and of their parts."""
        _, height, width = self._images[reference.image_id]
        mask = np.zeros((height, width), dtype=bool)
        for ann_id in reference.ann_ids:
            mask |= decode_segmentation(json.loads(self._segmentations[ann_id]), height, width)
        return mask

    def groups(self) -> list[list[int]]:
        """Indices of the references that share an image, images in the order in which they first appear."""
        groups: dict[int, list[int]] = {}
        for index, reference in enumerate(self._references):
            groups.setdefault(reference.image_id, []).append(index)
        return list(groups.values())


def splits(name: str, root: str | Path) -> dict[str, int]:
    """The splits of a data set and their numbers of references; needs the refs file only.

    Args:
        name: one of ``NAMES``.
        root: as for ``ReferDataset``.

    Returns:
        Number of references by split, in the order of the file.

    Raises:
        UserError: the refs file is missing or damaged.
    """
    return dict(Counter(ref["split"] for ref in _read_refs(_release_files(name, Path(root))[0])))


# ---------------------------------------------------------------------------------------------------------- refs file


def _load_refs(path: Path) -> object:
    """The plain value in a refs file; a UserError for whatever else it holds."""
    size = path.stat().st_size
    if size > MAX_REFS_BYTES:
        raise UserError(f"{path} has {size} bytes, more than the {MAX_REFS_BYTES} allowed: it is not a plain refs file")
    try:
        return load_plain_pickle(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path} is not a plain refs file: {error}; download it again from its release") from None


def _read_refs(path: Path) -> list[dict[str, Any]]:
    """All refs of a file, with their ids and splits checked."""
    refs = _load_refs(path)
    if not isinstance(refs, list) or not refs or not all(isinstance(ref, dict) for ref in refs):
        raise UserError(f"{path} is not a refs file: expected a pickled list of dicts, one per reference")
    seen: set[int] = set()
    for ref in refs:
        ref_id = _whole_number(ref, "ref_id", f"{path}: a reference")
        if ref_id in seen:
            raise UserError(f"{path}: ref_id {ref_id} appears twice: remove one of the references or renumber it")
        seen.add(ref_id)
        _text(ref, "split", f"{path}: reference {ref_id}")
    return refs


def _references(refs: Sequence[dict[str, Any]], path: Path, left_out: Counter[str]) -> list[Reference]:
    """The references of a split, without those that have no sentence; what is left out is counted."""
    references = []
    sent_ids: set[int] = set()
    for ref in refs:
        where = f"{path}: reference {ref['ref_id']}"
        sentences = ref.get("sentences")
        if not isinstance(sentences, list) or not all(isinstance(item, dict) for item in sentences):
            raise UserError(f"{where} has 'sentences' {_shown(sentences)}: expected a list of dicts")
        expressions = []
        for sentence in sentences:
            sent_id = _whole_number(sentence, "sent_id", f"{where}: a sentence")
            if sent_id in sent_ids:
                raise UserError(f"{where}: sent_id {sent_id} appears twice: remove one of the sentences or renumber it")
            sent_ids.add(sent_id)
            text = " ".join(_text(sentence, "sent", f"{where}: sentence {sent_id}").split())
            if is_blank(text):
                left_out["empty sentences"] += 1
            else:
                expressions.append(Expression(sent_id, text))
        ids = _whole_number(ref, "image_id", where), _whole_number(ref, "ann_id", where)
        if expressions:
            references.append(Reference(ref["ref_id"], ids[0], (ids[1],), ref["split"], tuple(expressions)))
        else:
            left_out["references without a sentence"] += 1
    return references


# ----------------------------------------------------------------------------------------------------- instances.json


# Nearly all of instances.json is polygons, of which a split needs a part. Before parsing, each list of them is replaced
# by [[start, end]], its place in the file: a sixth of the time and less than half the memory.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*(\[\s*\[[-+0-9.eE,\s\[\]]*\]\s*\])')

# Most polygons are known to be sound without parsing them, which would double the time: not too many corners, whose
# coordinates are below 1,000 (never far from an image of 100 pixels), the first three not on one line.
_NUMBER = rb"((?:0|[1-9][0-9]{0,2})(?:\.[0-9]{1,9})?)"
_SOUND = re.compile(
    rb"\[\["
    + rb", ?".join([_NUMBER] * 6)
    + rb"(?:, ?N, ?N){0,2000}+\]\]".replace(b"N", _NUMBER.replace(b"(", b"(?:", 1))
)


def _is_sound(polygons: bytes, height: int, width: int) -> bool:
    """Whether it takes no closer look to know that ``usable_segmentation`` takes the polygons as they are."""
    if max(height, width) < 100 or not (match := _SOUND.fullmatch(polygons)):
        return False
    x0, y0, x1, y1, x2, y2 = map(float, match.groups())
    return abs((x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)) > 1e-3


def _read_instances(
    path: Path, references: Sequence[Reference], left_out: Counter[str]
) -> tuple[dict[int, tuple[str, int, int]], dict[int, bytes]]:
    """What the references need of instances.json: (file, height, width) by image id, segmentation by annotation id.

    Annotations without any area have none; they, and polygons like that of others, are counted in `left_out`.

    Segmentations stay JSON text until a mask is asked for. As lists of floats they would take ten times the memory, in
    every worker of a data loader.
    """
    text = path.read_bytes()
    try:
        content = json.loads(_POLYGONS.sub(lambda match: b'"segmentation":[[%d,%d]]' % match.span(1), text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; download it again from its release") from None
    parts = []
    for key in ("images", "annotations"):
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise UserError(f"{path} has no list {key!r}: expected COCO's instances format")
        parts.append(records)

    wanted_images = {reference.image_id for reference in references}
    wanted_annotations = {ann_id for reference in references for ann_id in reference.ann_ids}
    images: dict[int, tuple[str, int, int]] = {}
    for record in parts[0]:
        image_id = _whole_number(record, "id", f"{path}: an image")
        if image_id not in wanted_images:
            continue
        where = f"{path}: image {image_id}"
        height, width = _whole_number(record, "height", where), _whole_number(record, "width", where)
        if height < 1 or width < 1 or height * width > MAX_PIXELS:
            raise UserError(f"{where} is {width}x{height} pixels: expected 1 to {MAX_PIXELS} pixels")
        found = checked_file_name(_text(record, "file_name", where), where), height, width
        if images.setdefault(image_id, found) != found:
            raise UserError(f"{where} appears twice, with different files or sizes: remove one of them")

    image_of: dict[int, int] = {}
    segmentations: dict[int, Any] = {}
    for record in parts[1]:
        ann_id = _whole_number(record, "id", f"{path}: an annotation")
        if ann_id not in wanted_annotations:
            continue
        where = f"{path}: annotation {ann_id}"
        if ann_id in segmentations:
            raise UserError(f"{where} appears twice: remove one of them")
        if record.get("segmentation") is None:
            raise UserError(f"{where} has no segmentation: only a box cannot be learnt from, add its polygons or RLE")
        image_of[ann_id] = _whole_number(record, "image_id", where)
        match record["segmentation"]:
            case [[int(start), int(end)]]:
                segmentations[ann_id] = text[start:end]
            case other:  # RLE, or something wrong
                segmentations[ann_id] = other

    for kind, needed, found in (("image", wanted_images, images), ("annotation", wanted_annotations, image_of)):
        absent = sorted(needed - found.keys())
        if absent:
            raise UserError(
                f"{path} lacks {len(absent)} of {len(needed)} {kind} ids that the refs file names, such as "
                f"{absent[0]}: the two files are not of the same release"
            )
    for reference in references:
        for ann_id in reference.ann_ids:
            if image_of[ann_id] != reference.image_id:
                raise UserError(
                    f"{path}: annotation {ann_id} lies in image {image_of[ann_id]}, but reference {reference.ref_id}, "
                    f"which names it, in image {reference.image_id}: the two files are not of the same release"
                )
    for ann_id, given in list(segmentations.items()):
        size = images[image_of[ann_id]][1:]
        if isinstance(given, bytes) and _is_sound(given, *size):
            continue
        try:
            parsed = json.loads(given) if isinstance(given, bytes) else given
            usable, without_area = usable_segmentation(parsed, *size)
            if without_area or parsed is given:
                segmentations[ann_id] = json.dumps(usable).encode()
        except (ValueError, RecursionError) as error:  # our own UserError, or JSON's
            raise UserError(f"annotation {ann_id} of {path}: {error}; download the file again") from None
        if without_area:
            left_out["polygons without area"] += without_area
        if not usable:
            del segmentations[ann_id]
    unusable = sum(not segmentations.keys() >= set(reference.ann_ids) for reference in references)
    if unusable:
        left_out["references to annotations without area"] = unusable
    return images, segmentations


# -------------------------------------------------------------------------------------------------- paths and records


def _release_files(name: str, root: Path) -> tuple[Path, Path]:
    """The paths of the refs file and of instances.json, which both exist."""
    if name not in _SOURCES:
        raise UserError(f"unknown data set {shown(name)}: expected one of {', '.join(NAMES)}")
    folder, by = _SOURCES[name]
    layout = (
        f"expected <root>/{folder}/refs({by}).p, <root>/{folder}/instances.json and <root>/{IMAGE_FOLDERS[0]}/*.jpg, "
        "as unpacked from the release of https://github.com/lichengunc/refer"
    )
    if not root.is_dir():
        raise UserError(f"data folder {root} {'is not a folder' if root.exists() else 'does not exist'}: {layout}")
    files = root / folder / f"refs({by}).p", root / folder / "instances.json"
    for path in files:
        if not path.is_file():
            beside = sorted(other.name for other in path.parent.glob("refs(*).p") if other != path)
            found = f" (its folder has {', '.join(beside)})" if beside else ""
            raise UserError(f"{name} needs {path}, which does not exist{found}: {layout}")
    return files


def _image_folder(root: Path, images: str | Path | None) -> Path:
    candidates = [Path(images)] if images is not None else [root / folder for folder in IMAGE_FOLDERS]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise UserError(
        f"image folder {' or '.join(map(str, candidates))} does not exist: unpack COCO's train2014.zip there, or name "
        "the folder that has the images"
    )


def checked_file_name(file_name: str, where: str) -> str:
    """A file name that stays inside its folder on any system, or a UserError: the name comes from a downloaded file."""
    posix, windows = PurePosixPath(file_name), PureWindowsPath(file_name)
    leaves = posix.is_absolute() or windows.anchor or ".." in windows.parts
    if leaves or not posix.name or not can_be_path(file_name):
        raise UserError(f"{where} has file_name {shown(file_name)}: expected a path inside the image folder")
    return file_name


def _whole_number(record: dict[str, Any], key: str, where: str) -> int:
    value = record.get(key)
    if type(value) is not int or value.bit_length() > 63:
        raise UserError(f"{where} has {key!r} {_shown(value)}: expected a whole number of at most 63 bits")
    return value


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where} has {key!r} {_shown(value)}: expected text")
    return value


def _shown(value: object) -> str:
    return "missing" if value is None else shown(value)


def _shown_splits(refs: list[dict[str, Any]]) -> str:
    counts = Counter(ref["split"] for ref in refs)
    some = ", ".join(f"{shown(split).strip(chr(39))} ({count})" for split, count in list(counts.items())[:8])
    return f"{some} and {len(counts) - 8} more" if len(counts) > 8 else some
