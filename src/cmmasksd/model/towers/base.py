"""What a dual encoder must offer: two towers (`ImageTower`, `TextTower`) into one joint space, and its `EncoderSizes`.

The decoder and the objective know encoders only by the records that pass between them: `Tokens` in, `ImageFeatures`
and `TextFeatures` out. A new family is one file beside `clip.py` that ends with its `Family`, and one line in
`families.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Word(NamedTuple):
    """A word of a sentence: its characters, `text[start:end]`, and its tokens."""

    start: int
    end: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokenised sentences. B sentences, L tokens including start, end and padding.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 for start, pieces and end, 0 for padding.
        word_ids: (B, L) int64, which word of its sentence a token belongs to (a word may have several pieces), from 0;
            -1 for start, end and padding.
        truncated: (B,) bool, sentences that lost their last words to the limit of tokens.
        spans: (B, L, 2) int64, the characters of its sentence that a token stands for: first, and one past the last.
            None: the tokens did not come from a sentence.
    """

    input_ids: Tensor
    attention_mask: Tensor
    word_ids: Tensor
    truncated: Tensor
    spans: Tensor | None = None

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on another device."""
        return self._each(lambda part: part.to(device))

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, part: slice) -> Tokens:
        """Some of the sentences, padded as before."""
        return self._each(lambda column: column[part])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        columns = (getattr(self, field.name) for field in fields(self))
        changed: Any = (None if column is None else change(column) for column in columns)
        return Tokens(*changed)

    def words(self, index: int) -> list[Word]:
        """The words of one sentence that are in view, in order."""
        assert self.spans is not None
        ids, spans = self.word_ids[index].tolist(), self.spans[index].tolist()
        pieces: dict[int, list[int]] = {}
        for position, word in enumerate(ids):
            if word >= 0:
                pieces.setdefault(word, []).append(position)
        return [Word(spans[at[0]][0], spans[at[-1]][1], at) for at in pieces.values()]

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
        pixels: (B, N, P) each patch's own pixels, 8 x 8 of them whatever its size: what outlines are made from; then
            its finer features, if the family has any (`EncoderSizes.scales`). None: a network whose decoder does not
            use them.
        hidden: (B, N) bool, patches that a masked view replaced by its mask token. None: no patch is hidden.
        whole: (B, N, D) `patches` of the same images before any was hidden, where `hidden` is given: a decoder that
            compares a patch with all others takes their mean and deviation from here.
        joint: (B, N, D) the patches in the joint space, for the correlation, where `patches` lie in another, else None.
    """

    patches: Tensor
    grid: tuple[int, int]
    dense: Tensor | None = None
    context: Tensor | None = None
    pixels: Tensor | None = None
    hidden: Tensor | None = None
    whole: Tensor | None = None
    joint: Tensor | None = None

    def __len__(self) -> int:
        return self.patches.shape[0]

    def select(self, index: Tensor) -> ImageFeatures:
        """The features of images `index` (K,) int64, in that order: one image repeated for each of its expressions."""
        parts = (self.dense, self.context, self.pixels, self.hidden, self.whole, self.joint)
        return ImageFeatures(self.patches[index], self.grid, *(None if part is None else part[index] for part in parts))

    @staticmethod
    def cat(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """The images of several records of the same grid, one after the other, for the decoder: `dense` and
        `joint` are left out. If any record hides patches, those of the others are marked as not hidden."""

        def column(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        # Before `whole`: gradients are summed in reverse order of use, and a resumed run needs the same bits.
        patches, hidden, whole = torch.cat([part.patches for part in parts]), None, None
        if any(part.hidden is not None for part in parts):
            none = [part.patches.new_zeros(part.patches.shape[:2], dtype=torch.bool) for part in parts]
            hidden = torch.cat([n if part.hidden is None else part.hidden for n, part in zip(none, parts, strict=True)])
            whole = torch.cat([part.patches if part.whole is None else part.whole for part in parts])
        return ImageFeatures(patches, parts[0].grid, None, column("context"), column("pixels"), hidden, whole)


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """What the decoder knows of the sentences. B sentences, L tokens, D the joint width.

    Attributes:
        words: (B, L, D).
        sentence: (B, D), in CLIP the end-of-text token.
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


class ImageTower(nn.Module, ABC):
    """Images to patches in the joint space. Holds the parameters of this side alone, so it can be frozen or exported
    without the other."""

    @abstractmethod
    def forward(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> tuple[ImageFeatures, Tensor]:
        """Encode images of any size that is a multiple of the patch size.

        Args:
            pixel_values: (B, 3, H, W), normalised.
            keep: (B, n) int64, the patches that the tower may see, in the order of the output; the pixels of all others
                have no influence. None: all.
            value_path: also return patch features for the correlation as `ImageFeatures.dense`.

        Returns:
            features: the n kept patches; `grid` is that of the whole image.
            embedding: (B, D), the family's own embedding of the whole image.
        """


class TextTower(nn.Module, ABC):
    """Sentences to words and sentence in the joint space. Holds the parameters of this side alone."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> TextFeatures:
        """Encode sentences. A token whose `attention_mask` is 0 (padding, or hidden by `Tokens.hide`) has no influence
        on any other, and its position stays."""


class DualEncoder(NamedTuple):
    """The two towers of a model."""

    image: ImageTower
    text: TextTower


class EncoderSizes(NamedTuple):
    """What the rest of the package needs to know of an encoder's configuration."""

    joint_width: int
    """D, the width of the joint space."""
    embedding_width: int
    """E, the width of `TextFeatures.embedded`."""
    patch_size: int
    """Pixels of the input per patch and side."""
    image_size: int
    """Side in pixels of the images that the encoder was trained on."""
    max_tokens: int
    """Longest sentence that the text tower has positions for, start and end included."""
    vocabulary: int
    """Number of token ids."""
    start_token: int | None
    """First token of every sentence; None: the family has none."""
    end_token: int | None
    """Last token of every sentence; None: the tower reads the sentence elsewhere, and any end will do."""
    scales: tuple[tuple[int, int], ...] = ()
    """Finer features that `ImageFeatures.pixels` holds after the 8 x 8 pixels: channels, and cells per side of a patch
    (4, 2 or 1). Each is a patch's (channels, cells, cells), flattened."""


def transformer_sizes(config: Any, *, joint_width: int, start_token: int | None, end_token: int | None) -> EncoderSizes:
    """The sizes of two transformers, from a configuration that nests theirs as transformers names them."""
    vision, text = config.vision_config, config.text_config
    return EncoderSizes(
        joint_width=joint_width,
        embedding_width=text.hidden_size,
        patch_size=vision.patch_size,
        image_size=vision.image_size,
        max_tokens=text.max_position_embeddings,
        vocabulary=text.vocab_size,
        start_token=start_token,
        end_token=end_token,
    )


class Family(NamedTuple):
    """What a family of encoders consists of."""

    label: str
    """Its name in messages and model cards."""
    network: type[PreTrainedModel]
    """transformers' model, whose weights a saved model holds."""
    config: Callable[[object], PreTrainedConfig]
    """The network's configuration from the content of its config.json, every size within bounds (UserError)."""
    sizes: Callable[[Any], EncoderSizes]
    """From this configuration."""
    towers: Callable[[Any], DualEncoder]
    """The towers of a network, as views that share its modules."""
    unused: tuple[str, ...]
    """Parameters of the network that no mask depends on, such as the temperature of contrastive training."""
    mean_and_std: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Of pixel values in [0, 1], where the files of a backbone name none."""
    lower_case: bool = False
    """Whether the tokenizer must lower-case sentences; for transformers' SigLIP, this is no part of tokenizer.json."""


def on_grid(positions: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (side * side, width) as (1, width, h, w).

    They are interpolated on every grid, which is the identity on that of the training. transformers' own forward passes
    branch there, so they cannot be exported as one graph for all sizes.
    """
    return F.interpolate(positions.T.unflatten(1, (side, side))[None], grid, mode="bicubic")


def cell_pixels(pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, 192), see `ImageFeatures.pixels`."""
    return per_patch(F.adaptive_avg_pool2d(pixel_values, (8 * grid[0], 8 * grid[1])), 8)


def per_patch(feature: Tensor, cells: int) -> Tensor:
    """(B, channels, cells * h, cells * w) to (B, h * w, channels * cells * cells): each patch's part."""
    return F.pixel_unshuffle(feature, cells).flatten(2).transpose(1, 2)


def blank(pixel_values: Tensor, keep: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) whose other patches than `keep`, see `gather`, have the mean colour."""
    if keep is None:
        return pixel_values
    size = pixel_values.shape[-1] // grid[1]
    visible = keep.new_zeros(keep.shape[0], grid[0] * grid[1], dtype=torch.bool).scatter(1, keep, True)
    visible = visible.unflatten(1, grid).repeat_interleave(size, 1).repeat_interleave(size, 2)  # (B, H, W)
    return pixel_values.masked_fill(~visible[:, None], 0.0)


def gather(values: Tensor, keep: Tensor | None) -> Tensor:
    """The kept patches (B, n, width) of (B, N, width); `keep` (B, n) int64, None: all."""
    return values if keep is None else values.gather(1, keep[..., None].expand(-1, -1, values.shape[-1]))
