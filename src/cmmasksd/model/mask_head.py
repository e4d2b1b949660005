"""The mask head: fused features to logits at four times the patch grid (stride 4 for a patch of 16).

Our reading of CRIS's projector, kept lean: every patch becomes 2x2 cells of `width` channels (a patch knows its own
outline, which interpolation would blur), then a 3x3 convolution, bilinear upsampling, the cells' own pixels, another
convolution, and a kernel generated from the sentence. The pixels are our addition: the tower has mixed a patch with
the rest of the image, which blurs edges (6,000 references of scenes, one seed: P@0.7 0.115 with them, 0.079 with the
patches as they enter the tower instead).
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
        scales: finer features of the image tower, see `EncoderSizes.scales`.
    """

    def __init__(self, dim: int, features: int, *, width: int, scales: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__()
        self.scales = scales
        self.reduce = nn.Linear(features, 4 * width)
        self.convolve1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, width)
        self.pixels_in = nn.Conv2d(12, width, 1)  # the 2x2 pixels of a cell, unmixed
        self.convolve2 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, width // 2)
        self.kernel = nn.Linear(dim, width // 2 + 1)  # one weight per channel, and a bias
        self.laterals = nn.ModuleList(nn.Conv2d(depth, width * (4 if cells == 1 else 1), 1) for depth, cells in scales)

    def forward(self, *, fused: Tensor, pixels: Tensor, sentence: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict.

        Args:
            fused: (B, N, features). pixels: (B, N, P), see `ImageFeatures`. sentence: (B, D). grid: (h, w), h * w = N.

        Returns:
            (B, 4h, 4w) logits.
        """
        # contiguous: a transposed tensor counts as "channels last", where CPU convolutions take over twice as long
        x = self.reduce(fused).transpose(1, 2).contiguous().unflatten(2, grid)  # (B, 4 width, h, w)
        pixels, finer = self._split(pixels, grid)
        x = F.pixel_shuffle(x + finer[1] if 1 in finer else x, 2)  # (B, width, 2h, 2w)
        x = x + finer[2] if 2 in finer else x
        x = F.relu(self.norm1(self.convolve1(x)))
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        cells = F.pixel_shuffle(pixels.transpose(1, 2).contiguous().unflatten(2, grid), 8)  # (B, 3, 8h, 8w)
        x = x + self.pixels_in(F.pixel_unshuffle(cells, 2))
        x = F.relu(x + finer[4] if 4 in finer else x)
        x = F.relu(self.norm2(self.convolve2(x)))  # (B, width / 2, 4h, 4w)
        kernel, bias = self.kernel(F.layer_norm(sentence, sentence.shape[-1:])).split([x.shape[1], 1], dim=1)
        return torch.einsum("bchw,bc->bhw", x, kernel) * x.shape[1] ** -0.5 + bias[..., None]

    def _split(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The pixels alone, (B, N, 192), and for each finer grid what is added to the features there."""
        if not self.scales:
            return pixels, {}
        pixels, *parts = pixels.split([192, *(depth * cells * cells for depth, cells in self.scales)], dim=-1)
        finer = {}
        for (_, cells), lateral, part in zip(self.scales, self.laterals, parts, strict=True):
            part = part.transpose(1, 2).contiguous().unflatten(2, grid)  # (B, channels * cells^2, h, w)
            finer[cells] = lateral(F.pixel_shuffle(part, cells))
        return pixels, finer
