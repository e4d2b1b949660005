"""What all segmenters share: requests are checked, encoded once, decoded sentence by sentence and thresholded.

A segmenter implements four hooks: `canvas`, `encode_images`, `encode_texts` and `restored`.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from cmmasksd.data.images import ImageInput, as_pixels
from cmmasksd.data.masks import mask_to_box, mask_to_polygons, mask_to_rle
from cmmasksd.data.samples import require_expression
from cmmasksd.errors import UserError, require_between, shown
from cmmasksd.files import whole_file
from cmmasksd.inference.visualize import FILL, PALETTE, Color, Drawing, label_text
from cmmasksd.model.placement import Placement, threshold_to_logit
from cmmasksd.model.presence import MIN_SCORE

DECODE_TOGETHER = 32
"""Sentences per call of the decoder; bounds the memory."""
ENCODE_TOGETHER = 128
"""Sentences per call of the text encoder; bounds the memory."""
IMAGES_TOGETHER = 8
"""Images per call of the image encoder when a list of images is segmented; bounds the memory."""


@dataclass(frozen=True, slots=True, repr=False)
class Segmentation:
    """The object that one sentence names in one image.

    Attributes:
        text: the sentence.
        mask: (H, W) bool at the image's own size; empty if not `present`.
        score: mean probability over the mask, 0 for an empty mask.
        presence: how sure the model is that the image holds what the sentence names, in [0, 1]; see `presence`.
        present: whether `presence` is at least the segmenter's `min_score`.
        image: (H, W, 3) uint8, the image.
        probability: (H, W) float32 in [0, 1] at the image's own size; the mask is where it exceeds the threshold.
    """

    text: str
    mask: np.ndarray
    score: float
    presence: float
    present: bool
    image: np.ndarray
    probability: np.ndarray

    def __repr__(self) -> str:
        height, width = self.mask.shape
        scores = f"score={self.score:.3f}, presence={self.presence:.3f}"
        return f"Segmentation({self.text!r}, {scores}, box={self.box}, image={width}x{height})"

    def overlay(self, color: Color = PALETTE[0], alpha: float = FILL) -> np.ndarray:
        """The image with mask, sentence and score drawn in, and the rest dimmed, (H, W, 3) uint8."""
        drawing = Drawing(self.image)
        drawing.add(self.mask, color, fill=alpha, label=self.label())
        return drawing.finish()

    def label(self, number: int = 1) -> str:
        """Sentence and score, or "not found"; `number` names a sentence that cannot be drawn, see `label_text`."""
        return label_text(self.text, self.score if self.mask.any() else None, number)

    def show(self) -> None:
        """Show the overlay in a notebook or in the system's image viewer."""
        self._legible().show(self.text)

    def save(self, path: str | Path) -> None:
        """Save the overlay in the format that the suffix names. Small images are enlarged to make the label legible.

        Raises:
            UserError: Pillow writes no such format.
        """
        path = Path(path)
        formats = Image.registered_extensions()
        if formats.get(path.suffix.lower()) not in Image.SAVE:
            raise UserError(f"no image format has the suffix {shown(path.suffix)}: give a name such as overlay.png")
        with whole_file(path) as part:
            self._legible().save(part, formats[path.suffix.lower()])

    def _repr_png_(self) -> bytes:
        """The overlay, which notebooks show in place of the repr."""
        content = io.BytesIO()
        self._legible().save(content, "PNG")
        return content.getvalue()

    def _legible(self) -> Image.Image:
        drawing = Drawing(self.image, enlarge=True)
        drawing.add(self.mask, PALETTE[0], label=self.label())
        return Image.fromarray(drawing.finish())

    @property
    def area(self) -> int:
        """Number of pixels in the mask."""
        return int(self.mask.sum())

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """(x0, y0, x1, y1) in pixels, half-open; None for an empty mask."""
        return mask_to_box(self.mask)

    @property
    def rle(self) -> dict[str, Any]:
        """COCO's compressed RLE, ready for JSON: {"size": [H, W], "counts": str}."""
        return mask_to_rle(self.mask)

    @property
    def polygons(self) -> list[list[float]]:
        """[x0, y0, x1, y1, ...] for every connected part, along the edges of its pixels; see `mask_to_polygons`."""
        return mask_to_polygons(self.mask)


@dataclass(frozen=True, slots=True)
class Encoded:
    """B images and K sentences, ready to be decoded pair by pair.

    Attributes:
        images: B arrays (H, W, 3) uint8.
        texts: the K sentences.
        owner: (K,) index of the image that each sentence is about.
        placements: B placements of the images on the model's canvas.
        tokens: tokens of the K sentences (`Tokens`; arrays by name in an `OnnxSegmenter`).
        features: features of the B images (`ImageFeatures`; arrays by name in an `OnnxSegmenter`).
        sentences: features of the K sentences (`TextFeatures`; arrays by name in an `OnnxSegmenter`).
    """

    images: list[np.ndarray]
    texts: list[str]
    owner: list[int]
    placements: list[Placement]
    tokens: Any
    features: Any
    sentences: Any


class BaseSegmenter(ABC):
    """An image and sentences in, one mask per sentence out.

    Args:
        threshold: a pixel belongs to the mask when its probability is above it.
        min_score: the mask of a sentence whose `Segmentation.presence` is below it is empty.

    Raises:
        UserError: the threshold or `min_score` is not between 0 and 1.
    """

    def __init__(self, threshold: float, min_score: float = MIN_SCORE) -> None:
        threshold_to_logit(threshold)  # a wrong one is refused here, not at the first image
        require_between("min_score", min_score, 0, 1)
        self.threshold, self.min_score = threshold, min_score

    @overload
    def __call__(self, image: list[ImageInput], texts: Sequence[str] | str) -> list[list[Segmentation]]: ...
    @overload
    def __call__(self, image: ImageInput, texts: Sequence[str] | str) -> list[Segmentation]: ...
    def __call__(self, image: Any, texts: Sequence[str] | str) -> Any:
        """`segment`; for a list of images, a list per image of one segmentation per sentence."""
        if not isinstance(image, list):
            return self.segment(image, texts)
        batches = ([(each, texts) for each in image[part]] for part in slices(len(image), IMAGES_TOGETHER))
        return [segmentations for batch in batches for segmentations in self.segment_batch(batch)]

    def segment(self, image: ImageInput, texts: Sequence[str] | str) -> list[Segmentation]:
        """Segment the object that each sentence names. The image is encoded once for all sentences.

        Args:
            image: a file's path, content or file object (its EXIF orientation is applied), a PIL image, or an array
                of uint8: (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey. See `as_pixels`.
            texts: one sentence or several.

        Returns:
            One segmentation per sentence, in order.

        Raises:
            UserError: the image cannot be read, there is no sentence, or a sentence is empty.
        """
        return self.segment_batch([(image, texts)])[0]

    def segment_batch(self, requests: Sequence[tuple[ImageInput, Sequence[str] | str]]) -> list[list[Segmentation]]:
        """Segment several images, which are encoded together.

        Args:
            requests: images, each with its sentences; see `segment`.

        Returns:
            For each image one segmentation per sentence, in order.

        Raises:
            UserError: as `segment`; nothing was computed then.
        """
        if not requests:
            return []
        encoded = self.encode(requests)
        segmentations: list[list[Segmentation]] = [[] for _ in requests]
        for owner, segmentation in zip(encoded.owner, self.decode(encoded), strict=True):
            segmentations[owner].append(segmentation)
        return segmentations

    def encode(self, requests: Sequence[tuple[ImageInput, Sequence[str] | str]]) -> Encoded:
        """The first half of `segment_batch`: everything that is done once per image and once per sentence."""
        images, texts, owner, canvases, placements = [], [], [], [], []
        for index, (image, given) in enumerate(requests):
            sentences = [given] if isinstance(given, str) else list(given)
            if not sentences:
                raise UserError("no sentence given: say what to look for")
            for sentence in sentences:
                require_expression(sentence, "a sentence")
            pixels = as_pixels(image)
            canvas, placement = self.canvas(pixels)
            images.append(pixels)
            canvases.append(canvas)
            placements.append(placement)
            texts += sentences
            owner += [index] * len(sentences)
        tokens, sentences = self.encode_texts(texts)
        return Encoded(images, texts, owner, placements, tokens, self.encode_images(canvases), sentences)

    def decode(
        self,
        encoded: Encoded,
        thresholds: Sequence[float] | None = None,
        min_scores: Sequence[float] | None = None,
    ) -> Iterator[Segmentation]:
        """The second half, sentence by sentence, so that the maps of a large image need not all be held at once.

        Args:
            encoded: the result of `encode`; its `owner` says which image each sentence is about.
            thresholds, min_scores: one per image; None: the segmenter's.
        """
        levels = [threshold_to_logit(value) for value in thresholds or [self.threshold] * len(encoded.images)]
        minimums = min_scores or [self.min_score] * len(encoded.images)
        for value in minimums:
            require_between("min_score", value, 0, 1)
        for part in slices(len(encoded.texts), DECODE_TOGETHER):
            owners = encoded.owner[part]
            for text, owner, (logits, probability, presence) in zip(
                encoded.texts[part], owners, self.restored(encoded, part), strict=True
            ):
                present = presence >= minimums[owner]
                mask = logits > (levels[owner] if present else math.inf)
                score = float(probability[mask].mean()) if mask.any() else 0.0
                image, probability = encoded.images[owner], np.asarray(probability)
                yield Segmentation(text, np.asarray(mask), score, presence, present, image, probability)

    # -- the hooks

    @abstractmethod
    def canvas(self, image: np.ndarray) -> tuple[Any, Placement]:
        """Lay one image, (H, W, 3) uint8 RGB, on the model's canvas.

        Returns:
            The canvas as uint8, as `encode_images` takes it, and where the image lies on it.
        """

    @abstractmethod
    def encode_images(self, canvases: list[Any]) -> Any:
        """Features of B canvases."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> tuple[Any, Any]:
        """Tokens and features of K sentences, none of them empty."""

    @abstractmethod
    def restored(self, encoded: Encoded, part: slice) -> Iterator[tuple[Any, Any, float]]:
        """Decode some of the K sentences, at most DECODE_TOGETHER.

        Yields:
            For each sentence its logits and its probabilities, both (H, W) float32 at the image's own size: numpy
            arrays, or tensors in the CPU's memory; and its presence, see `presence`.
        """


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `count` elements."""
    return (slice(start, start + size) for start in range(0, count, size))
