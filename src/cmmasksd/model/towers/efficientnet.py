"""EfficientNet-Lite as a grid: features at strides 4, 8 and 16, and a vector in the joint space per cell of stride 16.

Tan and Le, "EfficientNet", in the variant without squeeze-and-excitation and with ReLU6. Three things differ from a
classifier: the stride stays 16, because the last downsampling becomes a dilation of 2; batch norms always use their
stored statistics, in training too; nothing is pooled, so that the rows of the ImageNet classifier are directions of
each cell.

The network was trained with TensorFlow's "same" padding, which depends on the size of the input. For sizes that are
multiples of 16 it is constant, which lets one exported graph serve all of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 16
_STEM = 32
# kernel, stride, expansion, channels, repeats
_STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
_STAGES += ((5, 2, 6, 192, 4), (3, 1, 6, 320, 1))
_READ = (1, 2, 4)  # the stages that end with strides 4, 8 and 16


def padding(kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's "same" padding (before, after) of a side that is a multiple of the stride, which is 1 or 2."""
    total = dilation * (kernel - 1) + 1 - stride
    return total // 2, total - total // 2


def channels(width_factor: float) -> list[int]:
    """Channels at the end of each stage: multiples of 8, at most a tenth below the exact number."""
    exact = [width_factor * stage[3] for stage in _STAGES]
    rounded = [max(8, int(value + 4) // 8 * 8) for value in exact]
    return [near + 8 * (near < 0.9 * value) for near, value in zip(rounded, exact, strict=True)]


def scales(width_factor: float) -> tuple[tuple[int, int], ...]:
    """(channels, cells per side of a patch) of the features at strides 4, 8 and 16."""
    width = channels(width_factor)
    return tuple((width[stage], cells) for stage, cells in zip(_READ, (4, 2, 1), strict=True))


class FrozenBatchNorm(nn.Module):
    """Batch norm by stored statistics, which never change; scale and shift are trained."""

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, *, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, training=False, eps=self.eps)


class Convolution(nn.Module):
    """Convolution with "same" padding, batch norm, and ReLU6 unless it is linear."""

    def __init__(
        self,
        into: int,
        out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(into, out, kernel, stride, dilation=dilation, groups=groups, bias=False)
        self.norm = FrozenBatchNorm(out)
        self.pad = 2 * padding(kernel, stride, dilation)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = self._convolved(F.pad(x, self.pad) if any(self.pad) else x)
        x = self.norm(x)
        return x if self.linear else F.relu6(x)

    def _convolved(self, x: Tensor) -> Tensor:
        """In float32 where a depthwise convolution is trained on a CPU: its backward pass takes two to four times as
        long in bfloat16."""
        trained = torch.is_grad_enabled() and self.conv.weight.requires_grad
        if self.conv.groups == 1 or x.device.type != "cpu" or not trained:
            return self.conv(x)
        with torch.autocast("cpu", enabled=False):
            return self.conv(x.float())


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(self, into: int, out: int, kernel: int, *, expansion: int, stride: int, dilation: int) -> None:
        super().__init__()
        width = into * expansion
        self.expand = Convolution(into, width) if expansion > 1 else nn.Identity()
        self.depthwise = Convolution(width, width, kernel, stride=stride, dilation=dilation, groups=width)
        self.project = Convolution(width, out, linear=True)
        self.skip = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """Images to features.

    Args:
        width_factor, depth_factor: 1 and 1 for Lite0, 1 and 1.1 for Lite1, 1.1 and 1.2 for Lite2.
        joint_width: D, channels of the head.
    """

    def __init__(self, *, width_factor: float, depth_factor: float, joint_width: int) -> None:
        super().__init__()
        self.stem = Convolution(3, _STEM, 3, stride=2)
        self.stages = nn.ModuleList()
        into, total, dilation = _STEM, 2, 1
        for number, (kernel, stride, expansion, _, repeats) in enumerate(_STAGES):
            out, blocks = channels(width_factor)[number], []
            if number not in (0, len(_STAGES) - 1):
                repeats = math.ceil(depth_factor * repeats)
            for repeat in range(repeats):
                step = stride if repeat == 0 and total * stride <= STRIDE else 1
                blocks.append(Block(into, out, kernel, expansion=expansion, stride=step, dilation=dilation))
                if repeat == 0 and step < stride:
                    dilation *= stride  # from the next block on: this one still sees the undilated grid
                into, total = out, total * step
            self.stages.append(nn.Sequential(*blocks))
        self.head = Convolution(into, joint_width)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode.

        Args:
            pixel_values: (B, 3, H, W), H and W multiples of 16.

        Returns:
            joint: (B, D, H / 16, W / 16).
            finer: (B, channels, H / s, W / s) at s = 4, 8, 16, see `scales`.
        """
        # "channels last": depthwise convolutions on a CPU take a quarter of the time
        x, finer = self.stem(pixel_values.contiguous(memory_format=torch.channels_last)), []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in _READ:
                finer.append(x)
        return self.head(x), finer
