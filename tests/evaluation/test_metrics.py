"""Scores against hand counts and torchmetrics, exact at the thresholds, the same digits however the work is split."""

import math
import os
import subprocess
import sys
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import BinaryJaccardIndex
from torchmetrics.segmentation import MeanIoU
from torchmetrics.utilities import dim_zero_cat

from cmmasksd.errors import UserError
from cmmasksd.evaluation.metrics import ReferringMetric, count
from cmmasksd.evaluation.protocols import METRIC_NAMES, ORIGINAL, ScoringProtocol

STRICT = ScoringProtocol(name="strict", comparison=">", empty_iou=0.0)

unions = st.integers(0, 640 * 640)
pairs = unions.flatmap(lambda union: st.tuples(st.integers(0, union), st.just(union)))
splits = st.lists(pairs, min_size=1, max_size=30)
few = settings(max_examples=60, deadline=None)


def metric_of(rows, **kwargs) -> ReferringMetric:
    metric = ReferringMetric(**kwargs)
    if rows:
        metric.update(*zip(*rows, strict=True))
    return metric


def numbered(split):
    return [(100 + index, *pair) for index, pair in enumerate(split)]


def masks(*rows: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in row] for row in rows])


# --- count ------------------------------------------------------------------------------------------------------------


def test_count_by_hand():
    assert count(masks("##..", "##.."), masks(".##.", ".##.")) == (2, 6)
    assert count(masks("....", "...."), masks("....", "....")) == (0, 0)
    assert count(masks("####"), masks("####")) == (4, 4)


@pytest.mark.parametrize("other", [(4, 5), (5, 4), (1, 4, 4)])
def test_count_refuses_other_shapes(other):
    with pytest.raises(UserError, match="original"):
        count(np.zeros((4, 4), bool), np.zeros(other, bool))


def test_count_refuses_integer_masks():
    # Summed part masks hold a 2, and 2 & 1 is 0: the overlap would vanish.
    with pytest.raises(TypeError, match="uint8"):
        count(np.full((2, 2), 1, np.uint8), np.full((2, 2), 2, np.uint8))


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_count_is_symmetric_and_counts_pixels(height, width, seed):
    a, b = np.random.default_rng(seed).random((2, height, width)) < 0.5
    assert count(a, b) == count(b, a) == (int((a & b).sum()), int((a | b).sum()))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    scores = metric_of([(1, 9, 10), (2, 30, 60), (3, 0, 30)]).compute()
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


# --- against torchmetrics ---------------------------------------------------------------------------------------------


@pytest.fixture
def drawn_masks():
    rng = np.random.default_rng(0)
    truth = rng.random((6, 17, 23)) < 0.2
    prediction = truth ^ (rng.random(truth.shape) < 0.1)
    return prediction, truth


def test_agrees_with_torchmetrics_jaccard(drawn_masks):
    prediction, truth = (torch.from_numpy(array) for array in drawn_masks)
    jaccard = BinaryJaccardIndex()
    per_expression = [float(jaccard(p, t)) for p, t in zip(prediction, truth, strict=True)]
    counts = [count(p, t) for p, t in zip(*drawn_masks, strict=True)]
    scores = metric_of([(i, *c) for i, c in enumerate(counts)]).compute()
    assert scores["oIoU"] == pytest.approx(float(jaccard.compute()), abs=1e-6)
    assert scores["mIoU"] == pytest.approx(float(np.mean(per_expression)), abs=1e-6)


def test_torchmetrics_mean_iou_counts_the_background(drawn_masks):
    prediction, truth = (torch.from_numpy(array).long() for array in drawn_masks)
    ours = ORIGINAL.scores(count(p, t) for p, t in zip(*drawn_masks, strict=True))["mIoU"]
    theirs = {
        background: float(MeanIoU(2, include_background=background, input_format="index")(prediction, truth))
        for background in (True, False)
    }
    assert ours == pytest.approx(theirs[False], abs=1e-6)
    assert theirs[True] > ours + 0.1  # the default, which must never be printed as RIS mIoU


# --- any order, any number of processes -------------------------------------------------------------------------------


def processes(shares) -> list[ReferringMetric]:
    """Metrics that gather from one another as processes would, through torchmetrics' own synchronisation."""
    metrics: list[ReferringMetric] = []
    for share in shares:
        metrics.append(
            metric_of(
                share,
                dist_sync_fn=lambda tensor, group: [dim_zero_cat(metric.rows) for metric in metrics],
                distributed_available_fn=lambda: True,
            )
        )
    return metrics


@few
@given(splits, st.randoms(use_true_random=False), st.integers(1, 5))
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_same_digits_for_any_order_and_number_of_processes(split, random, k):
    rows = numbered(split)
    alone = metric_of(rows)
    random.shuffle(rows)
    ranks = processes([[row for row in rows if row[0] % k == rank] for rank in range(k)])  # uneven, some empty
    for rank, metric in enumerate(ranks):
        assert metric.compute() == alone.compute() == ORIGINAL.scores(split)
        assert metric.counts() == alone.counts() == numbered(split)
        assert sum(map(len, metric.rows)) == sum(row[0] % k == rank for row in rows)  # unsynced again
    one_by_one = ReferringMetric()
    for row in rows:
        one_by_one.update(*([value] for value in row))
    assert one_by_one.compute() == alone.compute()


@few
@given(splits, st.integers(0, 30))
def test_merging_states_is_adding(split, cut):
    rows = numbered(split)
    merged, other = metric_of(rows[:cut]), metric_of(rows[cut:])
    if merged.update_called and other.update_called:
        merged.merge_state(other)
        assert merged.compute() == metric_of(rows).compute()


SHARED = [(sent_id, sent_id % 7, 7 + sent_id % 3) for sent_id in range(11)]


def score_as_rank(rank: int, meeting_point: str) -> list:
    """What one of two processes computes over gloo: uneven shares, then one process without any expression."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2, timeout=timedelta(seconds=90)
    )
    try:
        metrics = [metric_of(shares[rank]) for shares in ((SHARED[:8], SHARED[8:]), (SHARED, []), ([], SHARED))]
        return [(metric.compute(), metric.counts()) for metric in metrics]
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_two_real_processes_give_the_digits_of_one(tmp_path):
    meeting_point = str(tmp_path / "meet")
    code = "import test_metrics, sys; print(test_metrics.score_as_rank(1, sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", code, meeting_point]
    search = os.pathsep.join([str(Path(__file__).parent), *map(os.path.abspath, sys.path)])
    environment = {**os.environ, "PYTHONPATH": search}
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        here = score_as_rank(0, meeting_point)
        there, _ = other.communicate(timeout=90)
    finally:
        other.kill()
    assert here == [(metric_of(SHARED).compute(), SHARED)] * 3
    assert there.strip() == repr(here)


def test_reset_forgets_everything():
    metric = metric_of([(1, 1, 2)])
    metric.reset()
    assert metric.counts() == []
    metric.update([1], [1, 1][:1], [4])
    assert metric.compute()["mIoU"] == 0.25


def test_forward_scores_the_batch_and_keeps_it():
    metric = ReferringMetric()
    assert metric([1], [1], [2])["mIoU"] == 0.5
    assert metric(torch.tensor([2]), torch.tensor([1]), torch.tensor([4]))["mIoU"] == 0.25
    assert metric.compute()["mIoU"] == 0.375
    assert metric.counts() == [(1, 1, 2), (2, 1, 4)]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_expression_counted_twice_is_refused_within_and_across_processes():
    with pytest.raises(UserError, match="expression 7 was scored twice"):
        metric_of([(7, 1, 2), (8, 1, 2), (7, 1, 2)]).compute()
    padded = processes([[(1, 1, 2), (2, 1, 3)], [(3, 1, 4), (1, 1, 2)]])  # the sampler began again at the front
    with pytest.raises(UserError, match="expression 1 was scored twice"):
        padded[0].compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_no_expression_is_refused():
    with pytest.raises(UserError, match="no expression"):
        ReferringMetric().compute()


@pytest.mark.parametrize("row", [(1, 3, 2), (1, -1, 2)])
def test_impossible_counts_are_refused(row):
    with pytest.raises(ValueError, match="intersection <= union"):
        metric_of([row])


def test_fractional_counts_are_refused():
    with pytest.raises(TypeError, match="integers"):
        metric_of([(1, 0.5, 2)])


def test_large_sums_are_exact():
    # 2**24 + 1 is the first integer that float32 states lose.
    assert metric_of([(1, 2**24 + 1, 2**25), (2, 2**53 + 1, 2**54)]).counts()[1][1] == 2**53 + 1
