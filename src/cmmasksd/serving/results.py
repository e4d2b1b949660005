"""Segmentations and word maps as JSON, for the responses of the API."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from cmmasksd.inference.base import Encoded, Segmentation
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.model.correlation import correlation

MAP_SIDE, WORD_SIDE = 512, 64
"""Maximum longer side of a probability map and of a word map, in pixels."""


def sentence_result(segmentation: Segmentation, want: frozenset[str]) -> dict[str, Any]:
    """Text, score, presence, area and box of a segmentation, and what `want` names of rle, png and probability."""
    result: dict[str, Any] = {
        "text": segmentation.text,
        "score": segmentation.score,
        "presence": segmentation.presence,
        "present": segmentation.present,
        "area": segmentation.area,
        "box": segmentation.box,
    }
    if "rle" in want:
        result["rle"] = segmentation.rle
    if "png" in want:
        file = io.BytesIO()
        Image.fromarray(segmentation.mask).save(file, "PNG")
        result["png"] = base64.b64encode(file.getvalue()).decode()
    if "probability" in want:
        height, width = _fitted(segmentation.mask.shape, MAP_SIDE)
        small = Image.fromarray(segmentation.probability).resize((width, height), Image.Resampling.BILINEAR)
        result["probability"] = _map(np.asarray(small))
    return result


def word_maps(segmenter: Segmenter, encoded: Encoded, index: int) -> list[dict[str, Any]]:
    """Correlation of each word of a sentence with the patches of its image.

    Words are those of the tokenizer; a word of several pieces gets their mean. Each map is scaled from its own minimum
    to its own maximum, so the maps of two words cannot be compared.

    Args:
        segmenter: the segmenter that encoded the images and sentences.
        encoded: images and sentences.
        index: index of the sentence.
    """
    image_index, text = encoded.owner[index], encoded.texts[index]
    image = encoded.features.select(torch.tensor([image_index], device=segmenter.device))
    sentence = encoded.sentences.select(slice(index, index + 1))
    cosine = correlation(image, sentence)[0].T.unflatten(1, image.grid)  # (L, h, w)
    placement = encoded.placements[image_index]
    placement = replace(placement, original=_fitted(placement.original, WORD_SIDE))
    words = []
    for start, end, tokens in encoded.tokens.words(index):
        values = segmenter.processor.restore(cosine[tokens].mean(0, keepdim=True), placement)[0].cpu().numpy()
        spread = float(values.max() - values.min())
        word_map = _map((values - values.min()) / spread) if spread > 0 else None
        words.append({"text": text[start:end], "start": start, "end": end, "map": word_map})
    return words


def _fitted(size: tuple[int, ...], side: int) -> tuple[int, int]:
    """(H, W) shrunk until its longer side fits."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _map(values: np.ndarray) -> dict[str, Any]:
    """(h, w) in [0, 1] as bytes, row by row."""
    data = np.rint(values * 255).clip(0, 255).astype(np.uint8).tobytes()
    return {"width": values.shape[1], "height": values.shape[0], "data": base64.b64encode(data).decode()}
