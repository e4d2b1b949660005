"""The items of scoring: images with all sentences of their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmmasksd.data.samples import ReferringDataset
from cmmasksd.errors import UserError
from cmmasksd.model.placement import Placement
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.towers.base import Tokens


@dataclass(frozen=True, slots=True)
class ScoringItem:
    """One image with all K sentences of its R references.

    Attributes:
        image: (3, h, w) uint8, the image on the model's canvas.
        placement: where on the canvas it lies.
        tokens: the K sentences as tokens.
        sentences: (ref_id, image_id, sent_id, sentence) of each.
        masks: (R, ceil(H * W / 8)) uint8, the masks at the original size as bits: otherwise a block of large
            photographs with many objects would not fit into memory. See `mask`.
        mask_index: (K,) int64, index of each sentence's reference in `masks`.
    """

    image: Tensor
    placement: Placement
    tokens: Tokens
    sentences: list[tuple[int, int, int, str]]
    masks: Tensor
    mask_index: Tensor

    def mask(self, sentence: int) -> Tensor:
        """The true mask of a sentence, given by its index: (H, W) bool."""
        height, width = self.placement.original
        bits = np.unpackbits(self.masks[self.mask_index[sentence]].numpy(), count=height * width)
        return torch.from_numpy(bits.view(bool).reshape(height, width))


class ScoringItems(Dataset):
    """Loads images with all sentences of all their references (training draws one sentence per reference).

    Args:
        data: the split.
        processor: processor of the model.
        groups: indices of each image's references.
    """

    def __init__(self, data: ReferringDataset, processor: CMMaskSDProcessor, groups: Sequence[Sequence[int]]) -> None:
        self.data, self.processor, self.groups = data, processor, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ScoringItem:
        references = [self.data[i] for i in self.groups[index]]
        image, placement = self.processor.image(self.data.image(references[0]))
        sentences, masks, mask_index = [], [], []
        for nth, reference in enumerate(references):
            mask = self.data.mask(reference)
            if mask.shape != placement.original:
                raise UserError(
                    f"the mask of reference {reference.ref_id} is {mask.shape}, its image {placement.original}: "
                    "they must have one size"
                )
            masks.append(torch.from_numpy(np.packbits(mask)))
            for expression in reference.expressions:
                sentences.append((reference.ref_id, reference.image_id, expression.sent_id, expression.text))
                mask_index.append(nth)
        tokens = self.processor.tokens([sentence[-1] for sentence in sentences])
        return ScoringItem(image, placement, tokens, sentences, torch.stack(masks), torch.tensor(mask_index))
