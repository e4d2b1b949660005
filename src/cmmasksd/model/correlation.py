"""Patch-word correlation: the cosine of every patch and every word in CLIP's joint space. It guides what is masked.

No gradient runs through it. CLIP trains the class token against the text, so the patch tokens of its last block may
align poorly with words. `source="values"` takes the values of the last attention instead (MaskCLIP's dense features);
`pointing` measures either.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cmmasksd.model.towers.base import ImageFeatures, TextFeatures


def _patches(image: ImageFeatures, source: Literal["patches", "values"]) -> Tensor:
    if source == "patches":
        return image.patches if image.joint is None else image.joint
    if image.dense is None:
        raise ValueError("encode_image(…, value_path=True) is needed for a correlation from the values")
    return image.dense


@torch.no_grad()
def correlation(image: ImageFeatures, text: TextFeatures, source: Literal["patches", "values"] = "patches") -> Tensor:
    """Cosine of patches and words, (B, N, L) float32 in [-1, 1]; 0 where `text.word_mask` is false."""
    return _cosine(_patches(image, source), text.words) * text.word_mask[:, None]


@torch.no_grad()
def sentence_correlation(
    image: ImageFeatures, text: TextFeatures, source: Literal["patches", "values"] = "patches"
) -> Tensor:
    """Cosine of patches and the sentence, (B, N) float32."""
    return _cosine(_patches(image, source), text.sentence[:, None])[..., 0]


def _cosine(patches: Tensor, texts: Tensor) -> Tensor:
    """(B, N, D) and (B, L, D) to (B, N, L). In float32 under autocast too: in bfloat16 most patches of an image tie."""
    with torch.autocast(patches.device.type, enabled=False):
        return F.normalize(patches.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).transpose(1, 2)


def pointing(scores: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Whether the best-scored patch lies in the object.

    Args:
        scores: (B, N).
        target: (B, h, w) in [0, 1], the object at any resolution.
        grid: (rows, columns) of patches, rows * columns = N.

    Returns:
        (B,) bool: at least half of the best patch is covered.
    """
    cover = F.interpolate(target[:, None].float(), grid, mode="bilinear", antialias=True).flatten(1)
    return cover.gather(1, scores.argmax(1, keepdim=True))[:, 0] >= 0.5
