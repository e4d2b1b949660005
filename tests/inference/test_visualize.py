"""Drawing: exact colours where they must be, labels inside the image, and refusals."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmmasksd.errors import UserError
from cmmasksd.inference.visualize import (
    DIM,
    FILL,
    PALETTE,
    PREDICTION_COLOR,
    TRUTH_COLOR,
    Drawing,
    _Layout,
    comparison,
    dilated,
    font_size,
    heat,
    label_lines,
    label_text,
    line_width,
    luminance,
    opposite,
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


def test_overlay_blends_inside_and_dims_the_rest():
    image, mask = image_of(), block()
    before = image.copy()
    drawn = overlay(image, mask, color=(200, 100, 0), alpha=0.25)
    expected = np.rint(0.75 * image + 0.25 * np.array([200, 100, 0])).astype(np.uint8)
    np.testing.assert_array_equal(drawn[mask], expected[mask])
    far = ~dilated(mask, 2)
    np.testing.assert_array_equal(drawn[far], np.rint(DIM * image).astype(np.uint8)[far])
    np.testing.assert_array_equal(image, before)
    assert drawn.dtype == np.uint8


def test_overlay_extremes():
    image, mask = image_of(), block()
    np.testing.assert_array_equal(overlay(image, mask, alpha=0.0)[mask], image[mask])
    assert (overlay(image, mask, alpha=1.0)[mask] == PALETTE[0]).all()
    np.testing.assert_array_equal(overlay(image, np.zeros_like(mask)), image)


def square(height, width):
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    return mask


@pytest.mark.parametrize("size", [(32, 32), (480, 640), (200, 2000), (1500, 1000)])
def test_the_outline_is_thick_in_proportion_to_the_image_and_outside_the_mask(size):
    mask = square(*size)
    drawn = overlay(np.full((*size, 3), 90, np.uint8), mask)
    row, right = drawn[size[0] * 3 // 8], size[1] // 2
    colored = int((row[right:] == PALETTE[0]).all(1).sum())
    rim = int((row[right:] == 255).all(1).sum())
    assert (row[right : right + colored] == PALETTE[0]).all()
    assert (row[right + colored : right + colored + rim] == 255).all()
    assert 0.006 * np.sqrt(mask.size) < colored + rim < 0.07 * np.sqrt(mask.size)
    assert colored == line_width(mask)


def test_the_outline_follows_the_edges_of_the_image():
    drawn = overlay(np.full((50, 60, 3), 90, np.uint8), np.ones((50, 60), bool))
    assert (drawn == PALETTE[0]).all(2).sum() == 2 * 50 + 2 * 58


@pytest.mark.parametrize("color", PALETTE)
def test_an_outline_contrasts_with_any_grey(color):
    """The colour or the rim around it; 3 is what WCAG asks of graphics, and no pair of colours gives it everywhere."""
    greys = [luminance((value,) * 3) for value in range(256)]
    lines = [luminance(color), luminance(opposite(color))]
    contrasts = [max((max(a, b) + 0.05) / (min(a, b) + 0.05) for a in lines) for b in greys]
    assert min(contrasts) > 2.2
    assert (max(lines) + 0.05) / (min(lines) + 0.05) > 4.5


@settings(max_examples=60, deadline=None)
@given(drawn_masks, st.integers(1, 9))
def test_dilation_lies_between_the_diamond_and_the_square(mask, radius):
    rows, columns = np.indices(mask.shape)
    near = dilated(mask, radius)
    steps = np.full(mask.shape, 99)
    chess = np.full(mask.shape, 99)
    for y, x in np.argwhere(mask):
        steps = np.minimum(steps, abs(rows - y) + abs(columns - x))
        chess = np.minimum(chess, np.maximum(abs(rows - y), abs(columns - x)))
    assert near[steps <= radius].all()
    assert not near[chess > radius].any()


def test_comparison_draws_the_truth_over_the_prediction():
    image, truth = image_of(90, 110), square(90, 110)
    prediction = np.roll(truth, 20, axis=1)
    drawn = comparison(image, truth, prediction)
    assert (drawn[dilated(truth, 1) & ~truth] == TRUTH_COLOR).all()
    assert (drawn[dilated(truth, 2) & ~dilated(truth, 1)] == 0).all()
    only_prediction = prediction & ~dilated(truth, 2)
    expected = np.rint((1 - FILL) * image + FILL * np.array(PREDICTION_COLOR)).astype(np.uint8)
    np.testing.assert_array_equal(drawn[only_prediction], expected[only_prediction])
    only_truth = truth & ~dilated(prediction, 2)
    np.testing.assert_array_equal(drawn[only_truth], image[only_truth])


def test_comparison_says_that_nothing_was_found():
    image, nothing = np.full((120, 160, 3), 90, np.uint8), np.zeros((120, 160), bool)
    drawn = comparison(image, square(120, 160), nothing)
    assert (drawn > 150).all(2).sum() > 20
    found = comparison(image, square(120, 160), square(120, 160))
    assert not ((found > 150).all(2) & (found < 255).any(2)).any()


def boxes_of_labels(drawn, color):
    """(x0, y0, x1, y1) of the pixels of a colour."""
    rows, columns = np.nonzero((drawn == color).all(2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(120, 300), st.integers(120, 300)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.sampled_from(
        ["a", "the left dog", "the second hazelnut from the top", "wordwithoutanyspace" * 9, "so long " * 40]
    ),
)
def test_a_label_lies_inside_the_image_and_off_its_object(size, place, text):
    height, width = size
    mask = np.zeros(size, bool)
    y, x = round(place[0] * (height - 12)), round(place[1] * (width - 12))
    mask[y : y + 12, x : x + 12] = True
    image = np.full((height, width, 3), 90, np.uint8)
    plain, drawn = (overlay(image, mask, label=label) for label in ("", label_text(text, 0.5, 1)))
    rows, columns = np.nonzero((plain != drawn).any(2))
    lines, box_width, box_height = label_lines(label_text(text, 0.5, 1), font_size(*size), width)
    assert lines[-1].endswith("0.50")
    assert len(lines) <= 3
    left, top = columns.min(), rows.min()
    right, bottom = columns.max() + 1, rows.max() + 1
    assert right - left <= box_width
    assert bottom - top <= box_height
    assert 0 <= left < right <= width
    assert (drawn[mask] == plain[mask]).all(1).mean() > 0.9
    assert max(left - x - 12, x - right, top - y - 12, y - bottom) <= 12  # beside the object


def test_labels_do_not_cover_each_other():
    image = np.full((300, 400, 3), 90, np.uint8)
    drawing, spots = Drawing(image), []
    for nth in range(12):
        mask = np.zeros((300, 400), bool)
        mask[140:150, 180 + nth : 190 + nth] = True
        drawing.add(mask, (10 * nth, 250, 40), label=f"the dog {nth}")
    layout = _Layout(np.zeros((300, 400), bool), step=5)
    for _ in range(12):
        x, y = layout.place(90, 20, (180, 140, 190, 150), 3)
        assert 0 <= x <= 310
        assert 0 <= y <= 280
        assert all(x + 90 <= a or a + 90 <= x or y + 20 <= b or b + 20 <= y for a, b in spots)
        spots.append((x, y))
    assert drawing.finish().shape == image.shape


def test_a_label_that_no_image_can_hold_is_left_out():
    image, mask = image_of(), block()
    np.testing.assert_array_equal(overlay(image, mask, label="a star 0.50"), overlay(image, mask))


def test_a_small_image_is_enlarged_for_its_label():
    image, mask = image_of(32, 20), square(32, 20)
    drawing = Drawing(image, enlarge=True)
    drawing.add(mask, PALETTE[0], label="a star 0.50")
    assert drawing.finish().shape == (384, 240, 3)


def test_text_of_labels():
    assert label_text("the left\ndog", 0.875, 1) == "the left dog 0.88"
    assert label_text("a unicorn", None, 1).replace("\xa0", " ") == "a unicorn: not found"
    assert label_text("红色的圆", 0.5, 3) == "sentence 3 0.50"
    assert label_text("red dog 🐕🐕", 0.5, 3) == "red dog ? 0.50"
    assert label_text("café crème", 0.5, 1) in ("cafe creme 0.50", "café crème 0.50")
    assert label_text("\x00\u202e", 0.5, 2) == "sentence 2 0.50"
    assert len(label_text("x" * 10**6, 0.5, 2)) < 300


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
