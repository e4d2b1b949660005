"""Own data: a JSONL or CSV file with one row per object, a folder of labelme files, or a file of `annotated`.

    {"image": "photos/1.jpg", "expressions": ["the red cup", "cup on the left"], "mask": "masks/1.png"}

Keys of a row; a CSV file has them as its header:

    image        path of the image, relative to the manifest and inside its folder
    expressions  list of sentences, or one string (CSV: separated by "|"); or `text`: one sentence
    mask         path of a PNG of the image's size; any value but 0 is the object
      or polygon list of COCO polygons [[x0, y0, x1, y1, ...], ...] in pixels (CSV: as JSON)
      or rle     COCO's {"size": [height, width], "counts": ...} (CSV: as JSON)
    split        optional: train, val or test
    id           optional and unique; if all ids are whole numbers, they become the ref_id of the results

In a folder of labelme files, every shape is an object and its label the sentence ("|" separates several). Shapes of one
image with the same group_id are one object. A sentence that names two objects of an image is refused, since the shapes
may have been meant as one object; in a manifest, whose rows are objects, the log counts such sentences.

Of a COCO, CVAT or Label Studio file, the objects that have sentences are rows.

Splits: a file called train, val or test gives its rows this split. If some rows name splits, the others are for
training. If none does, the content of the images decides: about 80 % train, 10 % val, 10 % test and at least one each;
an image keeps its split when it is renamed. An image must not be in two splits. The split "all" has every row.

What is unusual: images are turned upright by their EXIF orientation, as labelling tools and `predict` do (masks of
RefCOCO are drawn on the stored pixels). A mask without a pixel is allowed: the sentence names nothing in the image.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cmmasksd.data.images import image_size, read_image, read_mask
from cmmasksd.data.masks import decode_segmentation, mask_to_rle
from cmmasksd.data.readers.annotated import expression_rows
from cmmasksd.data.readers.labelme import labelme_mask, labelme_rows
from cmmasksd.data.readers.rows import ALL, OWN_DATA, SPLITS, SUFFIXES, Row, Shapes, read_rows
from cmmasksd.data.readers.splits import with_splits
from cmmasksd.data.samples import Expression, Reference, ReferenceList
from cmmasksd.errors import UserError, shown

log = logging.getLogger(__name__)


class ManifestDataset(ReferenceList):
    """One split of own data; implements ``ReferringDataset``.

    Everything but the pixels is checked on construction, so that a mistake stops a run before it starts. Polygons are
    kept as RLE.

    Args:
        root: a manifest, an annotation file with sentences, or a folder that holds manifests or labelme files (also
            in folders below).
        split: "train", "val", "test" or "all".

    Raises:
        UserError: something is wrong; it names file and line.
    """

    name = "manifest"

    def __init__(self, root: str | Path, split: str) -> None:
        self.split = split
        if split not in (*SPLITS, ALL):
            raise UserError(f"a manifest has no split {shown(split)}: choose one of {', '.join(SPLITS)}, {ALL}")
        rows = _all_rows(Path(root))
        _check_ids(rows)
        _log_ambiguous(rows, Path(root))
        numbered = all(row.id is not None and re.fullmatch("0|[1-9][0-9]{0,17}", row.id) for row in rows)
        if split != ALL:
            rows = with_splits(rows)
        image_ids: dict[Path, int] = {}
        sizes: dict[Path, tuple[int, int]] = {}
        references: list[Reference] = []
        self._rows: dict[int, Row] = {}  # by ref_id; their masks are paths or RLE
        sent_id = 0
        for number, row in enumerate(rows, start=1):
            image_id = image_ids.setdefault(row.image, len(image_ids) + 1)
            ref_id = int(row.id) if numbered and row.id else number
            expressions = tuple(Expression(sent_id + nth, text) for nth, text in enumerate(row.expressions, start=1))
            sent_id += len(expressions)
            if split not in (ALL, row.split):
                continue
            with _located(row.where):
                if row.image not in sizes:
                    sizes[row.image] = image_size(row.image, exif=True)
                self._rows[ref_id] = replace(row, mask=_checked_mask(row.mask, sizes[row.image]))
            references.append(Reference(ref_id, image_id, (ref_id,), row.split or ALL, expressions))
        if not references:
            splits = ", ".join(sorted({row.split or ALL for row in rows}))
            raise UserError(
                f"{root} has no row of the split {split!r}, only of {splits}: name it in rows, or use {ALL}"
            )
        self._references = references

    def image(self, reference: Reference) -> np.ndarray:
        """The reference's image, upright, (H, W, 3) uint8 RGB.

        Raises:
            UserError: it is damaged.
        """
        row = self._rows[reference.ref_id]
        with _located(row.where):
            return read_image(row.image, exif=True)

    def mask(self, reference: Reference) -> np.ndarray:
        """The reference's object, (H, W) bool.

        Raises:
            UserError: its file is damaged.
        """
        row = self._rows[reference.ref_id]
        if isinstance(row.mask, dict):
            return decode_segmentation(row.mask, *row.mask["size"])
        assert isinstance(row.mask, Path)
        with _located(row.where):
            return read_mask(row.mask)


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the file and line in front of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _all_rows(root: Path) -> list[Row]:
    """The rows of a file, or of all files of a folder."""
    if root.is_file() and root.suffix.lower() in (".json", ".xml"):
        rows = list(expression_rows(root))
    elif root.is_file():
        rows = read_rows(root, masks=True)
    elif not root.is_dir():
        raise UserError(f"{root} does not exist: give a {OWN_DATA}")
    elif manifests := sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES):
        for file in manifests:
            if len(manifests) > 1 and file.stem not in SPLITS:
                raise UserError(
                    f"{root} holds {len(manifests)} manifests: call them {', '.join(SPLITS)}, or give one file of them "
                    f"(found {file.name})"
                )
        rows = [row for file in manifests for row in read_rows(file, masks=True)]
    elif labels := sorted(root.rglob("*.json")):
        rows = [row for file in labels for row in labelme_rows(file, root)]
    else:
        raise UserError(f"{root} holds no manifest (.jsonl or .csv) and no labelme file (.json): give a {OWN_DATA}")
    if not rows:
        raise UserError(f"{root} has no row: give it at least one image with a sentence")
    return rows


def _check_ids(rows: Sequence[Row]) -> None:
    first: dict[str, str] = {}
    for row in rows:
        if row.id is not None and (other := first.setdefault(row.id, row.where)) is not row.where:
            raise UserError(f"{row.where} has the id {shown(row.id)}, as {other} has: ids must be unique")


def _log_ambiguous(rows: Sequence[Row], root: Path) -> None:
    """Log how many sentences name two objects of one image."""
    first: dict[tuple[Path, str], Row] = {}
    texts = [(row, text.casefold()) for row in rows for text in row.expressions]
    ambiguous = [(row, text) for row, text in texts if first.setdefault((row.image, text), row) is not row]
    if ambiguous:
        row, text = ambiguous[0]
        log.warning(
            "%s: sentences that name more than one object of their image: %d, such as %s in %s and %s",
            *(root, len(ambiguous), shown(text), first[row.image, text].where, row.where),
        )


def _checked_mask(
    mask: Path | list[Any] | dict[str, Any] | Shapes | None, size: tuple[int, int]
) -> Path | dict[str, Any]:
    """The mask as a path or RLE, if it has the image's size (height, width)."""
    if isinstance(mask, Path):
        height, width = image_size(mask)
        if (height, width) != size:
            turned = " (the image is turned by its EXIF orientation)" if (width, height) == size else ""
            raise UserError(
                f"mask {mask} is {width}x{height} pixels and its image {size[1]}x{size[0]}{turned}: give a mask of the "
                "image's size"
            )
        return mask
    pixels = labelme_mask(mask, size) if isinstance(mask, Shapes) else decode_segmentation(mask, *size)
    if not isinstance(mask, dict) and not pixels.any():
        raise UserError(
            "its outline covers no pixel: draw the object again, or give an empty mask if the sentence names nothing"
        )
    return mask_to_rle(pixels)
