"""The four graphs of an export as modules, with their inputs, outputs and dynamic sizes, and example inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmmasksd.model.placement import Placement
from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens
from cmmasksd.model.trained import TrainedModel

_PER_PATCH = ("patches", "pixels", "joint")
_IMAGE = (*_PER_PATCH, "context")


class ImageGraph(nn.Module):
    """The image encoder with its grid as a shape."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.tower, self.outputs = model.towers.image, model.image_features

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        features, _ = self.tower(pixel_values)
        values = {name: getattr(features, name) for name in self.outputs}
        return tuple(v.unflatten(1, features.grid) if name in _PER_PATCH else v for name, v in values.items())


class TextGraph(nn.Module):
    """The text encoder; the mask of words comes from the tokenizer."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.tower, self.outputs = model.towers.text, model.text_features

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        features = self.tower(Tokens(input_ids, attention_mask, input_ids, attention_mask[:, 0]))
        return tuple(getattr(features, name) for name in self.outputs)


class DecoderGraph(nn.Module):
    """The decoder, pair by pair; with its mask head, if it has one."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.decoder, self.inputs = model.decoder, model.decoder_inputs

    def forward(self, *inputs: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        grid = (given["patches"].shape[1], given["patches"].shape[2])
        image = {name: v.flatten(1, 2) if name in _PER_PATCH else v for name, v in given.items() if name in _IMAGE}
        text: dict[str, Any] = {"words": None, "word_mask": None}
        text |= {name: v for name, v in given.items() if name not in _IMAGE}
        return self.decoder(ImageFeatures(grid=grid, **image), TextFeatures(**text))


class RestoreGraph(nn.Module):
    """`CMMaskSDProcessor.restore` with the placement as tensors, and the probabilities beside the logits.

    One sequence of operations serves images with and without padding: without, the resize to the canvas and the cut
    that follows are the identity.
    """

    def forward(self, logits: Tensor, original: Tensor, canvas: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        padded = (content[2:] != canvas).any()
        value, sides, kept = logits[:, None], [], []
        for axis, cells in enumerate(logits.shape[1:]):
            start, length = content[axis], content[2 + axis]
            value = value.index_select(2 + axis, _nearest_inside(cells, canvas[axis], start, length))
            sides.append(_size(torch.where(padded, canvas[axis], cells)))
            kept.append(torch.arange(_size(torch.where(padded, length, cells))) + torch.where(padded, start, 0))
        value = F.interpolate(value, sides, mode="bilinear")
        value = value.index_select(2, kept[0]).index_select(3, kept[1])
        restored = F.interpolate(value, [_size(original[0]), _size(original[1])], mode="bilinear")[:, 0]
        return restored, restored.sigmoid()


def _nearest_inside(cells: int, side: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """For each cell along one axis the nearest cell whose centre lies in the image; see `inside` in model/placement.py.

    It counts centres instead of dividing, since a division of integers is done in float32 in ONNX.
    """
    index = torch.arange(cells)
    centres = (2 * index + 1) * side  # in units of 1 / (2 * cells) of a pixel
    first = (centres < 2 * cells * start).sum()
    last = (centres < 2 * cells * (start + length)).sum() - 1
    only = (2 * (index + 1) * side <= (2 * start + length) * cells).sum().clamp(max=cells - 1)
    thin = last < first  # the image lies between two centres
    return torch.minimum(torch.maximum(index, torch.where(thin, only, first)), torch.where(thin, only, last))


def _size(value: Tensor) -> int:
    """A size that depends on the data; the tracer must know that it is positive."""
    size: Any = value.item()  # `int()` would make it a constant
    torch._check(size >= 1)
    return size


@dataclass(frozen=True)
class Graph:
    """A module to trace, with the names of its inputs and outputs."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[Any, ...]  # dynamic sizes of the inputs, nested like the arguments of the module


def graphs(model: TrainedModel) -> dict[str, Graph]:
    """The graphs of a model by name, see GRAPHS in inference/export_settings.py."""
    from torch.export import Dim

    sizes = model.config.encoder
    # A grid of one row or column would need another program: there h * w equals h or w, which the tracer tells apart.
    batch, h, w = Dim("batch", min=1), Dim("h", min=2), Dim("w", min=2)
    tokens = Dim("tokens", min=2, max=sizes.max_tokens)
    per_token, per_patch = {0: batch, 1: tokens}, {0: batch, 1: h, 2: w}
    shapes: dict[str, Any] = dict.fromkeys(_PER_PATCH, per_patch)
    shapes |= dict.fromkeys(("words", "embedded", "word_mask"), per_token)
    return {
        "image": Graph(
            ImageGraph(model),
            ("pixel_values",),
            model.image_features,
            ({0: batch, 2: sizes.patch_size * h, 3: sizes.patch_size * w},),
        ),
        "text": Graph(
            TextGraph(model),
            ("input_ids", "attention_mask"),
            model.text_features,
            (per_token, per_token),
        ),
        "decoder": Graph(
            DecoderGraph(model),
            model.decoder_inputs,
            ("logits",),
            (tuple(shapes.get(name, {0: batch}) for name in model.decoder_inputs),),
        ),
        "restore": Graph(
            RestoreGraph(),
            ("logits", "original", "canvas", "content"),
            ("restored", "probability"),
            ({0: batch, 1: Dim("rows"), 2: Dim("columns")}, {}, {}, {}),
        ),
    }


@torch.no_grad()
def example(key: str, model: TrainedModel) -> tuple[Tensor, ...]:
    """Inputs to trace with; all sizes differ, so that the tracer does not take one for another."""
    pixels = torch.randn(2, 3, *(side * model.config.encoder.patch_size for side in (5, 7)))
    ids, attention, is_word = sentences(model, 2, 9)
    if key == "image":
        return (pixels,)
    if key == "text":
        return ids, attention
    if key == "restore":
        placement = Placement(original=(11, 13), canvas=(20, 28), content=(3, 0, 14, 28))
        return (torch.randn(2, 5, 7), *placement_tensors(placement))
    image, text = ImageGraph(model), TextGraph(model)
    values = dict(zip((*image.outputs, *text.outputs), (*image(pixels), *text(ids, attention)), strict=True))
    return tuple((values | {"word_mask": is_word})[name] for name in model.decoder_inputs)


def placement_tensors(placement: Placement) -> tuple[Tensor, Tensor, Tensor]:
    """A placement as the restore graph takes it: original (2,), canvas (2,) and content (4,), int64."""
    return torch.tensor(placement.original), torch.tensor(placement.canvas), torch.tensor(placement.content)


def sentences(
    model: TrainedModel, count: int, length: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random sentences, the n-th n tokens shorter: ids, attention mask and mask of words, all (count, length).

    The end token may be any id, so it is kept out of the words.
    """
    sizes = model.config.encoder
    ends = (length - 1 - torch.arange(count)).clamp(min=2)[:, None]
    at = torch.arange(length)
    ids = torch.randint(0, sizes.vocabulary, (count, length), generator=generator)
    if sizes.end_token is not None:
        ids = torch.where(ids == sizes.end_token, (ids + 1) % sizes.vocabulary, ids)
        ids = torch.where(at < ends, ids, sizes.end_token)
    if sizes.start_token is not None:
        ids[:, 0] = sizes.start_token
    return ids, (at <= ends).long(), (at > 0) & (at < ends)
