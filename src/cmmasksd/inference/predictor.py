"""Segmenter: an image and sentences in, masks out. The three lines that most users need:

from cmmasksd import Segmenter
segmenter = Segmenter.from_pretrained("runs/demo/best")
masks = [found.mask for found in segmenter.segment("picture.jpg", ["the red circle", "large star on the left"])]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cmmasksd.data.images import read_image, to_rgb
from cmmasksd.errors import UserError
from cmmasksd.inference.visualize import PALETTE, Color, overlay

if TYPE_CHECKING:
    from PIL.Image import Image

    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

DECODE_TOGETHER = 32
"""Sentences that are decoded in one call; bounds the memory."""


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What one sentence names in one image.

    Attributes:
        text: the sentence.
        mask: (H, W) bool at the image's own size.
        score: mean probability over the mask, 0 when it is empty.
        image: (H, W, 3) uint8, the image.
    """

    text: str
    mask: np.ndarray
    score: float
    image: np.ndarray

    def overlay(self, color: Color = PALETTE[0], alpha: float = 0.5) -> np.ndarray:
        """The image with the mask drawn in, (H, W, 3) uint8."""
        return overlay(self.image, self.mask, color, alpha)


class Segmenter:
    """A trained model, ready to use.

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
        import torch

        if not 0 < threshold < 1:
            raise UserError(f"a threshold of {threshold} is no probability: choose one between 0 and 1")
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = model.eval()
            self.model.to(self.device)  # pyright: ignore (its decorator hides the method)
        except (RuntimeError, AssertionError) as error:  # an unknown device; one that this torch was not built for
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot use the device {device!r} ({reason}): leave it out or say cpu") from None
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

    def segment(self, image: np.ndarray | Image | str | Path, texts: Sequence[str] | str) -> list[Segmentation]:
        """Find what each sentence names. The image is encoded once for all of them.

        Args:
            image: (H, W, 3) uint8 RGB, a PIL image, or a file (its EXIF orientation is applied).
            texts: one sentence or several.

        Returns:
            One segmentation per sentence, in order.

        Raises:
            UserError: for an image that cannot be read, no sentence, or an empty one.
        """
        import torch

        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("no sentence given: say what to look for")
        pixels = _pixels(image)
        values, tokens, frame = self.processor(pixels, texts)
        with torch.inference_mode():
            features = self.model.encode_image(values.to(self.device))
            sentences = self.model.encode_text(tokens.to(self.device))
            found = []
            for start in range(0, len(texts), DECODE_TOGETHER):
                part = slice(start, start + DECODE_TOGETHER)
                of_part = sentences.select(part)
                index = torch.zeros(len(of_part), dtype=torch.long, device=self.device)
                logits = self.model.decode(features.select(index), of_part)
                for text, logit in zip(texts[part], logits, strict=True):
                    # one at a time: a large picture is K times as large for K sentences
                    mask = self.processor.masks(logit[None], frame, self.threshold)[0]
                    probability = self.processor.probabilities(logit[None], frame)[0]
                    score = float(probability[mask].mean()) if mask.any() else 0.0
                    found.append(Segmentation(text, mask.cpu().numpy(), score, pixels))
        return found


def _pixels(image: np.ndarray | Image | str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of whatever was given."""
    if isinstance(image, str | Path):
        return read_image(Path(image), exif=True)
    if isinstance(image, np.ndarray):
        return image
    from PIL import ImageOps

    return to_rgb(ImageOps.exif_transpose(image))  # as from a file: transparent pixels over white
