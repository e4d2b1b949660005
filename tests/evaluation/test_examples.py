"""Examples of a report: chosen by rows and seed alone, and predicted again on the data that was scored."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmmasksd.errors import UserError
from cmmasksd.evaluation.examples import choose_examples, collect_examples
from cmmasksd.evaluation.results import ExpressionScore


def scored(ious):
    return [ExpressionScore(1, 1, 10 + n, "a", n, n, n, iou) for n, iou in enumerate(ious)]


def test_best_and_worst():
    chosen = choose_examples(scored([0.5, 0.1, 0.9, 0.3]), 2)
    assert chosen["best"] == [12, 10]
    assert chosen["worst"] == [11, 13]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=30), st.integers(0, 8), st.randoms(use_true_random=False))
def test_choice_depends_on_rows_and_seed_only(ious, n, order):
    rows = scored(ious)
    chosen = choose_examples(rows, n, seed=3)
    order.shuffle(rows)
    assert choose_examples(rows, n, seed=3) == chosen
    iou_of = {row.sent_id: row.iou for row in rows}
    above = [iou for iou in ious if iou > 0]
    for kind, most in (("best", len(above)), ("worst", len(rows)), ("random", len(rows))):
        assert len(set(chosen[kind])) == len(chosen[kind]) == min(n, most)
    assert sorted((iou_of[i] for i in chosen["best"]), reverse=True) == sorted(above, reverse=True)[:n]
    assert [iou_of[i] for i in chosen["worst"]] == sorted(ious)[:n]


def test_ties_and_samples_follow_the_seed():
    rows = scored([0.0] * 200)
    picks = {seed: choose_examples(rows, 5, seed) for seed in (0, 1)}
    assert picks[0] == choose_examples(rows, 5, 0)
    assert picks[0]["random"] != picks[1]["random"]
    assert picks[0]["worst"] != picks[1]["worst"]
    assert max(picks[0]["worst"]) > 20  # not simply the first ones


def test_expressions_of_other_data_are_refused():
    class Nothing:
        name, split = "scenes", "val"

        def __len__(self):
            return 0

    with pytest.raises(UserError, match="scenes val has no expression 7"):
        collect_examples(Nothing(), None, {"best": [9, 7]})
