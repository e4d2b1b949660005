"""References, expressions, and the interface of a data set.

The terms are those of REFER (Kazemzadeh et al. 2014; Yu et al. 2016): a *reference* ("ref") is one object in one image,
with one or more *expressions* (sentences) that each name it. An image may hold several references.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cmmasksd.errors import UserError, shown


def is_blank(text: str) -> bool:
    """Whether text is empty or consists of white space and invisible characters (control, format) only."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def require_expression(text: str, what: str) -> None:
    """Refuse a sentence that cannot be used.

    Args:
        text: the sentence.
        what: its name in the message, such as "expression 7" or "--text".

    Raises:
        UserError: it is blank, or has lone surrogates (from broken JSON, or bytes that are not UTF-8).
    """
    if is_blank(text):
        raise UserError(f"{what} is empty: give a sentence of at least one word")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8 text ({shown(text)}): write it as UTF-8") from None


@dataclass(frozen=True, slots=True)
class Expression:
    """One sentence that names the object of a reference."""

    sent_id: int
    text: str

    def __post_init__(self) -> None:
        require_expression(self.text, f"expression {self.sent_id}")


@dataclass(frozen=True, slots=True)
class Reference:
    """One object in one image, and the expressions that name it.

    Attributes:
        ref_id: unique within a data set.
        image_id: shared by the references of one image.
        ann_ids: annotations whose union is the object's mask (one in RefCOCO; several or none in gRefCOCO).
        split: the split it belongs to, such as "train".
        expressions: at least one.
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
    """One split of a data set: all that training and evaluation know of it. It pickles, for workers."""

    name: str
    """Name in the command line, such as "refcoco+"."""
    split: str

    def __len__(self) -> int:
        """Number of references."""
        ...

    def __getitem__(self, index: int) -> Reference:
        """The reference at an index from 0; IndexError beyond the last, so that a loop over the data set ends."""
        ...

    def image(self, reference: Reference) -> np.ndarray:
        """The reference's image, (H, W, 3) uint8 RGB."""
        ...

    def mask(self, reference: Reference) -> np.ndarray:
        """The reference's object, (H, W) bool, at the image's own size."""
        ...

    def groups(self) -> Sequence[Sequence[int]]:
        """Indices of the references that share an image: one sequence per image, in a fixed order."""
        ...


class ReferenceList:
    """The part of a `ReferringDataset` that follows from the list of its references, `_references`."""

    _references: Sequence[Reference]

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, index: int) -> Reference:
        return self._references[index]

    def groups(self) -> list[list[int]]:
        """Indices of the references that share an image, images in the order of their first reference."""
        groups: dict[int, list[int]] = {}
        for index, reference in enumerate(self._references):
            groups.setdefault(reference.image_id, []).append(index)
        return list(groups.values())
