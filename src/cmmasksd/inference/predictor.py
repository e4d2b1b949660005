"""Segmenter: an image and sentences in, masks out. The three lines that most users need:

from cmmasksd import Segmenter
segmenter = Segmenter.from_pretrained("runs/demo/best")
masks = [result.mask for result in segmenter.segment("image.jpg", ["the red circle", "large star on the left"])]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cmmasksd.errors import UserError, shown
from cmmasksd.inference.base import ENCODE_TOGETHER, BaseSegmenter, Encoded, slices
from cmmasksd.inference.export_settings import EXPORT_FILE
from cmmasksd.inference.onnx import OnnxSegmenter
from cmmasksd.model.placement import Placement
from cmmasksd.model.presence import MIN_SCORE, presence

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmmasksd.model.processing import CMMaskSDProcessor
    from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens
    from cmmasksd.model.trained import TrainedModel


class Segmenter(BaseSegmenter):
    """A trained model in torch, ready to use; `segment` and `segment_batch` are those of `BaseSegmenter`.

    Args:
        model: moved to the device and put into evaluation mode.
        processor: the processor that the model was trained with.
        device: such as "cpu" or "cuda"; None: a GPU where there is one.
        threshold, min_score: see `BaseSegmenter`.

    Raises:
        UserError: the threshold or `min_score` is not between 0 and 1, or the device does not exist.
    """

    def __init__(
        self,
        model: TrainedModel,
        processor: CMMaskSDProcessor,
        *,
        device: str | None = None,
        threshold: float = 0.5,
        min_score: float = MIN_SCORE,
    ) -> None:
        super().__init__(threshold, min_score)
        self.device = _device(device)
        self.model: TrainedModel = model.eval()
        self.model.to(self.device)  # pyright: ignore (its decorator hides the method)
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | None = None, threshold: float = 0.5, min_score: float = MIN_SCORE
    ) -> Segmenter:
        """Load a model that `cmmasksd train` wrote or a CLIPSeg in transformers' format, by folder or hub id.

        Raises:
            UserError: there is no such model, or its weights are incomplete.
        """
        from cmmasksd.model.trained import load_trained

        model, processor = load_trained(name)
        return cls(model, processor, device=device, threshold=threshold, min_score=min_score)

    # -- the hooks of BaseSegmenter

    def canvas(self, image: np.ndarray) -> tuple[Tensor, Placement]:
        """One image on the canvas, (3, h, w) uint8, and where it lies on it."""
        return self.processor.image(image)

    def encode_images(self, canvases: list[Tensor]) -> ImageFeatures:
        """Features of B canvases."""
        import torch

        values = self.processor.pixel_values(torch.stack(canvases))
        with torch.inference_mode():
            return self.model.encode_image(values.to(self.device))

    def encode_texts(self, texts: list[str]) -> tuple[Tokens, TextFeatures]:
        """Tokens and features of K sentences, ENCODE_TOGETHER at a time, all padded alike."""
        import torch

        tokens = self.processor.tokens(texts)
        with torch.inference_mode():
            parts = [
                self.model.encode_text(tokens.select(part).to(self.device))
                for part in slices(len(tokens), ENCODE_TOGETHER)
            ]
            return tokens, type(parts[0]).cat(parts)

    def restored(self, encoded: Encoded, part: slice) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Logits and probabilities (H, W) of the sentences of a part, and their presence."""
        import torch

        owners = encoded.owner[part]
        with torch.inference_mode():
            images = encoded.features.select(torch.tensor(owners, device=self.device))
            all_logits = self.model.decode(images, encoded.sentences.select(part))
        for owner, logits, present in zip(owners, all_logits, presence(all_logits).tolist(), strict=True):
            with torch.inference_mode():
                logits = self.processor.restore(logits[None], encoded.placements[owner])[0]
                probability = logits.sigmoid()
            yield logits.cpu(), probability.cpu(), present


def _device(name: str | None) -> torch.device:
    """The device of that name, or the best one; a UserError for a device that does not exist."""
    import torch

    available = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        available += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # torch knows no such device
        device = None
    if device is None or f"{device.type}:{device.index or 0}" not in ("cpu:0", *available):
        raise UserError(f"device {shown(name)} does not exist: use one of {', '.join(available)}")
    return device


def load_segmenter(
    name: str | Path, *, device: str | None = None, threshold: float = 0.5, min_score: float = MIN_SCORE
) -> Segmenter | OnnxSegmenter:
    """The segmenter of a trained model, or of a folder that `cmmasksd export` wrote (works without torch)."""
    kind = OnnxSegmenter if (Path(name) / EXPORT_FILE).is_file() else Segmenter
    return kind.from_pretrained(name, device=device, threshold=threshold, min_score=min_score)
