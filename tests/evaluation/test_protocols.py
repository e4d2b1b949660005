"""The rules of scoring: every score by hand, exact where floats are not, and a protocol that cannot be nonsense."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmmasksd.errors import UserError
from cmmasksd.evaluation.protocols import METRIC_NAMES, ORIGINAL, ScoringProtocol

STRICT = ScoringProtocol(name="strict", comparison=">", empty_iou=0.0)

unions = st.integers(0, 640 * 640)
pairs = unions.flatmap(lambda union: st.tuples(st.integers(0, union), st.just(union)))
splits = st.lists(pairs, min_size=1, max_size=30)
few = settings(max_examples=60, deadline=None)


def test_scores_by_hand():
    scores = ORIGINAL.scores([(9, 10), (30, 60), (0, 30)])
    assert list(scores) == list(METRIC_NAMES)
    assert all(type(value) is float for value in scores.values())
    assert scores["oIoU"] == 39 / 100
    assert scores["mIoU"] == math.fsum([0.9, 0.5, 0.0]) / 3
    assert [scores[f"P@0.{x}"] for x in (5, 6, 7, 8, 9)] == [2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3]


@pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
@pytest.mark.parametrize("scale", [1, 3, 7, 10**6 + 3])
def test_an_iou_of_exactly_x_is_decided_by_the_protocol(tenths, scale):
    at, below, above = [(tenths * scale + step, 10 * scale) for step in (0, -1, 1)]
    name = f"P@0.{tenths}"
    assert ORIGINAL.scores([at])[name] == 1.0
    assert STRICT.scores([at])[name] == 0.0
    for protocol in (ORIGINAL, STRICT):
        assert protocol.scores([below])[name] == 0.0
        assert protocol.scores([above])[name] == 1.0


def test_float_comparison_would_have_been_wrong():
    # CRIS compares with torch.arange's float32 thresholds; 7/10 in float32 is below 0.7 in float64.
    assert float(np.float32(7) / np.float32(10)) < 0.7
    assert ORIGINAL.scores([(7, 10)])["P@0.7"] == 1.0


@pytest.mark.parametrize(("protocol", "worth"), [(ORIGINAL, 1.0), (STRICT, 0.0)])
def test_empty_pairs_follow_the_protocol(protocol, worth):
    assert set(protocol.scores([(0, 0)]).values()) == {worth}
    scores = protocol.scores([(0, 0), (1, 4)])
    assert scores["oIoU"] == 0.25  # an empty pair adds no pixels
    assert scores["mIoU"] == (worth + 0.25) / 2
    assert scores["P@0.9"] == worth / 2


def test_a_false_alarm_on_an_empty_truth_is_zero():
    assert set(ORIGINAL.scores([(0, 5)]).values()) == {0.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 1.5}, {"threshold": math.nan}, {"threshold": "0.5"}, {"threshold": None}, {"threshold": True},
        {"comparison": "=="}, {"comparison": []}, {"empty_iou": 0.5}, {"empty_iou": True}, {"empty_iou": math.nan},
        {"frame": "squash480"}, {"frame": ["original"]}, {"expressions": "first"}, {"expressions": None},
    ],
)  # fmt: skip
def test_protocol_refuses_nonsense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ScoringProtocol(name="wrong", **wrong)


def test_protocol_as_dict_round_trips():
    assert ScoringProtocol(**STRICT.as_dict()) == STRICT


@few
@given(splits)
def test_scores_are_the_rounded_exact_fractions(split):
    scores = ORIGINAL.scores(split)
    ious = [Fraction(i, u) if u else Fraction(1) for i, u in split]
    assert scores["mIoU"] == pytest.approx(float(sum(ious) / len(ious)), rel=1e-14)
    for tenths in (5, 6, 7, 8, 9):
        assert scores[f"P@0.{tenths}"] == sum(iou >= Fraction(tenths, 10) for iou in ious) / len(ious)
    assert min(ious) <= scores["mIoU"] * (1 + 1e-15)
    assert scores["mIoU"] <= max(ious) * (1 + Fraction(1, 10**15))
    assert all(0.0 <= value <= 1.0 for value in scores.values())
    precisions = [scores[f"P@0.{tenths}"] for tenths in (5, 6, 7, 8, 9)]
    assert precisions == sorted(precisions, reverse=True)


@few
@given(splits, st.randoms(use_true_random=False))
def test_the_digits_do_not_depend_on_the_order(split, random):
    shuffled = random.sample(split, len(split))
    assert ORIGINAL.scores(shuffled) == ORIGINAL.scores(split)


def test_no_expression_is_refused():
    with pytest.raises(UserError, match="no expression"):
        ORIGINAL.scores([])


def test_large_sums_are_exact():
    """2**53 + 1 is the first whole number that a float loses."""
    scores = ORIGINAL.scores([(2**53 + 1, 2**54), (0, 2)])
    assert scores["oIoU"] == 0.5
