"""Which rows of a manifest are for training, which for choosing a model, which for the test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cmmasksd.data.readers.rows import ALL, SPLITS, Row
from cmmasksd.errors import UserError

_SHARE = 0.1  # of the pictures in val, and in test, where no row names a split


def with_splits(rows: Sequence[Row]) -> list[Row]:
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
