"""Your own pictures: a JSONL or CSV file with one row per object, or a folder of labelme files.

    {"image": "photos/1.jpg", "expressions": ["the red cup", "cup on the left"], "mask": "masks/1.png"}

A row has these keys; a CSV file has them as its header:

    image        path of the picture, relative to the file that names it and inside its folder
    expressions  list of sentences, or one string (CSV: separated by "|"); or `text`: one sentence
    mask         path of a PNG of the picture's size, any value but 0 is the object;
      or polygon list of COCO polygons [[x0, y0, x1, y1, ...], ...] in pixels (CSV: as JSON);
      or rle     COCO's {"size": [height, width], "counts": ...} (CSV: as JSON)
    split        optional: train, val or test
    id           optional and unique; ids that are all whole numbers become the ref_id of the results

In a folder of labelme files every shape is an object and its label the sentence ("|" separates several). Shapes of one
image with the same group_id are one object. A sentence that names two objects of an image is refused there, since the
shapes may have been meant as one object; in a manifest, whose rows are objects, the log counts such sentences.

Splits. A file called train, val or test gives its rows this split. If rows name splits, those that name none are for
training. If none does, pictures are dealt out by their content, about 80 % train, 10 % val, 10 % test and at least one
each; a picture keeps its split when it is renamed. No picture may be in two splits. The split "all" is every row.

What is unusual: pictures are turned upright as their EXIF orientation says, as labelling tools and `predict` do (masks
of RefCOCO are drawn on the stored pixels). A mask without a pixel is allowed: the sentence names nothing there.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import logging
import math
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from cmmasksd.data.images import can_be_path, image_size, read_image, read_mask
from cmmasksd.data.masks import decode_segmentation, mask_to_rle
from cmmasksd.data.samples import Expression, Reference, is_blank, is_text
from cmmasksd.errors import UserError, shown

SPLITS = ("train", "val", "test")
ALL = "all"
"""The split that holds every row."""
SUFFIXES = (".jsonl", ".csv")
"""Of manifests."""

log = logging.getLogger(__name__)

_MASKS = ("mask", "polygon", "rle")
_KEYS = ("image", "expressions", "text", *_MASKS, "split", "id")
_SHARE = 0.1  # of the pictures in val, and in test, where no row names a split


@dataclass(frozen=True, slots=True)
class Shapes:
    """labelme's shapes of one object, and the (height, width) of the picture they were drawn on, where it is said."""

    shapes: list[dict[str, Any]]
    size: tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a manifest.

    Attributes:
        where: file and line, for messages.
        image: path of the picture; that it exists is not checked yet.
        expressions: at least one, none empty.
        mask: path of a PNG, a COCO segmentation, labelme shapes, or None where the row has no mask.
        split: as the row or its file names it.
        id: as the row gives it.
    """

    where: str
    image: Path
    expressions: tuple[str, ...]
    mask: Path | list[Any] | dict[str, Any] | Shapes | None = None
    split: str | None = None
    id: str | None = None


class ManifestDataset:
    """One split of one's own data; implements ``ReferringDataset``.

    Everything is checked on construction except pixels, so that a mistake stops a run before it starts. Polygons are
    kept as RLE.

    Args:
        root: a manifest, or a folder that holds manifests or labelme files (also in folders below).
        split: "train", "val", "test" or "all".

    Raises:
        UserError: naming file and line of the first mistake.
    """

    name = "manifest"

    def __init__(self, root: str | Path, split: str) -> None:
        self.split = split
        if split not in (*SPLITS, ALL):
            raise UserError(f"a manifest has no split {shown(split)}: choose one of {', '.join(SPLITS)}, {ALL}")
        rows = _all_rows(Path(root))
        _check_ids(rows)
        _tell_ambiguous(rows, Path(root))
        numbered = all(row.id is not None and re.fullmatch("0|[1-9][0-9]{0,17}", row.id) for row in rows)
        if split != ALL:
            rows = _with_splits(rows)
        image_ids: dict[Path, int] = {}
        sizes: dict[Path, tuple[int, int]] = {}
        self._references: list[Reference] = []
        self._masks: list[Path | dict[str, Any]] = []
        self._rows: dict[int, int] = {}  # ref_id -> index
        self._where: list[tuple[str, Path]] = []
        sent_id = 0
        for number, row in enumerate(rows, start=1):
            image_id = image_ids.setdefault(row.image, len(image_ids) + 1)
            ref_id = int(row.id) if numbered and row.id else number
            expressions = tuple(Expression(sent_id + nth, text) for nth, text in enumerate(row.expressions, start=1))
            sent_id += len(expressions)
            if split not in (ALL, row.split):
                continue
            with _saying(row.where):
                if row.image not in sizes:
                    sizes[row.image] = image_size(row.image, exif=True)
                self._masks.append(_checked_mask(row.mask, sizes[row.image]))
            self._rows[ref_id] = len(self._references)
            self._references.append(Reference(ref_id, image_id, (ref_id,), row.split or ALL, expressions))
            self._where.append((row.where, row.image))
        if not self._references:
            have = ", ".join(sorted({row.split or ALL for row in rows}))
            raise UserError(f"{root} has no row of the split {split!r}, only of {have}: name it in rows, or use {ALL}")

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, index: int) -> Reference:
        return self._references[index]

    def image(self, reference: Reference) -> np.ndarray:
        """The reference's picture, (H, W, 3) uint8 RGB, upright.

        Raises:
            UserError: it is damaged.
        """
        where, image = self._where[self._rows[reference.ref_id]]
        with _saying(where):
            return read_image(image, exif=True)

    def mask(self, reference: Reference) -> np.ndarray:
        """The reference's object, (H, W) bool.

        Raises:
            UserError: its file is damaged.
        """
        index = self._rows[reference.ref_id]
        mask = self._masks[index]
        if isinstance(mask, dict):
            return decode_segmentation(mask, *mask["size"])
        with _saying(self._where[index][0]):
            return read_mask(mask)

    def groups(self) -> list[list[int]]:
        """Indices of the references that share a picture, pictures in the order in which they first appear."""
        groups: dict[int, list[int]] = {}
        for index, reference in enumerate(self._references):
            groups.setdefault(reference.image_id, []).append(index)
        return list(groups.values())


@contextmanager
def _saying(where: str) -> Iterator[None]:
    """Within it, a UserError also says where: file and line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def _all_rows(root: Path) -> list[Row]:
    """The rows of a file, or of all files of a folder."""
    if root.is_file():
        rows = read_rows(root, masks=True)
    elif not root.is_dir():
        raise UserError(f"{root} does not exist: give a .jsonl or .csv file, or a folder of labelme files")
    elif manifests := sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES):
        for file in manifests:
            if len(manifests) > 1 and file.stem not in SPLITS:
                raise UserError(
                    f"{root} holds {len(manifests)} manifests: call them {', '.join(SPLITS)}, or give one file of them "
                    f"(found {file.name})"
                )
        rows = [row for file in manifests for row in read_rows(file, masks=True)]
    elif labels := sorted(root.rglob("*.json")):
        rows = [row for file in labels for row in _labelme_rows(file, root)]
    else:
        raise UserError(f"{root} holds no manifest (.jsonl or .csv) and no labelme file (.json): check the path")
    if not rows:
        raise UserError(f"{root} has no row: give it at least one picture with a sentence")
    return rows


def read_rows(file: Path, *, masks: bool = False) -> list[Row]:
    """Read a manifest.

    Args:
        file: a .jsonl or .csv file.
        masks: every row needs one; otherwise they are not read.

    Raises:
        UserError: naming file and line of the first mistake.
    """
    if not file.is_file():
        raise UserError(f"manifest {file} does not exist: check the path")
    read = {".jsonl": _jsonl, ".csv": _csv}.get(file.suffix.lower())
    if read is None:
        raise UserError(f"{file} is no manifest: give a .jsonl or .csv file (or a folder of labelme files)")
    try:
        return [_row(record, where, file, masks) for where, record in read(file)]
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it with this encoding") from None


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error}): write one object {{...}} per line") from None
            if not isinstance(record, dict):
                raise UserError(f"{where} holds {shown(record)}: write one object {{...}} per line")
            yield where, record


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        first = lines.readline()
        lines.seek(0)
        reader = csv.reader(lines, delimiter=max(",;\t", key=first.count), strict=True)
        header: list[str] = []
        try:
            for cells in reader:
                where = f"{file}, line {reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if not header:
                    header = [cell.strip() for cell in cells]
                    if len(set(header)) != len(header):
                        raise UserError(f"{where} names a column twice: {shown(header)}")
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{where} has {len(cells)} cells and the header {len(header)}: put cells that hold the "
                        "separator into quotes"
                    )
                record: dict[str, Any] = {key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()}
                if unknown := [key for key in header if key not in _KEYS]:
                    raise _unknown(where, unknown[0])
                if "expressions" in record:
                    record["expressions"] = record["expressions"].split("|")
                for key in ("polygon", "rle"):
                    if key in record:
                        try:
                            record[key] = json.loads(record[key])
                        except (ValueError, RecursionError) as error:
                            raise UserError(f"{where}: {key} is not JSON ({error})") from None
                yield where, record
        except csv.Error as error:
            raise UserError(
                f"{file}, line {reader.line_num} is not CSV ({error}): close its quotes, or write long values as .jsonl"
            ) from None


def _row(record: dict[str, Any], where: str, file: Path, masks: bool) -> Row:
    for key in record:
        if key not in _KEYS:
            raise _unknown(where, key)
    record = {key: value for key, value in record.items() if value is not None}
    if "image" not in record:
        raise UserError(f"{where} has no image: give the picture's path, relative to {file.parent}")
    if ("text" in record) == ("expressions" in record):
        raise UserError(f"{where}: give its sentences as 'expressions' (or one as 'text'), not none and not both")
    texts = record["text"] if "text" in record else record["expressions"]
    given = [key for key in _MASKS if key in record]
    if masks and len(given) != 1:
        raise UserError(f"{where} has {' and '.join(given) or 'no mask'}: give one of {', '.join(_MASKS)}")
    mask = None
    if masks:
        mask = record[given[0]]
        if given[0] == "mask":
            mask = _inside(file.parent, mask, f"{where}: mask")
        elif not isinstance(mask, list if given[0] == "polygon" else dict):
            form = "[[x0, y0, x1, y1, ...], ...]" if given[0] == "polygon" else '{"size": ..., "counts": ...}'
            raise UserError(f"{where}: {given[0]} is {shown(mask)}: expected {form}")
    split = record.get("split", file.stem if file.stem in SPLITS else None)
    if split is not None and split not in SPLITS:
        raise UserError(f"{where} has the split {shown(split)}: choose one of {', '.join(SPLITS)}")
    name = record.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, int | str)):
        raise UserError(f"{where} has the id {shown(name)}: give a whole number or text")
    return Row(
        where,
        _inside(file.parent, record["image"], f"{where}: image"),
        _sentences(texts, where),
        mask,
        split,
        None if name is None else str(name),
    )


def _labelme_rows(file: Path, root: Path) -> Iterator[Row]:
    """One row per object of a labelme file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it with this encoding") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): save it again with labelme") from None
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list) or not isinstance(content.get("imagePath"), str):
        raise UserError(f"{file} is not a labelme file (no 'shapes' or no 'imagePath'): move it out of {root}")
    below = posixpath.join(file.parent.relative_to(root).as_posix(), content["imagePath"].replace("\\", "/"))
    image = _inside(root, below, f"{file}: imagePath")
    objects: dict[object, list[tuple[int, dict[str, Any]]]] = {}
    for number, shape in enumerate(shapes, start=1):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise UserError(f"{file}, shape {number} has no label: give it a sentence")
        group = shape.get("group_id")
        if not isinstance(group, int | str | None) or len(str(group)) > 100:
            raise UserError(f"{file}, shape {number} has the group_id {shown(group)}: expected a whole number or null")
        objects.setdefault(("shape", number) if group is None else str(group), []).append((number, shape))
    size = content.get("imageHeight"), content.get("imageWidth")
    named: dict[str, int] = {}  # by sentence, the shape that it names
    for parts in objects.values():
        first = parts[0][0]
        where = f"{file}, shape {first}"
        texts = _sentences([text for _, shape in parts for text in shape["label"].split("|")], where)
        for text in texts:
            if named.setdefault(text.casefold(), first) != first:
                raise UserError(
                    f"{where}: the sentence {shown(text)} also names shape {named[text.casefold()]}: give both the "
                    "same group_id if they are parts of one object, else write sentences that tell them apart"
                )
        yield Row(where, image, tuple(dict.fromkeys(texts)), Shapes([shape for _, shape in parts], size))


def _inside(folder: Path, name: object, where: str) -> Path:
    """A path below the folder on any system: it comes from a file that others may have written."""
    if not isinstance(name, str):
        raise UserError(f"{where} is {shown(name)}: expected a path")
    plain = posixpath.normpath(name.replace("\\", "/"))
    leaves = plain.startswith("/") or PureWindowsPath(plain).anchor or plain.split("/")[0] == ".."
    if leaves or plain == "." or not can_be_path(plain):
        raise UserError(f"{where} {shown(name)} is no path inside {folder}: put the file there and name it from there")
    if not Path(os.path.realpath(folder / plain)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{where} {shown(name)} is a link to a place outside {folder}: put the file itself there")
    return folder / plain


def _sentences(given: object, where: str) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: the sentences are {shown(given)}: expected a list of texts, or one text")
    texts = [" ".join(text.split()) for text in texts]
    for text in texts:
        if is_blank(text):
            raise UserError(f"{where} has an empty sentence: write at least one word or remove it")
        if not is_text(text):
            raise UserError(f"{where} has a sentence that is no text ({shown(text)}): write it as UTF-8")
    return tuple(texts)


def _check_ids(rows: Sequence[Row]) -> None:
    first: dict[str, str] = {}
    for row in rows:
        if row.id is not None and (other := first.setdefault(row.id, row.where)) is not row.where:
            raise UserError(f"{row.where} has the id {shown(row.id)}, as {other} has: give every row an id of its own")


def _tell_ambiguous(rows: Sequence[Row], root: Path) -> None:
    """Log how many sentences name two objects of one image."""
    first: dict[tuple[Path, str], Row] = {}
    texts = [(row, text.casefold()) for row in rows for text in row.expressions]
    again = [(row, text) for row, text in texts if first.setdefault((row.image, text), row) is not row]
    if again:
        row, text = again[0]
        log.warning(
            "%s: sentences that name more than one object of their picture: %d, such as %s in %s and %s",
            *(root, len(again), shown(text), first[row.image, text].where, row.where),
        )


def _unknown(where: str, key: object) -> UserError:
    return UserError(f"{where} has the unknown key {shown(key)}: expected some of {', '.join(_KEYS)}")


# ---------------------------------------------------------------------------------------------------------------------
# Splits and masks


def _with_splits(rows: Sequence[Row]) -> list[Row]:
    """Every row with a split; a picture has only one."""
    if not any(row.split for row in rows):
        chosen = _deal(rows)
        return [replace(row, split=chosen[row.image]) for row in rows]
    rows = [replace(row, split=row.split or "train") for row in rows]
    first: dict[Path, Row] = {}
    for row in rows:
        other = first.setdefault(row.image, row)
        if other.split != row.split:
            raise UserError(
                f"{row.where}: picture {row.image} is in {row.split}, and by {other.where} in {other.split}: a model "
                "must not be scored on pictures it has learnt; give all its rows one split"
            )
    return rows


def _deal(rows: Sequence[Row]) -> dict[Path, str]:
    """A split for every picture, by the digest of its file: equal files stay together."""
    digests: dict[Path, str] = {}
    for row in rows:
        if row.image not in digests:
            if not row.image.is_file():
                raise UserError(f"{row.where}: image {row.image} does not exist: check the path")
            with row.image.open("rb") as file:
                digests[row.image] = hashlib.file_digest(file, "sha256").hexdigest()
    order = sorted(set(digests.values()))
    if len(order) < len(SPLITS):
        raise UserError(
            f"{len(order)} different pictures cannot be dealt out to {', '.join(SPLITS)}: add pictures, name a split "
            f"in every row, or use the split {ALL}"
        )
    place = [int(digest[:8], 16) / 16**8 for digest in order]
    val = max(1, sum(p < _SHARE for p in place))
    test = max(1, sum(_SHARE <= p < 2 * _SHARE for p in place))
    of = {digest: "val" if at < val else "test" if at < val + test else "train" for at, digest in enumerate(order)}
    return {image: of[digest] for image, digest in digests.items()}


def _checked_mask(
    mask: Path | list[Any] | dict[str, Any] | Shapes | None, size: tuple[int, int]
) -> Path | dict[str, Any]:
    """The mask as a path or RLE, known to have the picture's size (height, width)."""
    if isinstance(mask, Path):
        if (own := image_size(mask)) != size:
            turned = " (the picture is turned by its EXIF orientation)" if own == size[::-1] != size else ""
            raise UserError(
                f"mask {mask} is {own[1]}x{own[0]} pixels and its picture {size[1]}x{size[0]}{turned}: they must have "
                "one size"
            )
        return mask
    found = (
        _labelme_mask(mask.shapes, mask.size, size) if isinstance(mask, Shapes) else decode_segmentation(mask, *size)
    )
    if not isinstance(mask, dict) and not found.any():
        raise UserError(
            "its outline covers no pixel: draw the object again, or give an empty mask if the sentence names nothing"
        )
    return mask_to_rle(found)


def _labelme_mask(shapes: list[dict[str, Any]], stated: tuple[Any, Any], size: tuple[int, int]) -> np.ndarray:
    """The union of labelme shapes, (H, W) bool."""
    if None not in stated and stated != size:
        raise UserError(
            f"it was labelled at {shown(stated[1])}x{shown(stated[0])} pixels and its picture has {size[1]}x{size[0]}: "
            "use the picture that was labelled"
        )
    union = np.zeros(size, dtype=bool)
    for shape in shapes:
        kind = shape.get("shape_type", "polygon")
        points = _points(shape.get("points"))
        if points is None:
            raise UserError(f"its points are {shown(shape.get('points'))}: expected [[x, y], ...]")
        if kind in ("rectangle", "circle", "mask") and len(points) != 2:
            raise UserError(f"a {kind} has {len(points)} points: expected two")
        if kind == "mask":
            union |= _pasted(shape.get("mask"), points, size)
            continue
        if kind == "rectangle":
            (x0, y0), (x1, y1) = points
            points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        elif kind == "circle":  # its centre, and a point on it
            angles = np.arange(0, 2 * math.pi, math.pi / 64)
            points = points[0] + math.dist(*points) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        elif kind != "polygon":
            raise UserError(f"a shape of the type {shown(kind)} has no area: draw a polygon, rectangle, circle or mask")
        union |= decode_segmentation([points.ravel().tolist()], *size)
    return union


def _points(given: object) -> np.ndarray | None:
    """labelme's points as (P, 2), or None where they are none."""
    if not isinstance(given, list) or not all(isinstance(point, list) and len(point) == 2 for point in given):
        return None
    numbers = [number for point in given for number in point]
    if not all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers):  # also false for NaN
        return None
    return np.array(numbers, dtype=np.float64).reshape(-1, 2)


def _pasted(encoded: object, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """labelme's shape of the type "mask": a PNG in base64, laid over the rectangle that its two points span."""
    if not isinstance(encoded, str):
        raise UserError("a shape of the type 'mask' has no 'mask': save it again with labelme")
    try:
        part = read_mask(base64.b64decode(encoded, validate=True))
    except binascii.Error as error:
        raise UserError(f"its mask is not base64 ({error}): save it again with labelme") from None
    (left, top), (right, bottom) = points.round().astype(int)
    whole = np.zeros(size, dtype=bool)
    place = whole[max(top, 0) : bottom + 1, max(left, 0) : right + 1]
    if min(left, top) < 0 or place.shape != part.shape:
        raise UserError(
            f"its mask of {part.shape} does not fit its points {points.tolist()}: save it again with labelme"
        )
    place |= part
    return whole
