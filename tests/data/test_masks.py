"""Masks: parity with pycocotools, union of parts (trap 4), RLE in all its forms (trap 5), exact outlines."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from cmmasksd.data.masks import decode_segmentation, mask_to_box, mask_to_polygons, mask_to_rle
from cmmasksd.errors import UserError

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))
TRIANGLE = [2.3, 1.1, 17.7, 4.9, 6.2, 18.4]
SQUARE = [10.0, 10.0, 19.0, 10.0, 19.0, 19.0, 10.0, 19.0]


def disk(size: int, radius: float, y: float, x: float) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def run_lengths(mask: np.ndarray) -> list[int]:
    """The uncompressed counts by hand: runs down the columns, background first."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


@pytest.fixture(autouse=True)
def _silence_would_hide_warnings():
    """Decoding must not warn at all: pycocotools' own decode does, once per mask, under NumPy 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------------------------------------------------- polygons


def coco_decode(rle) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco.decode(rle).astype(bool)


def test_polygon_matches_pycocotools_to_the_pixel():
    ours = decode_segmentation([TRIANGLE], 20, 24)
    assert ours.shape == (20, 24)
    assert ours.dtype == bool
    assert ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, coco_decode(coco.frPyObjects([TRIANGLE], 20, 24))[..., 0])
    assert 80 < ours.sum() < 160


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 30), min_size=6, max_size=12).filter(lambda p: len(p) % 2 == 0), min_size=1))
def test_any_polygons_match_pycocotools(polygons):
    parts = coco_decode(coco.frPyObjects(polygons, 20, 24))
    np.testing.assert_array_equal(decode_segmentation(polygons, 20, 24), parts.any(axis=-1))


def test_polygons_of_real_images_match_pycocotools(real_data):
    count = 0
    for name in ("refer-mini", "refer-coco128"):
        instances = json.loads((real_data / name / "refcoco" / "instances.json").read_text())
        sizes = {image["id"]: (image["height"], image["width"]) for image in instances["images"]}
        for annotation in instances["annotations"]:
            polygons, size = annotation["segmentation"], sizes[annotation["image_id"]]
            if isinstance(polygons, list):
                theirs = coco.merge(coco.frPyObjects(polygons, *size))
                ours = decode_segmentation(polygons, *size)
                assert mask_to_rle(ours)["counts"].encode() == theirs["counts"]
                count += len(polygons)
    assert count > 900


def test_overlapping_parts_are_united_not_summed():
    parts = coco_decode(coco.frPyObjects([TRIANGLE, SQUARE, SQUARE], 20, 20))
    assert parts.sum(axis=-1).max() == 3, "the parts overlap, so that a sum would show"
    ours = decode_segmentation([TRIANGLE, SQUARE, SQUARE], 20, 20)
    assert ours[15, 15]
    np.testing.assert_array_equal(ours, parts.any(axis=-1))


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([], "empty"),
        (None, "expected a list of polygons or an RLE dict"),
        ("3 4 5", "expected a list of polygons or an RLE dict"),
        (TRIANGLE, "expected a flat list of numbers"),  # not nested
        ([[]], "polygon"),
        ([[1, 2, 3, 4]], "4 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "7 numbers"),
        ([TRIANGLE, [1, 2, 3, 4]], "4 numbers"),
        ([["1", "2", "3", "4", "5", "6"]], "expected a flat list of numbers"),
        ([[1, 2, 3, 4, 5, None]], "expected a flat list of numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "expected a flat list of numbers"),
        ([[1, [2], 3, 4, 5, 6]], "expected a flat list of numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "pixel coordinates"),
        ([[1, 2, 3, 4, 5, float("inf")]], "pixel coordinates"),
        ([[1, 2, 3, 4, 5, 1e9]], "pixel coordinates"),  # pycocotools would ask for 40 GB
    ],
)
def test_malformed_polygons_are_named(segmentation, says):
    with pytest.raises(UserError, match=says):
        decode_segmentation(segmentation, 20, 20)


# ------------------------------------------------------------------------------------------------------------------ RLE


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_rle_round_trip_in_every_notation(mask):
    height, width = mask.shape
    packed = json.loads(json.dumps(mask_to_rle(mask)))
    np.testing.assert_array_equal(decode_segmentation(packed, height, width), mask)
    np.testing.assert_array_equal(coco_decode(packed), mask)
    as_bytes = {"size": packed["size"], "counts": packed["counts"].encode()}
    np.testing.assert_array_equal(decode_segmentation(as_bytes, height, width), mask)
    by_hand = {"size": [height, width], "counts": run_lengths(mask)}
    np.testing.assert_array_equal(decode_segmentation(by_hand, height, width), mask)


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_rle_is_that_of_pycocotools(mask):
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert mask_to_rle(mask) == {"size": list(mask.shape), "counts": theirs["counts"].decode()}


@settings(max_examples=300, deadline=None)
@given(MASKS, st.integers(0, 30), st.text(max_size=3) | st.text("0123PQRS?@no", max_size=3))
def test_a_changed_rle_is_a_mask_or_one_error(mask, place, text):
    """pycocotools aborts the process, or returns memory of others."""
    rle = mask_to_rle(mask)
    place %= len(rle["counts"]) + 1
    changed = {**rle, "counts": rle["counts"][:place] + text + rle["counts"][place + len(text) :]}
    try:
        decoded = decode_segmentation(changed, *mask.shape)
    except UserError as error:
        assert "cut short, or do not add up" in str(error)  # noqa: PT017
    else:
        assert decoded.shape == mask.shape
        np.testing.assert_array_equal(decoded, coco_decode(changed))


def test_rle_of_a_large_image_has_long_runs():
    mask = np.zeros((700, 900), dtype=bool)
    mask[100:650, 300:800] = ~disk(550, 200, 275, 275)[:, :500]
    np.testing.assert_array_equal(decode_segmentation(mask_to_rle(mask), 700, 900), mask)


def test_crowd_rle_decodes_to_hand_counted_pixels():
    crowd = {"size": [3, 4], "counts": [4, 3, 2, 1, 2]}
    expected = [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]  # run down the columns: 4 off, 3 on, 2 off, 1 on, 2 off
    np.testing.assert_array_equal(decode_segmentation(crowd, 3, 4), np.array(expected, dtype=bool))


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ({"size": [4, 3], "counts": [12]}, r"expected size \[3, 4\]"),  # width first
        ({"size": [6, 8], "counts": [48]}, r"expected size \[3, 4\]"),
        ({"size": None, "counts": [12]}, "expected size"),
        ({"size": [3, 4]}, "lacks 'size' or 'counts'"),
        ({"counts": [12]}, "lacks 'size' or 'counts'"),
        ({"size": [3, 4], "counts": None}, "expected a list of whole numbers"),
        ({"size": [3, 4], "counts": [4.0, 8.0]}, "expected a list of whole numbers"),
        ({"size": [3, 4], "counts": ["12"]}, "expected a list of whole numbers"),
        ({"size": [3, 4], "counts": [11]}, "do not add up to the 12 pixels"),
        ({"size": [3, 4], "counts": [5, 8]}, "do not add up"),
        ({"size": [3, 4], "counts": [-2, 14]}, "do not add up"),
        ({"size": [3, 4], "counts": [2**63 - 1, 2**63 - 1, 14]}, "do not add up"),  # wraps round to 12
        ({"size": [3, 4], "counts": "5"}, "do not add up"),  # pycocotools returns uninitialised memory
        ({"size": [3, 4], "counts": ""}, "cut short"),
        ({"size": [3, 4], "counts": "o"}, "cut short"),  # says "more follow", and pycocotools reads on past the end
        ({"size": [3, 4], "counts": "<o"}, "cut short"),
        ({"size": [3, 4], "counts": "\x00\xff"}, "cut short"),
        ({"size": [3, 4], "counts": "\xff"}, "cut short"),
        ({"size": [3, 4], "counts": "o" * 50 + "0"}, "cut short"),
    ],
)
def test_malformed_rle_is_named(rle, says):
    with pytest.raises(UserError, match=says):
        decode_segmentation(rle, 3, 4)


# ------------------------------------------------------------------------------------------------- masks -> polygons


@settings(max_examples=200, deadline=None)
@given(MASKS.filter(np.any))
def test_outlines_decode_to_the_very_mask(mask):
    polygons = json.loads(json.dumps(mask_to_polygons(mask)))
    np.testing.assert_array_equal(decode_segmentation(polygons, *mask.shape), mask)
    parts = coco_decode(coco.frPyObjects(polygons, *mask.shape))
    np.testing.assert_array_equal(parts.sum(axis=-1), mask, err_msg="parts must not overlap")


def four_connected_parts(mask: np.ndarray) -> int:
    left, parts = {(int(y), int(x)) for y, x in np.argwhere(mask)}, 0
    while left:
        parts, front = parts + 1, [left.pop()]
        while front:
            y, x = front.pop()
            beside = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= beside
            front += beside
    return parts


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_one_polygon_per_part_with_its_area(mask):
    polygons = mask_to_polygons(mask)
    assert len(polygons) == four_connected_parts(mask)
    area = 0.0
    for polygon in polygons:
        x, y = np.array(polygon[::2]), np.array(polygon[1::2])
        area += (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
        corners = np.stack([x, y], axis=1)
        ahead, behind = np.roll(corners, -1, axis=0) - corners, corners - np.roll(corners, 1, axis=0)
        assert (np.sign(ahead) != np.sign(behind)).any(axis=1).all(), "a point on a straight line"
        assert ((ahead == 0).sum(axis=1) == 1).all(), "an edge that is not along the pixels, or has no length"
    assert area == mask.sum()


def test_outline_of_a_rectangle_is_its_four_corners():
    mask = np.zeros((9, 11), dtype=bool)
    mask[2:5, 3:10] = True
    assert mask_to_polygons(mask) == [[3.0, 2.0, 10.0, 2.0, 10.0, 5.0, 3.0, 5.0]]


@pytest.mark.parametrize(
    "mask",
    [
        disk(40, 8, 20, 20),
        disk(40, 8, 3, 37),  # cut by the border
        disk(40, 8, 20, 20) & ~(abs(np.arange(40) - 20) < 3),  # hidden in the middle: two parts
        disk(128, 40, 64, 64) & ~disk(128, 20, 60, 70),  # one hole
        disk(128, 60, 64, 64) & ~disk(128, 50, 64, 64) | disk(128, 30, 64, 64) & ~disk(128, 10, 64, 64),  # rings
        disk(128, 60, 64, 64)
        & ~disk(128, 9, 40, 64)
        & ~disk(128, 9, 64, 64)
        & ~disk(128, 9, 90, 64),  # column of holes
        np.indices((16, 16)).sum(axis=0) % 2 == 0,  # pixels that meet at corners only
        np.ones((1, 1), dtype=bool),
    ],
    ids=["small disk", "at the border", "occluded", "ring", "rings in rings", "holes", "checkerboard", "one pixel"],
)
def test_outlines_of_shapes_are_exact(mask):
    np.testing.assert_array_equal(decode_segmentation(mask_to_polygons(mask), *mask.shape), mask)


@given(MASKS.filter(np.any))
def test_a_box_holds_the_mask_and_touches_it_on_all_sides(mask):
    x0, y0, x1, y1 = mask_to_box(mask) or (0, 0, 0, 0)
    inside = mask[y0:y1, x0:x1]
    assert inside.sum() == mask.sum()
    assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_empty_mask():
    empty = np.zeros((5, 7), dtype=bool)
    assert mask_to_polygons(empty) == []
    assert mask_to_box(empty) is None
    assert not decode_segmentation(mask_to_rle(empty), 5, 7).any()


@pytest.mark.parametrize("mask", [np.full((4, 4), 255, dtype=np.uint8), np.ones((1, 4, 4), dtype=bool)])
@pytest.mark.parametrize("encode", [mask_to_box, mask_to_rle, mask_to_polygons])
def test_only_boolean_masks_are_encoded(mask, encode):
    with pytest.raises(TypeError, match="bool"):
        encode(mask)
