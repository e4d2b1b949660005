"""CLIP with a ResNet as its image tower: RN50, RN101, RN50x4, RN50x16 and RN50x64 of OpenAI and open_clip.

The ResNet has a stem of three convolutions, average pooling in place of strides, and attention pooling at the end,
whose values go through two projections into the joint space. Each cell of the last grid goes alone through these two
(as in MaskCLIP), so a patch is a vector of the joint space. Names of weights are OpenAI's. The text tower is CLIP's.

The stride stays 16: the last pooling moves by one cell instead of two, and the convolutions behind it are dilated by 2.
So the patches and the logits have the size of a ViT-B/16's, and what the weights compute stays the same: every second
cell equals the original's cell of stride 32 (the image embedding pools these), the others see the image shifted by 16
pixels. Positions enter only the keys and values of the attention pooling, not the patches, which thus need no
interpolation at any size. The features at strides 8 and 16 travel with the pixels of a patch, so that a patch hidden
from the decoder loses all scales. Those at stride 4 would more than double what each patch carries and are left out.

Batch norms always use their stored statistics, in training too.

A convolution mixes each patch with its surroundings. At stride 8, a visible patch carries something of pixels up to 45
away from its edge (RN50 and RN101), at stride 16 up to 133 (RN101: 405), and in the joint space up to 228 (RN101: 500);
hidden pixels further away have no influence. `keep` blanks the hidden pixels before the first convolution, which leaves
nothing of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedConfig, PreTrainedModel

from cmmasksd.errors import UserError, shown
from cmmasksd.model.initialisation import init_layer
from cmmasksd.model.pixels import CLIP_MEAN, CLIP_STD
from cmmasksd.model.towers.base import (
    DualEncoder,
    EncoderSizes,
    Family,
    ImageFeatures,
    ImageTower,
    blank,
    cell_pixels,
    gather,
    on_grid,
    per_patch,
)
from cmmasksd.model.towers.bounds import bounded, section
from cmmasksd.model.towers.clip import CLIPTextTower, text_section
from cmmasksd.model.towers.efficientnet import FrozenBatchNorm

STRIDE = 16
_BOUNDS = {
    "width": (2, 1024),
    "num_attention_heads": (1, 1024),
    "image_size": (32, 4096),
    "projection_dim": (1, 16_384),
}


class CLIPResNetConfig(PreTrainedConfig):
    """Sizes of a CLIPResNetModel.

    Args:
        text_config: a CLIPTextConfig, or its content.
        depths: blocks of each of the four stages.
        width: channels of the stem, an even number; the last grid has 32 times as many.
        num_attention_heads: heads of the attention pooling.
        image_size: side in pixels of the images that it was trained on, a multiple of 32.
        projection_dim: width of the joint space.
    """

    model_type = "clip_resnet"
    sub_configs = {"text_config": CLIPTextConfig}  # noqa: RUF012 (transformers' convention)  # pyright: ignore

    text_config: Any = None
    depths: Any = (3, 4, 6, 3)
    width: int = 64
    num_attention_heads: int = 32
    image_size: int = 224
    projection_dim: int = 1024

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = CLIPTextConfig(**(self.text_config or {}))
        self.depths = list(self.depths)
        super().__post_init__(**kwargs)


def clip_resnet_config(content: object) -> CLIPResNetConfig:
    """A CLIPResNetConfig from the content of a config.json.

    Raises:
        UserError: a size is out of bounds, or sizes do not fit together.
    """
    resnet = section(content, "clip_resnet_config")
    depths: Any = resnet.get("depths", CLIPResNetConfig.depths)
    if not isinstance(depths, list | tuple) or len(depths) != 4:
        raise UserError(f"depths is {shown(depths)}: expected a list of 4 whole numbers")
    names = [f"depths[{stage}]" for stage in range(4)]
    depths = bounded(dict(zip(names, depths, strict=True)), dict.fromkeys(names, (1, 128))).values()
    config = CLIPResNetConfig(text_config=text_section(resnet), depths=depths, **bounded(resnet, _BOUNDS))
    if config.width % 2:
        raise UserError(f"width is {config.width}: expected an even number")
    if config.image_size % 32:
        raise UserError(f"image_size is {config.image_size}: expected a multiple of 32")
    if 32 * config.width % config.num_attention_heads:
        raise UserError(
            f"32 x width {config.width} cannot be split among num_attention_heads {config.num_attention_heads}: "
            "expected a multiple"
        )
    return config


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut, both pooled.

    Args:
        into, width: channels at the start and in the middle; four times `width` at the end.
        pool: pooling between the second and the third convolution and at the start of the shortcut.
        dilation: of the second convolution.
    """

    def __init__(self, into: int, width: int, pool: nn.Module, *, dilation: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, width, 1, bias=False), FrozenBatchNorm(width, eps=1e-5)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = FrozenBatchNorm(width, eps=1e-5)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), FrozenBatchNorm(4 * width, eps=1e-5)
        self.pool, self.downsample = pool, nn.Identity()
        if into != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(into, 4 * width, 1, bias=False), FrozenBatchNorm(4 * width, eps=1e-5)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(self.pool(y))) + self.downsample(self.pool(x)))


class AttentionPool(nn.Module):
    """Attention of the mean cell to all cells and itself."""

    def __init__(self, width: int, heads: int, side: int, joint_width: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side * side + 1, width) * width**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in "qkv")
        self.c_proj = nn.Linear(width, joint_width)
        self.heads, self.side = heads, side

    def each(self, cells: Tensor) -> Tensor:
        """The value path: (B, C, h, w) to (B, h * w, D), cell by cell."""
        return self.c_proj(self.v_proj(cells.flatten(2).mT))

    def forward(self, cells: Tensor) -> Tensor:
        """(B, C, h, w) to (B, D); positions are interpolated unless the grid is that of the training."""
        mean = cells.mean((2, 3))[:, None]  # (B, 1, C)
        cells = cells + on_grid(self.positional_embedding[1:], self.side, (cells.shape[2], cells.shape[3]))
        tokens = torch.cat([mean + self.positional_embedding[0], cells.flatten(2).mT], dim=1)
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]


class ModifiedResNet(nn.Module):
    """OpenAI's ModifiedResNet at stride 16."""

    def __init__(self, config: CLIPResNetConfig) -> None:
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = FrozenBatchNorm(width // 2, eps=1e-5), FrozenBatchNorm(width // 2, eps=1e-5)
        self.bn3 = FrozenBatchNorm(width, eps=1e-5)
        # the mean of each cell and its three neighbours to the right and below
        every_cell = nn.Sequential(nn.ReplicationPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1))
        pools, into = (nn.Identity(), nn.AvgPool2d(2), nn.AvgPool2d(2), every_cell), width
        stages: list[nn.Module] = []
        for stage, (depth, pool) in enumerate(zip(config.depths, pools, strict=True)):
            blocks = [Bottleneck(into, width << stage, pool)]
            into = 4 * width << stage
            dilation = 2 if stage == 3 else 1
            blocks += [Bottleneck(into, width << stage, nn.Identity(), dilation=dilation) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.attnpool = AttentionPool(into, config.num_attention_heads, config.image_size // 32, config.projection_dim)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode.

        Args:
            pixel_values: (B, 3, H, W), H and W multiples of 16.

        Returns:
            Features at strides 8 and 16, and the cells that attention pooling takes, also at stride 16, all
            (B, channels, h, w).
        """
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        eighth = self.layer2(self.layer1(x))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class CLIPResNetModel(PreTrainedModel):
    """The weights of both towers, in transformers' format."""

    config_class = CLIPResNetConfig
    base_model_prefix = "clip_resnet"
    _supports_sdpa = True

    def __init__(self, config: CLIPResNetConfig) -> None:
        super().__init__(config)
        self.vision_model = ModifiedResNet(config)
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_layer(module)


class CLIPResNetImageTower(ImageTower):
    """CLIP's ResNet, patch by patch."""

    def __init__(self, clip: CLIPResNetModel) -> None:
        super().__init__()
        self.network = clip.vision_model

    def forward(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> tuple[ImageFeatures, Tensor]:
        """See `ImageTower`. The image embedding is CLIP's. `keep` blanks the pixels of the other patches to the mean
        colour. The patches already take the value path, so `value_path` returns them again."""
        grid = (pixel_values.shape[-2] // STRIDE, pixel_values.shape[-1] // STRIDE)
        pixel_values = blank(pixel_values, keep, grid)
        eighth, sixteenth, cells = self.network(pixel_values)
        pixels = torch.cat([cell_pixels(pixel_values, grid), per_patch(eighth, 2), per_patch(sixteenth, 1)], dim=-1)
        patches, pixels = gather(self.network.attnpool.each(cells), keep), gather(pixels, keep)
        embedding = self.network.attnpool(cells[:, :, ::2, ::2])  # the original's cells
        return ImageFeatures(patches, grid, patches if value_path else None, pixels=pixels), embedding


def dual_encoder(clip: CLIPResNetModel) -> DualEncoder:
    """The towers of a CLIPResNetModel, as views that share its modules."""
    return DualEncoder(CLIPResNetImageTower(clip), CLIPTextTower(clip))


def encoder_sizes(config: CLIPResNetConfig) -> EncoderSizes:
    """What the rest of the package needs to know of a CLIPResNetModel's configuration."""
    text = config.text_config
    return EncoderSizes(
        joint_width=config.projection_dim,
        embedding_width=text.hidden_size,
        patch_size=STRIDE,
        image_size=config.image_size,
        max_tokens=text.max_position_embeddings,
        vocabulary=text.vocab_size,
        start_token=text.bos_token_id,
        end_token=text.eos_token_id,
        scales=((8 * config.width, 2), (16 * config.width, 1)),
    )


_POOLING = ("positional_embedding", "q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
CLIP_RESNET = Family(
    "CLIP with a ResNet",
    CLIPResNetModel,
    clip_resnet_config,
    encoder_sizes,
    dual_encoder,
    unused=("logit_scale", *(f"vision_model.attnpool.{name}" for name in _POOLING)),
    mean_and_std=(CLIP_MEAN, CLIP_STD),
)
