"""Checks of an export: its files are read back, and their logits and masks compared with those of the torch model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmmasksd.errors import UserError
from cmmasksd.export.graphs import placement_tensors, sentences
from cmmasksd.inference.export_settings import GRAPHS
from cmmasksd.inference.onnx import OnnxSegmenter, open_sessions
from cmmasksd.model.placement import place
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.towers.base import Tokens
from cmmasksd.model.trained import TrainedModel

PARITY = 1e-4
"""Maximum difference of a logit from torch's, in float32, as a share of the largest logit where that is above 1."""
INT8_IOU = 0.9
"""Minimum mean IoU of the masks of quantised weights with those of float32, on generated scenes."""
_SCENES = 24


def load(folder: Path, format: str) -> dict[str, Callable[[Sequence[Tensor]], list[Tensor]]]:
    """The graphs of a folder, as functions of tensors."""
    if format == "pt2":
        programs = {key: torch.export.load(folder / f"{key}.pt2").module() for key in GRAPHS}

        def call(module: Any, values: Sequence[Tensor]) -> list[Tensor]:
            outputs = module(*values)
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

        return {key: lambda values, module=module: call(module, values) for key, module in programs.items()}

    def run(session: Any, values: Sequence[Tensor]) -> list[Tensor]:
        names = [node.name for node in session.get_inputs()]
        feed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return {key: lambda values, session=session: run(session, values) for key, session in open_sessions(folder).items()}


@torch.no_grad()
def difference(model: TrainedModel, graphs: dict[str, Any], grid: tuple[int, int]) -> float:
    """Maximum difference of a logit from torch, see PARITY, over several image sizes and numbers and lengths of
    sentences."""
    generator = torch.Generator().manual_seed(0)
    sizes = model.config.encoder
    native, longest = sizes.image_size // sizes.patch_size, sizes.max_tokens
    worst = 0.0
    for (h, w), count, length in (
        (grid, 1, 3),
        (grid, 3, longest),
        ((max(2, native), max(2, native)), 2, 6),
        ((grid[0] + 1, grid[1] + 3), 2, 7),
        ((2, 3), 1, longest),
    ):
        pixels = torch.randn(count, 3, h * sizes.patch_size, w * sizes.patch_size, generator=generator)
        ids, attention, is_word = sentences(model, count, length, generator)
        tokens = Tokens(ids, attention, torch.where(is_word, 0, -1), is_word[:, 0])
        expected = model.decode(model.encode_image(pixels), model.encode_text(tokens))
        features = [*graphs["image"]([pixels]), *graphs["text"]([ids, attention]), is_word]
        values = dict(zip((*model.image_features, *model.text_features, "word_mask"), features, strict=True))
        (logits,) = graphs["decoder"]([values[name] for name in model.decoder_inputs])
        if logits.shape != expected.shape:
            return float("inf")
        largest = max(1.0, float(expected.abs().max()))
        worst = max(worst, float((logits - expected).abs().max().nan_to_num(nan=float("inf"))) / largest)
    return worst


@torch.no_grad()
def restore_difference(processor: CMMaskSDProcessor, graphs: dict[str, Any]) -> float:
    """Largest difference of a restored logit or probability from the processor's, over several placements."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for resize in ("warp", "letterbox"):
        for height, width in ((64, 96), (33, 500), (301, 203), (1, 7)):
            placement = place(height, width, (64, 96), resize)
            logits = torch.randn(1, 16, 24, generator=generator)
            expected = processor.restore(logits, placement)
            restored, probability = graphs["restore"]([logits, *placement_tensors(placement)])
            if not restored.shape == probability.shape == expected.shape:
                return float("inf")
            for values, reference in ((restored, expected), (probability, expected.sigmoid())):
                worst = max(worst, float((values - reference).abs().max().nan_to_num(nan=float("inf"))))
    return worst


def agreement(model: TrainedModel, processor: CMMaskSDProcessor, folder: Path) -> float:
    """Mean IoU of the masks of an export with torch's on generated scenes; pairs of empty masks do not count."""
    from cmmasksd.data.scenes import SceneDataset
    from cmmasksd.inference.predictor import Segmenter

    reference_segmenter, exported = Segmenter(model, processor, device="cpu"), OnnxSegmenter.from_pretrained(folder)
    data, scores = SceneDataset("scenes", "val", _SCENES), []
    for reference in data:
        image, texts = data.image(reference), [expression.text for expression in reference.expressions]
        for a, b in zip(reference_segmenter.segment(image, texts), exported.segment(image, texts), strict=True):
            if a.mask.any() or b.mask.any():
                scores.append((a.mask & b.mask).sum() / (a.mask | b.mask).sum())
    if not scores:
        raise UserError("all masks on generated scenes are empty, so --int8 cannot be checked: export without it")
    return float(np.mean(scores))
