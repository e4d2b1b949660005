"""The two towers of SigLIP and SigLIP 2, read out so that patches, words and the sentence lie in one joint space.

SigLIP has no class token and no projection: an attention-pooling head makes the image embedding of all patches. Each
patch goes alone through the value path of this head (as MaskCLIP does in CLIP's last block), so the patch of an image
of one patch is the image embedding. Every token goes through the final norm and the head of the text tower.

The text tower attends to its padding and reads the sentence from the last of its positions, which is mostly padding.
So it pads by itself, and features do not depend on the sentences beside them. A hidden token becomes the padding token:
there is no attention mask to hide it with. Its position stays.

SigLIP 2 with a fixed resolution is the same network with another tokenizer. Its NaFlex variant (model_type `siglip2`)
takes other inputs and is not supported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig

from cmmasksd.errors import UserError, shown
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
from cmmasksd.model.towers.bounds import TEXT, TOKEN_ID, VISION, bounded_tower, section

_TEXT = TEXT | {"projection_size": (1, 16_384), "pad_token_id": TOKEN_ID}


def siglip_config(content: object) -> SiglipConfig:
    """A SiglipConfig from the content of a config.json.

    Raises:
        UserError: it is not a SigLIP's, or a size is out of bounds.
    """
    siglip = section(content, "siglip_config")
    text, vision = (
        {key: value for key, value in section(siglip.get(name), name).items() if value is not None}
        for name in ("text_config", "vision_config")
    )
    if (head := vision.get("vision_use_head", True)) is not True:
        raise UserError(f"vision_config.vision_use_head is {shown(head)}: expected true, patches need the pooling head")
    no_ids = {"bos_token_id": None, "eos_token_id": None}  # SigLIP's are CLIP's and mean nothing
    config: Any = SiglipConfig(
        text_config=bounded_tower(text, _TEXT, "text_config", SiglipTextConfig) | no_ids,  # pyright: ignore
        vision_config=bounded_tower(vision, VISION, "vision_config", SiglipVisionConfig),  # pyright: ignore
    )
    if config.text_config.projection_size != config.vision_config.hidden_size:
        raise UserError(
            f"text_config.projection_size is {config.text_config.projection_size}: expected the image tower's "
            f"hidden_size {config.vision_config.hidden_size}"
        )
    if config.text_config.pad_token_id >= config.text_config.vocab_size:
        raise UserError(
            f"text_config.pad_token_id is {config.text_config.pad_token_id}: expected less than vocab_size "
            f"{config.text_config.vocab_size}"
        )
    return config


def dual_encoder(siglip: SiglipModel) -> DualEncoder:
    """The towers of a SigLIP, as views that share its modules."""
    return DualEncoder(SiglipImageTower(siglip), SiglipTextTower(siglip))


def encoder_sizes(config: SiglipConfig) -> EncoderSizes:
    """What the rest of the package needs to know of a SigLIP's configuration."""
    siglip: Any = config
    return transformer_sizes(siglip, joint_width=siglip.vision_config.hidden_size, start_token=None, end_token=None)


class SiglipImageTower(ImageTower):
    """SigLIP's vision transformer, patch by patch."""

    def __init__(self, siglip: SiglipModel) -> None:
        super().__init__()
        self.vision_model: Any = siglip.vision_model

    def forward(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> tuple[ImageFeatures, Tensor]:
        """See `ImageTower`. `keep` drops patches before the first block, as MAE does; `value_path` gives the values of
        the last block's attention (MaskCLIP's dense features)."""
        vision = self.vision_model
        embeddings = vision.embeddings
        patches = embeddings.patch_embedding(pixel_values.to(embeddings.patch_embedding.weight.dtype))
        grid = (patches.shape[-2], patches.shape[-1])
        side = embeddings.image_size // embeddings.patch_size
        positions = on_grid(embeddings.position_embedding.weight, side, grid)
        hidden = gather((patches + positions).flatten(2).mT, keep)  # (B, n, width)
        last = vision.encoder.layers[-1]
        for layer in vision.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        entering, hidden = hidden, vision.post_layernorm(last(hidden, attention_mask=None))
        dense = None
        if value_path:
            values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(entering)))
            dense = _one_by_one(vision.head, vision.post_layernorm(values))
        pixels = gather(cell_pixels(pixel_values, grid), keep)
        return ImageFeatures(_one_by_one(vision.head, hidden), grid, dense, pixels=pixels), vision.head(hidden)


def _one_by_one(head: Any, patches: Tensor) -> Tensor:
    """(B, n, D), what the pooling head would give for each patch (B, n, D) if there were no others."""
    attention, width = head.attention, patches.shape[-1]
    values = F.linear(patches, attention.in_proj_weight[-width:], attention.in_proj_bias[-width:])
    pooled = attention.out_proj(values)
    return pooled + head.mlp(head.layernorm(pooled))


class SiglipTextTower(TextTower):
    """SigLIP's text transformer, token by token."""

    def __init__(self, siglip: SiglipModel) -> None:
        super().__init__()
        self.text_model: Any = siglip.text_model

    def forward(self, tokens: Tokens) -> TextFeatures:
        """See `TextTower`. Padding and hidden tokens become the padding token of the configuration, whatever their id;
        the sentence is the last position."""
        tower = self.text_model
        length, longest = tokens.input_ids.shape[1], tower.config.max_position_embeddings
        padding = tokens.input_ids.new_full((tokens.input_ids.shape[0], longest), tower.config.pad_token_id)
        ids = torch.where(tokens.attention_mask.bool(), tokens.input_ids, tower.config.pad_token_id)
        embedded = tower.embeddings.token_embedding(torch.cat([ids, padding], dim=1)[:, :longest])
        hidden = tower.encoder(tower.embeddings(inputs_embeds=embedded), attention_mask=None).last_hidden_state
        words = tower.head(tower.final_layer_norm(hidden))
        seen = torch.arange(length, device=words.device)  # export takes a slice of the whole length for a special case
        return TextFeatures(words[:, seen], words[:, -1], tokens.word_ids >= 0, embedded[:, seen])


SIGLIP = Family(
    "SigLIP",
    SiglipModel,
    siglip_config,
    encoder_sizes,
    dual_encoder,
    unused=("logit_scale", "logit_bias", "vision_model.head.probe"),
    mean_and_std=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    lower_case=True,
)
