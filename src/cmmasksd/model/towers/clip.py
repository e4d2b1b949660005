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

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens

if TYPE_CHECKING:
    from transformers import CLIPModel


def encode_image(
    clip: CLIPModel, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
) -> tuple[ImageFeatures, Tensor]:
    """Run the image tower at any size that is a multiple of the patch size.

    Args:
        pixel_values: (B, 3, H, W), normalised.
        keep: (B, n) int64, the patches that enter the tower; the others are dropped before its first block, as MAE
            does. None keeps all.
        value_path: also return the values of the last block's attention (MaskCLIP's dense features) as `dense`.

    Returns:
        features: of the n kept patches; `grid` is that of the whole image.
        pooled: (B, D), CLIP's own image embedding.
    """
    vision: Any = clip.vision_model
    size = vision.config.patch_size
    grid = (pixel_values.shape[-2] // size, pixel_values.shape[-1] // size)
    hidden = vision.embeddings(pixel_values, interpolate_pos_encoding=True)  # (B, 1 + N, width)
    if keep is not None:
        index = torch.cat([keep.new_zeros(keep.shape[0], 1), keep + 1], dim=1)  # the class token always stays
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden, last = vision.pre_layrnorm(hidden), vision.encoder.layers[-1]
    for layer in vision.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    entering, hidden = hidden, last(hidden, attention_mask=None)
    projected = clip.visual_projection(vision.post_layernorm(hidden))  # (B, 1 + n, D)
    dense = None
    if value_path:
        values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(entering[:, 1:])))
        dense = clip.visual_projection(vision.post_layernorm(values))
    fine = F.adaptive_avg_pool2d(pixel_values, (8 * grid[0], 8 * grid[1]))
    pixels = F.pixel_unshuffle(fine, 8).flatten(2).transpose(1, 2)  # (B, N, 192)
    if keep is not None:
        pixels = pixels.gather(1, keep[..., None].expand(-1, -1, pixels.shape[-1]))
    return ImageFeatures(projected[:, 1:], grid, dense, pixels=pixels), projected[:, 0]


def encode_text(clip: CLIPModel, tokens: Tokens) -> TextFeatures:
    """Run the text tower; every token goes through the final norm and the projection.

    The tower runs from its parts, so that the tokens are looked up once: the gradient of every look-up is as large as
    the whole vocabulary.
    """
    tower: Any = clip.text_model
    embedded = tower.embeddings.token_embedding(tokens.input_ids)
    length = embedded.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=embedded.device).tril()
    mask = earlier & tokens.attention_mask.bool()[:, None, None]  # (B, 1, L, L), queries by keys
    if tower.config._attn_implementation == "eager":  # adds its mask to the scores
        mask = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill(~mask, torch.finfo(embedded.dtype).min)
    hidden = tower.encoder(tower.embeddings(inputs_embeds=embedded), mask).last_hidden_state
    words = clip.text_projection(tower.final_layer_norm(hidden))
    end = words[torch.arange(words.shape[0], device=words.device), _end(tower.config.eos_token_id, tokens.input_ids)]
    return TextFeatures(words, end, tokens.word_ids >= 0, embedded)


def _end(eos_token_id: int, input_ids: Tensor) -> Tensor:
    """(B,) where each sentence ends. Old configurations say 2, which no tokenizer of CLIP has: there the end is the
    highest id."""
    ids = input_ids.int()  # ONNX has no argmax of int64
    return (ids if eos_token_id == 2 else (ids == eos_token_id).int()).argmax(-1)
