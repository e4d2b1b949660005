"""transformers' CLIPSeg: CLIP's towers, some of whose blocks are read by a small decoder of its own.

The only network here that is not ours. It offers what `CMMaskSDModel` offers (`encode_image`, `encode_text`, `decode`,
the towers and the sizes), and its folder has transformers' format before and after training. The decoder's first
layers, one per tapped block, look at one patch at a time, so they belong to the image tower here: an image is encoded
once, whatever the number of sentences, and what is kept of it is small. No word reaches the decoder, only the sentence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPSegConfig as TransformersConfig
from transformers import CLIPSegTextConfig, CLIPSegVisionConfig
from transformers.models.clipseg import modeling_clipseg

from cmmasksd.errors import UserError, shown
from cmmasksd.model.decoder import grid_positions
from cmmasksd.model.towers.base import DualEncoder, EncoderSizes, Family, ImageFeatures, TextFeatures, Tokens
from cmmasksd.model.towers.bounds import bounded, section
from cmmasksd.model.towers.clip import CLIPImageTower, CLIPTextTower, clip_sizes, encoder_sizes

_DECODER = {
    "reduce_dim": (2, 8192),
    "decoder_num_attention_heads": (1, 256),
    "decoder_intermediate_size": (1, 65_536),
    "conditional_layer": (0, 127),
}


class CLIPSegConfig(TransformersConfig):
    """transformers' configuration, with what the rest of the package asks of one."""

    @property
    def encoder(self) -> EncoderSizes:
        """Sizes of the dual encoder."""
        return encoder_sizes(self)


def clipseg_config(content: object) -> CLIPSegConfig:
    """A CLIPSegConfig from the content of a config.json.

    Raises:
        UserError: it is not a CLIPSeg's, or a size is out of bounds.
    """
    clipseg = section(content, "config.json")
    towers = clip_sizes(clipseg, CLIPSegTextConfig, CLIPSegVisionConfig)
    sizes = bounded(clipseg, _DECODER)
    complex_convolution = clipseg.get("use_complex_transposed_convolution", False)
    if not isinstance(complex_convolution, bool):
        raise UserError(f"use_complex_transposed_convolution is {shown(complex_convolution)}: expected true or false")
    blocks = clipseg.get("extract_layers", list(TransformersConfig.extract_layers))
    config: Any = CLIPSegConfig(**towers, **sizes, use_complex_transposed_convolution=complex_convolution)
    depth = config.vision_config.num_hidden_layers
    known = isinstance(blocks, list) and all(type(block) is int and 0 <= block < depth for block in blocks)
    if not known or not 1 <= len(blocks) <= depth:
        raise UserError(f"extract_layers is {shown(blocks)}: expected a list of blocks from 0 to {depth - 1}")
    config.extract_layers = blocks
    if config.conditional_layer >= len(blocks):
        raise UserError(f"conditional_layer is {config.conditional_layer}: expected less than {len(blocks)}")
    if config.reduce_dim % config.decoder_num_attention_heads:
        raise UserError(
            f"reduce_dim {config.reduce_dim} cannot be split among {config.decoder_num_attention_heads} heads: "
            "expected a multiple"
        )
    if complex_convolution and config.vision_config.patch_size < 4:
        raise UserError(f"vision_config.patch_size is {config.vision_config.patch_size}: expected at least 4")
    return config


class CLIPSegImageTower(CLIPImageTower):
    """CLIP's vision transformer and the first layers of CLIPSeg's decoder. `patches` are the reduced features of the
    tapped blocks, side by side; `context` is the class token's, which no masking touches."""

    def __init__(self, network: CLIPSegForImageSegmentation) -> None:
        super().__init__(network.clip)
        self.reduces = network.decoder.reduces
        self.taps = network.config.extract_layers[::-1]  # the decoder begins with the last

    def forward(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> tuple[ImageFeatures, Tensor]:
        """See `ImageTower`."""
        projected, dense, tapped = self.encode(pixel_values, keep, value_path, self.taps)
        reduced = [reduce(tapped[tap]) for tap, reduce in zip(self.taps, self.reduces, strict=True)]
        patches = torch.cat(reduced, dim=-1)  # (B, 1 + n, taps * reduce_dim)
        size = self.vision_model.config.patch_size
        grid = (pixel_values.shape[-2] // size, pixel_values.shape[-1] // size)
        features = ImageFeatures(patches[:, 1:], grid, dense, context=patches[:, :1], joint=projected[:, 1:])
        return features, projected[:, 0]


class CLIPSegDecoder(modeling_clipseg.CLIPSegDecoder):
    """CLIPSeg's decoder behind the reduced features, for grids of any shape."""

    def forward(self, image: ImageFeatures, text: TextFeatures) -> Tensor:  # pyright: ignore
        """Features of K images and K sentences to logits (K, cells * h, cells * w).

        The decoder knows positions from CLIP's features alone. A patch that a masked view has hidden gets fixed ones.
        """
        patches = image.patches
        if image.hidden is not None:
            positions = grid_positions(image.grid, patches.shape[-1], patches.device)
            patches = patches + positions * image.hidden[..., None]
        assert image.context is not None
        taps = torch.cat([image.context, patches], dim=1).chunk(len(self.layers), dim=-1)
        fused = torch.zeros_like(taps[0])
        for index, (tap, layer) in enumerate(zip(taps, self.layers, strict=True)):
            fused = fused + tap
            if index == self.conditional_layer:
                fused = self.film_mul(text.sentence)[:, None] * fused + self.film_add(text.sentence)[:, None]
            fused = layer(fused, attention_mask=None)
        return self.transposed_convolution(fused[:, 1:].mT.unflatten(2, image.grid)).squeeze(1)


class CLIPSegForImageSegmentation(modeling_clipseg.CLIPSegPreTrainedModel):
    """The network, called like `CMMaskSDModel`. Its name and those of its weights, which its files hold, are
    transformers'."""

    config_class = CLIPSegConfig
    main_input_name = "pixel_values"
    image_features = ("patches", "context", "joint")
    text_features = ("words", "sentence")
    decoder_inputs = ("patches", "context", "sentence")

    config: CLIPSegConfig  # pyright: ignore

    def __init__(self, config: CLIPSegConfig) -> None:
        super().__init__(config)
        self.clip = modeling_clipseg.CLIPSegModel(config)
        self.decoder = CLIPSegDecoder(config)
        self.towers = dual_encoder(self)  # shares its modules; no entry of its own in the state_dict
        self.post_init()

    @property
    def stride(self) -> float:
        """Pixels of the input per logit."""
        size = self.config.encoder.patch_size
        return size / (size // 4) ** 2 if self.config.use_complex_transposed_convolution else 1.0

    @property
    def patch_width(self) -> int:
        """Width of `ImageFeatures.patches`."""
        return len(self.decoder.reduces) * self.config.reduce_dim

    def encode_image(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> ImageFeatures:
        """(B, 3, H, W) normalised pixels to what the decoder reads: see `CLIPSegImageTower`."""
        return self.towers.image(pixel_values, keep=keep, value_path=value_path)[0]

    def encode_text(self, tokens: Tokens) -> TextFeatures:
        """Sentences to words and sentence in the joint space."""
        return self.towers.text(tokens)

    def decode(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """Features of K images and K sentences (pair by pair) to logits (K, H / stride, W / stride)."""
        return self.decoder(image, text)

    def freeze_unused(self) -> None:
        """Exclude CLIP from training, as CLIPSeg does: the decoder alone is trained."""
        self.clip.requires_grad_(False)


def dual_encoder(network: CLIPSegForImageSegmentation) -> DualEncoder:
    """The towers of a CLIPSeg, as views that share its modules."""
    return DualEncoder(CLIPSegImageTower(network), CLIPTextTower(network.clip))


CLIPSEG = Family(
    "CLIPSeg",
    CLIPSegForImageSegmentation,
    clipseg_config,
    encoder_sizes,
    dual_encoder,
    unused=(),
    mean_and_std=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)
