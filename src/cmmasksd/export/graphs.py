"""The three graphs of an export, as modules, with their inputs, outputs and free sizes, and inputs to try them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens


class ImageGraph(nn.Module):
    """The image encoder with its grid as a shape."""

    def __init__(self, model: CMMaskSDModel) -> None:
        super().__init__()
        self.tower = model.towers.image

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        features, _ = self.tower(pixel_values)
        assert features.pixels is not None
        return features.patches.unflatten(1, features.grid), features.pixels.unflatten(1, features.grid)


class TextGraph(nn.Module):
    """The text encoder; which tokens are words, the tokenizer tells."""

    def __init__(self, model: CMMaskSDModel) -> None:
        super().__init__()
        self.tower = model.towers.text

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.tower(Tokens(input_ids, attention_mask, input_ids, attention_mask[:, 0]))
        assert features.embedded is not None
        return features.words, features.sentence, features.embedded


class DecoderGraph(nn.Module):
    """Decoder and mask head, pair by pair."""

    def __init__(self, model: CMMaskSDModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, patches: Tensor, pixels: Tensor, words: Tensor, sentence: Tensor, embedded: Tensor, word_mask: Tensor
    ) -> Tensor:
        grid = (patches.shape[1], patches.shape[2])
        image = ImageFeatures(patches.flatten(1, 2), grid, pixels=pixels.flatten(1, 2))
        return self.decoder(image, TextFeatures(words, sentence, word_mask, embedded))


@dataclass(frozen=True)
class Graph:
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[dict[int, Any], ...]  # which sizes of the inputs are free


def graphs(model: CMMaskSDModel) -> dict[str, Graph]:
    from torch.export import Dim

    sizes = model.config.encoder
    # A grid of one row or column would be another program: the tracer tells h from h * w by their not being equal.
    batch, h, w = Dim("batch", min=1), Dim("h", min=2), Dim("w", min=2)
    tokens = Dim("tokens", min=3, max=sizes.max_tokens)
    per_token = {0: batch, 1: tokens}
    return {
        "image": Graph(
            ImageGraph(model),
            ("pixel_values",),
            ("patches", "pixels"),
            ({0: batch, 2: sizes.patch_size * h, 3: sizes.patch_size * w},),
        ),
        "text": Graph(
            TextGraph(model),
            ("input_ids", "attention_mask"),
            ("words", "sentence", "embedded"),
            (per_token, per_token),
        ),
        "decoder": Graph(
            DecoderGraph(model),
            ("patches", "pixels", "words", "sentence", "embedded", "word_mask"),
            ("logits",),
            ({0: batch, 1: h, 2: w}, {0: batch, 1: h, 2: w}, per_token, {0: batch}, per_token, per_token),
        ),
    }


@torch.no_grad()
def example(key: str, model: CMMaskSDModel) -> tuple[Tensor, ...]:
    """Inputs to trace with; all sizes differ from each other, so that none is taken for another."""
    pixels = torch.randn(2, 3, *(side * model.config.encoder.patch_size for side in (5, 7)))
    ids, attention, is_word = sentences(model, 2, 9)
    if key == "image":
        return (pixels,)
    if key == "text":
        return ids, attention
    return (*ImageGraph(model)(pixels), *TextGraph(model)(ids, attention), is_word)


def sentences(
    model: CMMaskSDModel, count: int, length: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random sentences of which the n-th is n tokens shorter: ids, attention mask (count, length), and what is a word.

    Random pieces: the end token may be any id, so it is kept out of the words."""
    sizes = model.config.encoder
    ends = (length - 1 - torch.arange(count)).clamp(min=2)[:, None]
    at = torch.arange(length)
    ids = torch.randint(0, sizes.vocabulary, (count, length), generator=generator)
    ids = torch.where(ids == sizes.end_token, (ids + 1) % sizes.vocabulary, ids)
    ids = torch.where(at < ends, ids, sizes.end_token)
    ids[:, 0] = sizes.start_token
    return ids, (at <= ends).long(), (at > 0) & (at < ends)
