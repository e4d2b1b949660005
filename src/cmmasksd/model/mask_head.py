"""The mask head: fused features to logits at four times the patch grid (stride 4 for a patch of 16).

Our reading of CRIS's projector, kept lean (`performance` in the docs): a 1x1 convolution down to `width` channels, two
bilinear upsamplings with a 3x3 convolution each, and a kernel generated from the sentence that is applied to every
cell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskHead(nn.Module):
    """Fused features and the sentence to mask logits.

    Args:
        dim: width of the joint space, where the sentence lies.
        features: channels of the fused features.
        width: channels at twice the patch grid, a multiple of 16; half as many at four times.
    """

    def __init__(self, dim: int, features: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(features, width)
        self.convolve1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, width)
        self.convolve2 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, width // 2)
        self.kernel = nn.Linear(dim, width // 2 + 1)  # one weight per channel, and a bias

    def forward(self, fused: Tensor, sentence: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict.

        Args:
            fused: (B, N, features). sentence: (B, D). grid: (h, w), h * w = N.

        Returns:
            (B, 4h, 4w) logits.
        """
        x = self.reduce(fused).transpose(1, 2).unflatten(2, grid)  # (B, width, h, w)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        x = F.relu(self.norm1(self.convolve1(x)))
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        x = F.relu(self.norm2(self.convolve2(x)))  # (B, width / 2, 4h, 4w)
        kernel, bias = self.kernel(sentence).split([x.shape[1], 1], dim=1)
        return torch.einsum("bchw,bc->bhw", x, kernel) * x.shape[1] ** -0.5 + bias[..., None]
