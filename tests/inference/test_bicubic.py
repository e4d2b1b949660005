"""The bicubic resize in numpy against torch's; whole canvases are compared in test_onnx.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmmasksd.inference.bicubic import resize_bicubic


@pytest.mark.parametrize("size", [(64, 96), (97, 40), (5, 200), (1, 1), (31, 2)])
def test_equal_to_torch(size: tuple[int, int]):
    image = np.random.default_rng(0).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    expected = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)
    np.testing.assert_array_equal(resize_bicubic(image, *size), expected[0].permute(1, 2, 0).numpy())


def test_enlarging_by_far_keeps_white_white():
    assert (resize_bicubic(np.full((2, 3, 3), 255, np.uint8), 301, 77) == 255).all()
