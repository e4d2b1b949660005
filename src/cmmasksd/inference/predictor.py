"""Segmenter: an image and sentences in, masks out. The three lines that most users need:

from cmmasksd import Segmenter
segmenter = Segmenter.from_pretrained("runs/demo/best")
masks = [found.mask for found in segmenter.segment("picture.jpg", ["the red circle", "large star on the left"])]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmmasksd.data.images import Picture, as_pixels
from cmmasksd.data.masks import mask_to_box, mask_to_polygons, mask_to_rle
from cmmasksd.errors import UserError, shown
from cmmasksd.inference.visualize import PALETTE, Color, overlay

if TYPE_CHECKING:
    import torch

    from cmmasksd.inference.onnx import OnnxSegmenter
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.placement import Placement
    from cmmasksd.model.processing import CMMaskSDProcessor
    from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens

DECODE_TOGETHER = 32
"""Sentences that are decoded in one call; bounds the memory."""
ENCODE_TOGETHER = 128
"""Sentences that are encoded in one call; bounds the memory."""


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What one sentence names in one image.

    Attributes:
        text: the sentence.
        mask: (H, W) bool at the image's own size.
        score: mean probability over the mask, 0 when it is empty.
        image: (H, W, 3) uint8, the image.
        probability: (H, W) float32 in [0, 1] at the image's own size; the mask is where it is above the threshold.
    """

    text: str
    mask: np.ndarray
    score: float
    image: np.ndarray
    probability: np.ndarray

    def overlay(self, color: Color = PALETTE[0], alpha: float = 0.5) -> np.ndarray:
        """The image with the mask drawn in, (H, W, 3) uint8."""
        return overlay(self.image, self.mask, color, alpha)

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(self.mask.sum())

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """(x0, y0, x1, y1) in pixels, half-open; None where the mask is empty."""
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
        images: B times (H, W, 3) uint8.
        texts: the K sentences.
        owner: (K,) which image each sentence is about.
        placements: B, how each image was laid on the model's canvas.
        tokens: of the K sentences.
        features: of the B images.
        sentences: features of the K sentences.
    """

    images: list[np.ndarray]
    texts: list[str]
    owner: list[int]
    placements: list[Placement]
    tokens: Tokens
    features: ImageFeatures
    sentences: TextFeatures


class Segments(ABC):
    """What all segmenters do alike: encode once, then decode sentence by sentence."""

    def segment(self, image: Picture, texts: Sequence[str] | str) -> list[Segmentation]:
        """Find what each sentence names. The image is encoded once for all of them.

        Args:
            image: a file's path, content or file object (its EXIF orientation is applied), a PIL image, or an array
                of uint8: (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey. See `as_pixels`.
            texts: one sentence or several.

        Returns:
            One segmentation per sentence, in order.

        Raises:
            UserError: for an image that cannot be read, no sentence, or an empty one.
        """
        return self.segment_batch([(image, texts)])[0]

    def segment_batch(self, requests: Sequence[tuple[Picture, Sequence[str] | str]]) -> list[list[Segmentation]]:
        """Find what sentences name in several images, which are encoded together.

        Args:
            requests: images, each with its sentences; see `segment`.

        Returns:
            For each image one segmentation per sentence, in order.

        Raises:
            UserError: as `segment`; then nothing was computed.
        """
        if not requests:
            return []
        encoded = self.encode(requests)
        found: list[list[Segmentation]] = [[] for _ in requests]
        for owner, one in zip(encoded.owner, self.decode(encoded), strict=True):
            found[owner].append(one)
        return found

    @abstractmethod
    def encode(self, requests: Sequence[tuple[Picture, Sequence[str] | str]]) -> Any:
        """The first half of `segment_batch`: everything that is done once per image and once per sentence."""

    @abstractmethod
    def decode(self, encoded: Any, thresholds: Sequence[float] | None = None) -> Iterator[Segmentation]:
        """The second half, sentence by sentence: a large picture's maps need not all be held at once.

        Args:
            encoded: what `encode` returned; its `owner` says which image each sentence is about.
            thresholds: one per image, where they are not the segmenter's.
        """


class Segmenter(Segments):
    """A trained model, ready to use: `segment` and `segment_batch` are those of `Segments`.

    Args:
        model: moved to the device and put into evaluation mode.
        processor: the one it was trained with.
        device: such as "cpu" or "cuda"; None: a GPU where there is one.
        threshold: a pixel belongs to the mask when its probability is above it.

    Raises:
        UserError: for a threshold that is no probability, or a device that is not there.
    """

    def __init__(
        self,
        model: CMMaskSDModel,
        processor: CMMaskSDProcessor,
        *,
        device: str | None = None,
        threshold: float = 0.5,
    ) -> None:
        if not 0 < threshold < 1:
            raise UserError(f"a threshold of {threshold} is no probability: choose one between 0 and 1")
        self.device = _device(device)
        self.model = model.eval()
        self.model.to(self.device)  # pyright: ignore (its decorator hides the method)
        self.processor, self.threshold = processor, threshold

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | None = None, threshold: float = 0.5) -> Segmenter:
        """Load a model that `cmmasksd train` wrote, by folder or hub id.

        Raises:
            UserError: when there is none, or its weights are incomplete.
        """
        from cmmasksd.model.modeling import CMMaskSDModel
        from cmmasksd.model.processing import CMMaskSDProcessor

        model, processor = CMMaskSDModel.from_pretrained(name), CMMaskSDProcessor.from_pretrained(name)
        return cls(model, processor, device=device, threshold=threshold)

    def encode(self, requests: Sequence[tuple[Picture, Sequence[str] | str]]) -> Encoded:
        """See `Segments.encode`."""
        import torch

        images, texts, owner, canvases, placements = [], [], [], [], []
        for nth, (image, said) in enumerate(requests):
            said = [said] if isinstance(said, str) else list(said)
            if not said:
                raise UserError("no sentence given: say what to look for")
            pixels = as_pixels(image)
            canvas, placement = self.processor.image(pixels)
            images.append(pixels)
            canvases.append(canvas)
            placements.append(placement)
            texts += said
            owner += [nth] * len(said)
        tokens = self.processor.tokens(texts)
        values = self.processor.pixel_values(torch.stack(canvases))
        with torch.inference_mode():
            features = self.model.encode_image(values.to(self.device))
            parts = [
                self.model.encode_text(tokens.select(slice(start, start + ENCODE_TOGETHER)).to(self.device))
                for start in range(0, len(tokens), ENCODE_TOGETHER)
            ]
            sentences = type(parts[0]).cat(parts)
        return Encoded(images, texts, owner, placements, tokens, features, sentences)

    def decode(self, encoded: Encoded, thresholds: Sequence[float] | None = None) -> Iterator[Segmentation]:
        """See `Segments.decode`."""
        import torch

        from cmmasksd.model.placement import threshold_to_logit

        above = [threshold_to_logit(one) for one in thresholds or [self.threshold] * len(encoded.images)]
        for start in range(0, len(encoded.texts), DECODE_TOGETHER):
            part = slice(start, start + DECODE_TOGETHER)
            index = torch.tensor(encoded.owner[part], device=self.device)
            with torch.inference_mode():
                logits = self.model.decode(encoded.features.select(index), encoded.sentences.select(part))
            for text, owner, logit in zip(encoded.texts[part], encoded.owner[part], logits, strict=True):
                with torch.inference_mode():
                    restored = self.processor.restore(logit[None], encoded.placements[owner])[0]
                    mask, probability = restored > above[owner], restored.sigmoid()
                    score = float(probability[mask].mean()) if mask.any() else 0.0
                yield Segmentation(text, mask.cpu().numpy(), score, encoded.images[owner], probability.cpu().numpy())


def _device(name: str | None) -> torch.device:
    """The device of a name, or the best one; a UserError where it is not there."""
    import torch

    there = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        there += [f"{accelerator.type}:{nth}" for nth in range(torch.accelerator.device_count())]
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # no device that torch knows
        device = None
    if device is None or f"{device.type}:{device.index or 0}" not in ("cpu:0", *there):
        raise UserError(f"there is no device {shown(name)}: say cuda or cpu, or nothing (found: {', '.join(there)})")
    return device


def load_segmenter(name: str | Path, *, device: str | None = None, threshold: float = 0.5) -> Segmenter | OnnxSegmenter:
    """The segmenter of a trained model, or of a folder that `cmmasksd export` wrote (that one works without torch)."""
    from cmmasksd.inference.onnx import EXPORT_FILE, OnnxSegmenter

    kind = OnnxSegmenter if (Path(name) / EXPORT_FILE).is_file() else Segmenter
    return kind.from_pretrained(name, device=device, threshold=threshold)
