"""The two CLIP towers, read out so that patches, words and the sentence lie in one joint space.

CLIP itself projects only two vectors into its joint space: the class token of the image and the end-of-text token of
the sentence. We send *every* token through the tower's own final layer norm and projection (method: encoders 1 and 2),
so that a patch-word cosine means something. The towers are transformers' `CLIPModel`; nothing of theirs is copied, and
the tests hold our outputs to theirs.

Unusual here: both towers run from their parts (embeddings, blocks, norm). Masked self-distillation at the input drops
patches between the embeddings and the blocks of the image tower; the decoder also reads what enters the text tower,
which hides words through its attention mask. No forward hooks: threads may share a model.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

from cmmasksd.model.pixels import CLIP_MEAN, CLIP_STD
from cmmasksd.model.towers.base import (
    DualEncoder,
    EncoderSizes,
    Family,
    ImageFeatures,
    ImageTower,
    TextFeatures,
    TextTower,
    Tokens,
    cell_pixels,
    gather,
    on_grid,
    transformer_sizes,
)
from cmmasksd.model.towers.bounds import TEXT, TOKEN_ID, VISION, bounded, bounded_tower, section

_CLIP = {"projection_dim": (1, 16_384), "logit_scale_init_value": (-100.0, 100.0), "initializer_factor": (0.0, 1e4)}
_TOWER = {"projection_dim": (1, 16_384), "initializer_range": (0.0, 1e4), "initializer_factor": (0.0, 1e4)}
_IDS = {f"{name}_token_id": TOKEN_ID for name in ("bos", "eos", "pad")}
_MAY_BE_NULL = ("bos_token_id", "pad_token_id")  # neither is used


def clip_config(content: object) -> CLIPConfig:
    """A CLIPConfig from the content of a config.json.

    Raises:
        UserError: it is not a CLIP's, or a size is out of bounds.
    """
    return CLIPConfig(**clip_sizes(section(content, "clip_config"), CLIPTextConfig, CLIPVisionConfig))


def clip_sizes(clip: Mapping[str, Any], text_kind: Any, vision_kind: Any) -> dict[str, Any]:
    """The sizes of a CLIP's configuration, each within bounds.

    Args:
        clip: content of its config.json.
        text_kind, vision_kind: classes of its towers' configurations, which have the defaults.

    Raises:
        UserError: a size is out of bounds.
    """
    towers = {
        "text_config": _tower(clip, "text_config", text_kind, TEXT | _IDS),
        "vision_config": _tower(clip, "vision_config", vision_kind, VISION),
    }
    return bounded(clip, _CLIP) | towers


def text_section(clip: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the text tower, from the content of a config.json."""
    return _tower(clip, "text_config", CLIPTextConfig, TEXT | _IDS)


def _tower(clip: Mapping[str, Any], name: str, kind: Any, bounds: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    # the first CLIPs in transformers' format have a second section, which takes precedence
    tower = section(clip.get(name), name) | section(clip.get(f"{name}_dict"), f"{name}_dict")
    tower = {key: value for key, value in tower.items() if value is not None or key not in _MAY_BE_NULL}
    return bounded_tower(tower, {**bounds, **_TOWER}, name, kind)


def dual_encoder(clip: CLIPModel) -> DualEncoder:
    """The towers of a CLIP, as views that share its modules."""
    return DualEncoder(CLIPImageTower(clip), CLIPTextTower(clip))


def encoder_sizes(config: PreTrainedConfig) -> EncoderSizes:
    """What the rest of the package needs to know of a CLIP's configuration."""
    clip: Any = config
    text = clip.text_config
    return transformer_sizes(
        clip, joint_width=clip.projection_dim, start_token=text.bos_token_id, end_token=text.eos_token_id
    )


class CLIPImageTower(ImageTower):
    """CLIP's vision transformer, patch by patch."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model: Any = clip.vision_model
        self.visual_projection = clip.visual_projection

    def forward(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> tuple[ImageFeatures, Tensor]:
        """See `ImageTower`. The image embedding is the class token's; `keep` drops patches before the first block, as
        MAE does; `value_path` gives the values of the last block's attention (MaskCLIP's dense features)."""
        projected, dense, _ = self.encode(pixel_values, keep, value_path)
        size = self.vision_model.config.patch_size
        grid = (pixel_values.shape[-2] // size, pixel_values.shape[-1] // size)
        pixels = gather(cell_pixels(pixel_values, grid), keep)
        return ImageFeatures(projected[:, 1:], grid, dense, pixels=pixels), projected[:, 0]

    def encode(
        self, pixel_values: Tensor, keep: Tensor | None, value_path: bool, taps: Container[int] = ()
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """Class token and n patches.

        Args:
            pixel_values, keep, value_path: see `forward`.
            taps: indices of blocks whose output is also returned.

        Returns:
            (B, 1 + n, D) in the joint space; (B, n, D) of the value path; (B, 1 + n, width) of each tapped block.
        """
        vision, tapped = self.vision_model, {}
        hidden = _embed(vision.embeddings, pixel_values)  # (B, 1 + N, width)
        if keep is not None:
            index = torch.cat([keep.new_zeros(keep.shape[0], 1), keep + 1], dim=1)  # the class token always stays
            hidden = gather(hidden, index)
        entering = hidden = vision.pre_layrnorm(hidden)
        for block, layer in enumerate(vision.encoder.layers):
            entering, hidden = hidden, layer(hidden, attention_mask=None)
            if block in taps:
                tapped[block] = hidden
        projected = self.visual_projection(vision.post_layernorm(hidden))  # (B, 1 + n, D)
        dense = None
        if value_path:
            last = vision.encoder.layers[-1]
            values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(entering[:, 1:])))
            dense = self.visual_projection(vision.post_layernorm(values))
        return projected, dense, tapped


def _embed(embeddings: Any, pixel_values: Tensor) -> Tensor:
    """Class token and patches with their positions, (B, 1 + N, width)."""
    patches = embeddings.patch_embedding(pixel_values.to(embeddings.patch_embedding.weight.dtype))  # (B, width, h, w)
    positions, side = embeddings.position_embedding.weight, embeddings.image_size // embeddings.patch_size
    class_token = (embeddings.class_embedding + positions[0]).expand(patches.shape[0], 1, -1)
    return torch.cat([class_token, (patches + on_grid(positions[1:], side, patches.shape[-2:])).flatten(2).mT], dim=1)


class CLIPTextTower(TextTower):
    """CLIP's text transformer, token by token."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.text_model: Any = clip.text_model
        self.text_projection = clip.text_projection

    def forward(self, tokens: Tokens) -> TextFeatures:
        """See `TextTower`. Tokens are looked up once: the gradient of a look-up is as large as the vocabulary."""
        tower = self.text_model
        embedded = tower.embeddings.token_embedding(tokens.input_ids)
        length = embedded.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=embedded.device).tril()
        mask = earlier & tokens.attention_mask.bool()[:, None, None]  # (B, 1, L, L), queries by keys
        if tower.config._attn_implementation == "eager":  # adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill(~mask, torch.finfo(embedded.dtype).min)
        hidden = tower.encoder(tower.embeddings(inputs_embeds=embedded), mask).last_hidden_state
        words = self.text_projection(tower.final_layer_norm(hidden))
        end = _end(tower.config.eos_token_id, tokens.input_ids)
        sentence = words[torch.arange(words.shape[0], device=words.device), end]
        return TextFeatures(words, sentence, tokens.word_ids >= 0, embedded)


def _end(eos_token_id: int, input_ids: Tensor) -> Tensor:
    """(B,) where each sentence ends. Old configurations say 2, which no tokenizer of CLIP has: there the end is the
    highest id."""
    ids = input_ids.int()  # ONNX has no argmax of int64
    return (ids if eos_token_id == 2 else (ids == eos_token_id).int()).argmax(-1)


CLIP = Family(
    "CLIP",
    CLIPModel,
    clip_config,
    encoder_sizes,
    dual_encoder,
    unused=("logit_scale",),
    mean_and_std=(CLIP_MEAN, CLIP_STD),
)
