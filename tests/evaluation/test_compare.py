"""Comparing two models: intervals that hold what they promise, pairing, slices, and files that do not match."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from cmmasksd.data.scenes import COLOURS, HELD_OUT, SHAPES
from cmmasksd.errors import UserError
from cmmasksd.evaluation.compare import _columns, _sums, compare, compare_results, format_comparison, slices_of
from cmmasksd.evaluation.protocols import METRIC_NAMES, ORIGINAL
from cmmasksd.evaluation.results import ExpressionScore, SplitScores, write_results


def row(sent_id, intersection, union, *, image=None, sentence="star", target=None):
    image = sent_id if image is None else image
    target = union if target is None else target
    iou = ORIGINAL.iou(intersection, union)
    return ExpressionScore(sent_id, image, sent_id, sentence, intersection, union, target, iou)


def rows_of(count, seed, *, gain=0.0, each=1):
    """Rows of union 100; `each` neighbours share an image, and with it a good part of their luck."""
    draw = random.Random(seed)
    luck = [draw.gauss(0.5, 0.15) for _ in range(count)]
    ious = [min(1.0, max(0.0, luck[i // each] + draw.gauss(gain, 0.05))) for i in range(count)]
    return [row(i, round(100 * iou), 100, image=i // each) for i, iou in enumerate(ious)]


def whole(comparisons, metric):
    (comparison,) = [row for row in comparisons if row.slice == "all" and row.metric == metric]
    return comparison


def test_the_scores_and_the_intervals_are_those_of_the_protocol():
    """With a single image every resample is the split itself, so the interval is the difference."""
    a, b = ([replace(r, image_id=1) for r in [*rows_of(60, seed), row(60, 0, 0)]] for seed in (1, 2))
    scores_a, scores_b = (ORIGINAL.scores((r.intersection, r.union) for r in rows) for rows in (a, b))
    comparisons = compare(a, b, ORIGINAL, metrics=METRIC_NAMES, resamples=200)
    for metric in METRIC_NAMES:
        comparison = whole(comparisons, metric)
        assert (comparison.a, comparison.b) == (scores_a[metric], scores_b[metric])
        interval = (comparison.low, comparison.difference, comparison.high)
        assert interval == pytest.approx([scores_b[metric] - scores_a[metric]] * 3, abs=1e-12)
        assert comparison.expressions == 61


def test_the_interval_of_a_mean_is_that_of_the_textbook():
    """For single sentences and mIoU, the bootstrap agrees with the normal interval of paired differences."""
    a, b = rows_of(800, 1), rows_of(800, 2, gain=0.01)
    comparison = whole(compare(a, b, ORIGINAL, unit="expression"), "mIoU")
    differences = np.array([y.iou - x.iou for x, y in zip(a, b, strict=True)])
    half = 1.96 * differences.std(ddof=1) / math.sqrt(800)
    assert comparison.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert comparison.high == pytest.approx(differences.mean() + half, abs=0.1 * half)


def test_pairing_finds_a_difference_that_unpaired_scores_hide():
    a = rows_of(400, 1)
    b = [replace(r, intersection=r.intersection + 1, iou=(r.intersection + 1) / 100) for r in a if r.intersection < 100]
    a = [r for r in a if r.intersection < 100]
    comparison = whole(compare(a, b, ORIGINAL), "mIoU")
    assert comparison.difference == pytest.approx(0.01)
    assert comparison.low == pytest.approx(0.01)
    assert comparison.clear


def test_a_model_does_not_differ_from_itself():
    rows = rows_of(50, 3)
    for comparison in compare(rows, rows[::-1], ORIGINAL, resamples=100):
        assert (comparison.difference, comparison.low, comparison.high) == (0, 0, 0)
        assert not comparison.clear


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Over 200 pairs of models of equal worth: the 95 % interval excludes 0 in about 5 % of them."""
    missed = 0
    for seed in range(200):
        a, b = rows_of(80, 2 * seed), rows_of(80, 2 * seed + 1)
        b = [replace(x, intersection=y.intersection, iou=y.iou) for x, y in zip(a, b, strict=True)]
        missed += whole(compare(a, b, ORIGINAL, metrics=["mIoU"], resamples=250), "mIoU").clear
    assert 2 <= missed <= 24


def test_drawing_images_is_wider_where_their_sentences_share_their_luck():
    a, b = rows_of(300, 5, each=6), rows_of(300, 6, each=6)
    width = {}
    for unit in ("image", "expression"):
        comparison = whole(compare(a, b, ORIGINAL, unit=unit, metrics=["mIoU"]), "mIoU")
        width[unit] = comparison.high - comparison.low
    assert width["image"] > 1.7 * width["expression"]


def test_the_seed_decides_the_draws():
    a, b = rows_of(40, 1), rows_of(40, 2)
    first, again, other = (compare(a, b, ORIGINAL, resamples=150, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_sums_over_an_image():
    rows = [row(0, 50, 100), row(1, 90, 100), row(2, 0, 10)]
    sums = _sums(_columns(rows, ORIGINAL), np.array([1, 1, 0]))
    assert sums[0].tolist() == [1, 0, 10, 0, 0, 0, 0, 0, 0]
    assert sums[1].tolist() == pytest.approx([2, 140, 200, 1.4, 2, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("sentence", "slices"),
    [
        ("Left guy", {"location word", "1-2 words"}),
        ("woman in red coat", {"neither", "3-5 words"}),
        ("man to the left of the bus", {"relation", "6 words or more"}),
        ("second from right", {"location word", "3-5 words"}),
        ("the cup which is behind the plate", {"relation", "6 words or more"}),
        ("leftmost star", {"location word", "1-2 words"}),
        ("a bright thing", {"neither", "3-5 words"}),  # "right" is no word of it
    ],
)
def test_slices_of_sentences(sentence, slices):
    members = slices_of([row(0, 1, 2, sentence=sentence)])
    assert {name for name, chosen in members.items() if chosen[0]} - {"all", "small objects"} == slices


def test_sentences_about_unseen_pairs():
    colour, shape = sorted(HELD_OUT)[0]
    seen = next((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)
    texts = [
        f"large {colour} {shape} top left",
        f"{colour} thing",
        " ".join(seen),
        f"{shape} beside the {colour} comparison",
    ]
    rows = [row(i, 1, 2, sentence=text) for i, text in enumerate(texts)]
    assert slices_of(rows)["unseen pair"].tolist() == [True, False, False, False]


def test_object_sizes_are_thirds_of_the_split():
    rows = [row(i, 1, 200, target=size) for i, size in enumerate(range(1, 91))]
    members = slices_of(rows)
    for name, sizes in (("small", range(1, 31)), ("medium", range(31, 61)), ("large", range(61, 91))):
        assert [r.target for r, chosen in zip(rows, members[f"{name} objects"], strict=True) if chosen] == list(sizes)


def test_a_slice_of_too_few_is_left_out():
    rows = [row(i, 1, 2, sentence="left star" if i < 19 else "red star") for i in range(60)]
    names = {comparison.slice for comparison in compare(rows, rows, ORIGINAL, resamples=100)}
    assert "location word" not in names
    assert {"all", "neither"} <= names


def test_rows_of_different_splits_are_refused():
    rows = rows_of(30, 1)
    with pytest.raises(UserError, match="1 are only in one, such as sent_id 29"):
        compare(rows, rows[:-1], ORIGINAL)
    other = [*rows[:-1], replace(rows[-1], sentence="heart")]
    with pytest.raises(UserError, match=r"expression 29 differs .*'star'.*'heart'"):
        compare(rows, other, ORIGINAL)
    with pytest.raises(UserError, match="nothing can be compared"):
        compare([], rows, ORIGINAL)


def test_files_of_two_protocols_are_refused(tmp_path):
    rows = rows_of(30, 1)
    for name, protocol in (("a", ORIGINAL), ("b", ORIGINAL), ("c", replace(ORIGINAL, comparison=">"))):
        write_results(tmp_path / name, SplitScores("val", rows, protocol))
    comparisons = compare_results(tmp_path / "a", tmp_path / "b" / "expressions.jsonl", resamples=100)
    assert comparisons == compare(rows, rows, ORIGINAL, resamples=100)
    with pytest.raises(UserError, match="different protocols"):
        compare_results(tmp_path / "a", tmp_path / "c")


def test_two_empty_masks_count_as_the_protocol_says():
    rows = [ExpressionScore(i, i, i, "star", 0, 0, 0, ORIGINAL.empty_iou) for i in range(3)]
    assert whole(compare(rows, rows, ORIGINAL, resamples=100), "oIoU").a == ORIGINAL.empty_iou


def test_the_table_shows_points_and_marks_clear_differences():
    a, b = rows_of(100, 1), rows_of(100, 1, gain=0.2)
    table = format_comparison(compare(a, b, ORIGINAL, resamples=100), ("plain", "both")).splitlines()
    assert table[0].split() == [
        "slice",
        "expressions",
        "metric",
        "plain",
        "both",
        "both",
        "-",
        "plain",
        "95%",
        "interval",
    ]
    assert table[1].startswith("all")
    assert table[1].endswith("*")
    assert "+" in table[1]
