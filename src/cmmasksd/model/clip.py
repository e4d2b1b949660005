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

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPModel


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokenised sentences. B sentences, L tokens including start, end and padding.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 for start, pieces and end, 0 for padding.
        word_ids: (B, L) int64, which word of its sentence a token belongs to (a word may have several pieces), from 0;
            -1 for start, end and padding.
        truncated: (B,) bool, sentences that lost their last words to the limit of tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    word_ids: Tensor
    truncated: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on another device."""
        return Tokens(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, part: slice) -> Tokens:
        """Some of the sentences, padded as before."""
        return Tokens(*(getattr(self, field.name)[part] for field in fields(self)))

    def hide(self, hidden: Tensor) -> Tokens:
        """The same sentences with some tokens hidden from the text tower.

        A hidden token is replaced by the start token and masked out of attention, so nothing can depend on it; it is no
        longer a word (word_ids -1). Positions stay, so the tower can tell that a word is missing.

        Args:
            hidden: (B, L) bool, true only where word_ids >= 0.
        """
        return replace(
            self,
            input_ids=torch.where(hidden, self.input_ids[:, :1], self.input_ids),
            attention_mask=self.attention_mask.masked_fill(hidden, 0),
            word_ids=self.word_ids.masked_fill(hidden, -1),
        )


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the decoder knows of the images. B images, N = h * w patches, D the joint width.

    Attributes:
        patches: (B, N, D), row by row.
        grid: (h, w).
        dense: (B, N, D) patch features for the correlation where they differ from `patches`, else None.
        context: (B, …) what else the decoder of another network needs and no masking touches, such as a class token.
            Ours needs none.
        pixels: (B, N, 192) each patch's own pixels, 8 x 8 of them whatever its size: what outlines are made from. None:
            a network whose decoder does not use them.
        hidden: (B, N) bool, patches that a masked view replaced by its mask token. None: no patch is hidden.
        whole: (B, N, D) `patches` of the same images before any was hidden, where `hidden` is given: a decoder that
            compares a patch with all others takes their mean and deviation from here.
    """

    patches: Tensor
    grid: tuple[int, int]
    dense: Tensor | None = None
    context: Tensor | None = None
    pixels: Tensor | None = None
    hidden: Tensor | None = None
    whole: Tensor | None = None

    def __len__(self) -> int:
        return self.patches.shape[0]

    def select(self, index: Tensor) -> ImageFeatures:
        """The features of images `index` (K,) int64, in that order: one image repeated for each of its expressions."""
        parts = (self.dense, self.context, self.pixels, self.hidden, self.whole)
        return ImageFeatures(self.patches[index], self.grid, *(None if part is None else part[index] for part in parts))


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """What the decoder knows of the sentences. B sentences, L tokens, D the joint width.

    Attributes:
        words: (B, L, D).
        sentence: (B, D), the end-of-text token.
        word_mask: (B, L) bool, true for real words only, never start, end or padding.
        embedded: (B, L, E) the tokens' input embeddings: which word it is, before the tower keeps of it only what told
            images apart in its training. None: a network whose decoder does not use them.
    """

    words: Tensor
    sentence: Tensor
    word_mask: Tensor
    embedded: Tensor | None = None

    def __len__(self) -> int:
        return self.words.shape[0]

    def select(self, index: Tensor | slice) -> TextFeatures:
        """The features of some of the sentences."""
        embedded = None if self.embedded is None else self.embedded[index]
        return TextFeatures(self.words[index], self.sentence[index], self.word_mask[index], embedded)

    @staticmethod
    def cat(parts: Sequence[TextFeatures]) -> TextFeatures:
        """The sentences of several records of the same length L, one after the other."""
        columns: list[list[Any]] = [[getattr(part, field.name) for part in parts] for field in fields(TextFeatures)]
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return TextFeatures(*joined)


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
    visible = earlier & tokens.attention_mask.bool()[:, None, None]  # (B, 1, L, L), queries by keys
    hidden = tower.encoder(tower.embeddings(inputs_embeds=embedded), visible).last_hidden_state
    words = clip.text_projection(tower.final_layer_norm(hidden))
    end = words[torch.arange(words.shape[0], device=words.device), _end(tower.config.eos_token_id, tokens.input_ids)]
    return TextFeatures(words, end, tokens.word_ids >= 0, embedded)


def _end(eos_token_id: int, input_ids: Tensor) -> Tensor:
    """(B,) where each sentence ends. Old configurations say 2, which no tokenizer of CLIP has: there the end is the
    highest id."""
    ids = input_ids.int()  # ONNX has no argmax of int64
    return (ids if eos_token_id == 2 else (ids == eos_token_id).int()).argmax(-1)
