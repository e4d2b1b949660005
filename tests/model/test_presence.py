"""Presence: by hand, equal in torch and numpy, differentiable, in full precision, sure at any size of the object."""

import numpy as np
import pytest
import torch

from cmmasksd.model.presence import presence, presence_numpy


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16), (17, 31), (56, 56), (80, 120)])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_mean_of_the_most_probable_cells_by_hand(size, scale):
    logits = torch.randn(3, *size, generator=torch.Generator().manual_seed(0)) * scale
    count = max(1, size[0] * size[1] // 256)
    expected = [np.mean(sorted(torch.sigmoid(cells.double()).flatten().tolist())[-count:]) for cells in logits]
    with np.errstate(all="raise", under="ignore"):
        values = presence_numpy(logits.numpy())
    assert presence(logits).dtype == torch.float32
    assert values.dtype == np.float32
    assert presence(logits).tolist() == pytest.approx(expected, abs=1e-6)
    assert values.tolist() == pytest.approx(expected, abs=1e-6)


def test_an_object_of_few_cells_counts_as_much_as_a_large_one():
    logits = torch.full((2, 64, 64), -9.0)
    logits[0, :4, :4] = 9.0  # 16 cells of 4096
    logits[1, :40, :40] = 9.0
    small, large = presence(logits).tolist()
    assert small == large > 0.999
    assert presence(torch.full((1, 64, 64), -9.0)).item() < 0.001


def test_gradient_reaches_the_counted_cells_alone():
    logits = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    presence(logits).sum().backward()
    assert logits.grad is not None
    assert (logits.grad != 0).flatten(1).sum(1).tolist() == [4, 4]
    assert (logits.grad >= 0).all()


def test_half_precision_is_summed_in_float32():
    logits = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(presence(logits), presence(logits.float()), rtol=0, atol=0)
