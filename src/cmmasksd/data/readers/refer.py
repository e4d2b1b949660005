"""RefCOCO, RefCOCO+ and RefCOCOg, read from the files of their release as they are: no conversion, no index files.

    <root>/refcoco/refs(unc).p        <root>/refcoco+/refs(unc).p
    <root>/refcocog/refs(umd).p       <root>/refcocog/refs(google).p
    <root>/<folder>/instances.json    <root>/images/train2014/COCO_train2014_*.jpg

The format is REFER's (Kazemzadeh et al. 2014; Yu et al. 2016). We deviate from its ``refer.py`` where that misleads:
the refs file, a pickle from the internet, is read without running what it may hold; crowd annotations are decoded; a
split is matched by its whole name; lengths come from the data. The text is the cleaned ``sent``, not ``raw``, with its
white space evened out.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmmasksd.data.images import read_image
from cmmasksd.data.masks import decode_segmentation
from cmmasksd.data.readers.fields import shown_field, text, whole_number
from cmmasksd.data.readers.instances import read_instances
from cmmasksd.data.readers.plain_pickle import load_plain_pickle
from cmmasksd.data.samples import Expression, Reference, ReferenceList, is_blank
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
"""Larger refs files are refused; the largest of the release has some 30 MB."""

IMAGE_FOLDERS = (Path("images/train2014"), Path("images/mscoco/images/train2014"))
"""Folders of the images under the root: that of our documentation, and that of the original toolbox."""

log = logging.getLogger(__name__)


class ReferDataset(ReferenceList):
    """One split of RefCOCO, RefCOCO+ or RefCOCOg; implements ``ReferringDataset``.

    Everything but the pixels is checked on construction, so that a missing file stops a run before it starts. Masks are
    decoded and images read on demand. Releases hold parts that no model can learn from: empty sentences, polygons
    without area, and references that have nothing else. These are left out, and one line of the log counts them.

    Args:
        name: one of ``NAMES``.
        root: the folder that holds ``refcoco``, ``refcoco+``, ``refcocog`` and ``images``.
        split: as the refs file calls it, such as "train", "val", "testA".

    Raises:
        UserError: a file is missing or damaged, or does not fit the others.
    """

    def __init__(self, name: str, root: str | Path, split: str) -> None:
        self.name = name
        self.split = split
        refs_path, self._instances_path = _release_files(name, Path(root))
        refs = _read_refs(refs_path)
        chosen = [ref for ref in refs if ref["split"] == split]
        if not chosen:
            raise UserError(f"{name} has no split {shown(split)}: {refs_path} holds {_shown_splits(refs)}")
        image_folder = _image_folder(Path(root))
        left_out: Counter[str] = Counter()
        references = _references(chosen, refs_path, left_out)
        self._images, self._segmentations = read_instances(self._instances_path, image_folder, references, left_out)
        self._references = tuple(ref for ref in references if self._segmentations.keys() >= set(ref.ann_ids))
        if len(self._references) < len(references):
            left_out["references to annotations without area"] = len(references) - len(self._references)
        if left_out:
            counts = ", ".join(f"{kind} ({count})" for kind, count in left_out.items())
            if not self._references:
                raise UserError(f"{name} {split} of {refs_path.parent} has nothing else than {counts}: check the files")
            log.warning("%s %s of %s: left out %s", name, split, refs_path.parent, counts)
        missing = [image.path for image in self._images.values() if not Path(image.path).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self._images)} images of {name} {split} are missing, the first is "
                f"{missing[0]}: unpack COCO's train2014.zip into {image_folder}"
            )

    def image(self, reference: Reference) -> np.ndarray:
        """The reference's image as stored (EXIF orientation is not applied), (H, W, 3) uint8 RGB.

        Raises:
            UserError: the file is missing or damaged, or its size is not the one in instances.json.
        """
        file, height, width = self._images[reference.image_id]
        image = read_image(file)
        if image.shape[:2] != (height, width):
            raise UserError(
                f"image {file} is {image.shape[1]}x{image.shape[0]} pixels but {self._instances_path} says "
                f"{width}x{height}: its masks would not fit, use the original file"
            )
        return image

    def mask(self, reference: Reference) -> np.ndarray:
        """The reference's object, (H, W) bool: the union of its annotations and of their parts."""
        _, height, width = self._images[reference.image_id]
        mask = np.zeros((height, width), dtype=bool)
        for ann_id in reference.ann_ids:
            mask |= decode_segmentation(json.loads(self._segmentations[ann_id]), height, width)
        return mask


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
            others = ", ".join(sorted(other.name for other in path.parent.glob("refs(*).p") if other != path))
            hint = f" (its folder has {others})" if others else ""
            raise UserError(f"{name} needs {path}, which does not exist{hint}: {layout}")
    return files


def _image_folder(root: Path) -> Path:
    folders = [root / folder for folder in IMAGE_FOLDERS]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UserError(
        f"image folder {' or '.join(map(str, folders))} does not exist: unpack COCO's train2014.zip there, or link "
        "the folder of the images"
    )


def _load_refs(path: Path) -> object:
    """The plain value in a refs file."""
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
        ref_id = whole_number(ref, "ref_id", f"{path}: a reference")
        if ref_id in seen:
            raise UserError(f"{path}: ref_id {ref_id} appears twice: remove one of the references or renumber it")
        seen.add(ref_id)
        text(ref, "split", f"{path}: reference {ref_id}")
    return refs


def _references(refs: Sequence[dict[str, Any]], path: Path, left_out: Counter[str]) -> list[Reference]:
    """The references that have a sentence; what is left out is counted."""
    references = []
    sent_ids: set[int] = set()
    for ref in refs:
        where = f"{path}: reference {ref['ref_id']}"
        sentences = ref.get("sentences")
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            raise UserError(f"{where} has 'sentences' {shown_field(sentences)}: expected a list of dicts")
        expressions = []
        for sentence in sentences:
            sent_id = whole_number(sentence, "sent_id", f"{where}: a sentence")
            if sent_id in sent_ids:
                raise UserError(f"{where}: sent_id {sent_id} appears twice: remove one of the sentences or renumber it")
            sent_ids.add(sent_id)
            cleaned = " ".join(text(sentence, "sent", f"{where}: sentence {sent_id}").split())
            if is_blank(cleaned):
                left_out["empty sentences"] += 1
            else:
                expressions.append(Expression(sent_id, cleaned))
        image_id, ann_id = whole_number(ref, "image_id", where), whole_number(ref, "ann_id", where)
        if expressions:
            references.append(Reference(ref["ref_id"], image_id, (ann_id,), ref["split"], tuple(expressions)))
        else:
            left_out["references without a sentence"] += 1
    return references


def _shown_splits(refs: list[dict[str, Any]]) -> str:
    counts = Counter(ref["split"] for ref in refs)
    first = ", ".join(f"{shown(split).strip(chr(39))} ({count})" for split, count in list(counts.items())[:8])
    return f"{first} and {len(counts) - 8} more" if len(counts) > 8 else first
