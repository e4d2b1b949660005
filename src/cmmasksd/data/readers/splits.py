"""The split of every row of a manifest: train, val or test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cmmasksd.data.readers.rows import ALL, SPLITS, Row
from cmmasksd.errors import UserError
from cmmasksd.files import sha256

_SHARE = 0.1  # fraction of the images in val, and in test, where no row names a split


def with_splits(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with a split. All rows of an image have the same one."""
    if not any(row.split for row in rows):
        split_of = _splits_by_content(rows)
        return [replace(row, split=split_of[row.image]) for row in rows]
    rows = [replace(row, split=row.split or "train") for row in rows]
    first: dict[Path, Row] = {}
    for row in rows:
        other = first.setdefault(row.image, row)
        if other.split != row.split:
            raise UserError(
                f"{row.where}: image {row.image} is in {row.split}, and by {other.where} in {other.split}: a model "
                "must not be scored on images it was trained on; give all its rows one split"
            )
    return rows


def _splits_by_content(rows: Sequence[Row]) -> dict[Path, str]:
    """A split for every image by the digest of its file: equal files stay together."""
    digests: dict[Path, str] = {}
    for row in rows:
        if row.image not in digests:
            if not row.image.is_file():
                raise UserError(f"{row.where}: image {row.image} does not exist: check the path")
            digests[row.image] = sha256(row.image)
    order = sorted(set(digests.values()))
    if len(order) < len(SPLITS):
        raise UserError(
            f"{len(order)} different images are too few for {', '.join(SPLITS)}: add images, name a split in every "
            f"row, or use the split {ALL}"
        )
    fractions = [int(digest[:8], 16) / 16**8 for digest in order]
    val = max(1, sum(fraction < _SHARE for fraction in fractions))
    test = max(1, sum(_SHARE <= fraction < 2 * _SHARE for fraction in fractions))
    splits = ["val"] * val + ["test"] * test + ["train"] * (len(order) - val - test)
    split_of = dict(zip(order, splits, strict=True))
    return {image: split_of[digest] for image, digest in digests.items()}
