"""Drawing: exact colours where they must be, untouched pixels elsewhere, and refusals."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmmasksd.errors import UserError
from cmmasksd.inference.visualize import (
    PALETTE,
    PREDICTION_COLOR,
    TRUTH_COLOR,
    comparison,
    heat,
    inner_border,
    overlay,
)


def image_of(height=9, width=11):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def block(height=9, width=11):
    mask = np.zeros((height, width), bool)
    mask[2:7, 3:9] = True
    return mask


drawn_masks = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1)).map(
    lambda t: np.random.default_rng(t[2]).random(t[:2]) < 0.6
)


def test_overlay_blends_inside_and_leaves_the_rest():
    image, mask = image_of(), block()
    before = image.copy()
    drawn = overlay(image, mask, color=(200, 100, 0), alpha=0.25)
    expected = np.rint(0.75 * image + 0.25 * np.array([200, 100, 0])).astype(np.uint8)
    fill = mask & ~inner_border(mask, 1)
    np.testing.assert_array_equal(drawn[fill], expected[fill])
    np.testing.assert_array_equal(drawn[~mask], image[~mask])
    np.testing.assert_array_equal(image, before)
    assert drawn.dtype == np.uint8


def test_overlay_extremes():
    image, mask = image_of(), block()
    fill = mask & ~inner_border(mask, 1)
    np.testing.assert_array_equal(overlay(image, mask, alpha=0.0)[fill], image[fill])
    assert (overlay(image, mask, alpha=1.0)[mask] == PALETTE[0]).all()
    np.testing.assert_array_equal(overlay(image, np.zeros_like(mask)), image)


def test_the_border_of_an_overlay_has_the_full_colour():
    drawn = overlay(image_of(), block())
    assert (drawn[inner_border(block(), 1)] == PALETTE[0]).all()


def test_border_of_a_block_is_its_ring():
    ring = block()
    ring[3:6, 4:8] = False
    np.testing.assert_array_equal(inner_border(block(), 1), ring)


def test_border_follows_the_image_edge():
    assert inner_border(np.ones((5, 6), bool), 1).sum() == 2 * 5 + 2 * 4


@settings(max_examples=60, deadline=None)
@given(drawn_masks, st.integers(1, 4))
def test_border_is_inside_the_mask_and_grows_with_width(mask, width):
    line = inner_border(mask, width)
    assert not (line & ~mask).any()
    assert not (inner_border(mask, width) & ~inner_border(mask, width + 1)).any()
    assert line.any() == mask.any()


def test_comparison_draws_the_truth_over_the_prediction():
    image, truth, prediction = image_of(), block(), np.roll(block(), 2, axis=1)
    drawn = comparison(image, truth, prediction)
    assert (drawn[inner_border(truth, 1)] == TRUTH_COLOR).all()
    assert (drawn[2:7, 2] == 0).all()  # the rim, one pixel outside
    far = ~(truth | prediction)
    far[1:8, 2:10] = False
    np.testing.assert_array_equal(drawn[far], image[far])
    only_prediction = np.zeros_like(truth)
    only_prediction[2, 10] = True  # a corner of the prediction, away from the truth's rim
    assert (drawn[only_prediction] == PREDICTION_COLOR).all()


@settings(max_examples=30, deadline=None)
@given(drawn_masks)
def test_comparison_of_empty_masks_is_the_image(mask):
    image, nothing = image_of(*mask.shape), np.zeros_like(mask)
    np.testing.assert_array_equal(comparison(image, nothing, nothing), image)
    assert (comparison(image, mask, nothing)[inner_border(mask, 1)] == TRUTH_COLOR).all()


def test_a_line_is_thicker_on_a_large_image():
    mask = np.zeros((480, 640), bool)
    mask[100:300, 100:300] = True
    drawn = overlay(np.zeros((480, 640, 3), np.uint8), mask)
    assert (drawn[200, 100:105] == PALETTE[0]).all()
    assert (drawn[200, 105] != PALETTE[0]).any()


def test_palette_colours_differ_in_luminance_from_their_neighbours():
    # What no colour vision removes: consecutive colours are told apart in grey too.
    grey = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in PALETTE]
    assert len(set(PALETTE)) == len(PALETTE)
    assert all(abs(a - b) > 20 for a, b in itertools.pairwise(grey))


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), bool), "own size"),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8), "bool"),
        (np.zeros((4, 5, 3), np.float32), np.zeros((4, 5), bool), "uint8"),
        (np.zeros((4, 5), np.uint8), np.zeros((4, 5), bool), "RGB"),
    ],
)
def test_wrong_sizes_and_kinds_are_refused(image, mask, message):
    with pytest.raises(UserError, match=message):
        overlay(image, mask)
    with pytest.raises(UserError, match=message):
        comparison(image, mask, mask)


def test_a_wrong_alpha_is_refused():
    with pytest.raises(UserError, match="alpha"):
        overlay(image_of(), block(), alpha=1.5)


def test_heat_goes_from_dark_to_light():
    image = np.full((6, 8, 3), 100, np.uint8)
    drawn = heat(image, np.array([[0.0, 1.0], [2.0, 3.0]]), alpha=1.0)
    assert drawn.shape == image.shape
    corners = [drawn[0, 0], drawn[0, -1], drawn[-1, 0], drawn[-1, -1]]
    brightness = [float(corner @ [0.299, 0.587, 0.114]) for corner in corners]
    assert brightness == sorted(brightness)
    assert brightness[0] < 40
    assert brightness[-1] > 200
    assert (drawn[:3, :4] == drawn[0, 0]).all()


def test_heat_of_one_value_and_of_an_uneven_grid():
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    before = image.copy()
    assert heat(image, np.zeros((3, 2))).shape == image.shape
    assert np.array_equal(image, before)
    with pytest.raises(UserError, match="give"):
        heat(image.astype(float), np.zeros((2, 2)))
