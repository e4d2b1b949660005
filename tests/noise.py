"""A data set of images of grey noise, for tests of batches."""

from dataclasses import dataclass

import numpy as np

from cmmasksd.data.samples import Expression, Reference


@dataclass
class Noise:
    """A data set of grey noise: `counts[i]` references for image i, three sentences each."""

    counts: tuple[int, ...] = (3, 1, 2)
    mask_size: tuple[int, int] = (20, 30)
    name: str = "noise"
    split: str = "val"

    def __len__(self):
        return sum(self.counts)

    def __getitem__(self, index):
        image = next(i for i, group in enumerate(self.groups()) if index in group)
        sentences = tuple(Expression(10 * index + k, f"thing {index} word {k}") for k in range(3))
        return Reference(100 + index, image, (index,), self.split, sentences)

    def image(self, reference):
        return np.random.default_rng(reference.image_id).integers(0, 256, (20, 30, 3), np.uint8)

    def mask(self, reference):
        mask = np.zeros(self.mask_size, bool)
        mask[: 1 + reference.ref_id - 100] = True
        return mask

    def groups(self):
        ends = np.cumsum(self.counts)
        return [list(range(end - count, end)) for end, count in zip(ends, self.counts, strict=True)]
