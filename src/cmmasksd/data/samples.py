"""The typed records that every other module passes around: a reference, its expressions, and where they come from.

The names are those of the field (REFER, Kazemzadeh et al. 2014; Yu et al. 2016): a *reference* ("ref") is one object in
one image; it carries one or more *expressions* (sentences) that each name it. An image may hold several references.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cmmasksd.errors import UserError, shown


def is_blank(text: str) -> bool:
    """Whether text says nothing: white space and invisible characters (control, format) only, or nothing at all."""
    return not any(not char.isspace() and unicodedata.category(char) not in ("Cc", "Cf") for char in text)


def is_text(text: str) -> bool:
    """Whether text can be written as UTF-8: bytes that are not, and broken JSON, leave lone surrogates."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


@dataclass(frozen=True, slots=True)
class Expression:
    """One sentence that names the object of a reference."""

    sent_id: int
    text: str

    def __post_init__(self) -> None:
        if is_blank(self.text):
            raise UserError(f"expression {self.sent_id} is empty: every expression needs at least one word")
        if not is_text(self.text):
            raise UserError(f"expression {self.sent_id} is not text ({shown(self.text)}): write it as UTF-8")


@dataclass(frozen=True, slots=True)
class Reference:
    """One object in one image, and the expressions that name it.

    Attributes:
        ref_id: unique within a data set.
        image_id: references with the same image_id share their image.
        ann_ids: annotations whose union is the object's mask (RefCOCO has one; gRefCOCO several or none).
        split: "train", "val", "testA", "testB" or "test".
        expressions: never empty.
    """

    ref_id: int
    image_id: int
    ann_ids: tuple[int, ...]
    split: str
    expressions: tuple[Expression, ...]

    def __post_init__(self) -> None:
        if not self.expressions:
            raise UserError(f"reference {self.ref_id} has no expression: remove it or give it a sentence")


class ReferringDataset(Protocol):
    """One split of a data set. Readers implement it; training and evaluation know nothing else."""

    name: str
    """The name the command line uses, such as "refcoco+"."""
    split: str

    def __len__(self) -> int:
        """Number of references."""
        ...

    def __getitem__(self, index: int) -> Reference: ...

    def image(self, reference: Reference) -> np.ndarray:
        """The reference's image, (H, W, 3) uint8 RGB."""
        ...

    def mask(self, reference: Reference) -> np.ndarray:
        """The reference's object, (H, W) bool, at the image's own size."""
        ...

    def groups(self) -> Sequence[Sequence[int]]:
        """Indices of the references that share an image, one sequence per image, in a fixed order."""
        ...
