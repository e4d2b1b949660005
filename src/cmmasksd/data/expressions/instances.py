"""Annotated regions of an image, whose masks are decoded and whose classes are written as `words` knows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmmasksd.data.expressions.words import class_key
from cmmasksd.data.readers.annotated import AnnotatedImage, AnnotatedImages


@dataclass(frozen=True, slots=True)
class Instance:
    """One annotated region of an image.

    Attributes:
        category: its class, as `class_key` writes it.
        mask: (H, W) bool, never empty.
        crowd: it holds several objects of the class.
        verified: it surely is one object.
        order: place in the order of depth, 1 is the nearest; None where it is not known.
        colours: see `measure_colours`; None to measure them in the image. They stay the same when an image is flipped.
        ann_id: id of the annotation.
    """

    category: str
    mask: np.ndarray
    crowd: bool = False
    verified: bool = True
    order: int | None = None
    colours: dict[str, tuple[float, float]] | None = None
    ann_id: int = 0


class InstanceFile(AnnotatedImages):
    """Annotated photographs whose classes are written by `class_key`."""

    def __init__(self, path: Path, image_folder: Path | None = None) -> None:
        super().__init__(path, image_folder, class_name=class_key)

    def instances(self, image: AnnotatedImage) -> list[Instance]:
        """All annotated regions of an image that have an area."""
        return [
            Instance(a.category, mask, a.crowd, a.verified, a.order, None, a.ann_id)
            for a in image.annotations
            if a.segmentation is not None and (mask := self.mask(image, a)) is not None
        ]
