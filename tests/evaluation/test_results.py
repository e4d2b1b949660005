"""The result files: a round trip, every score recomputable from the rows, and refusals of what would mislead."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmmasksd.errors import UserError
from cmmasksd.evaluation.protocols import METRIC_NAMES, ORIGINAL, ScoringProtocol
from cmmasksd.evaluation.results import ExpressionScore, SplitScores, read_expressions, read_results, write_results
from cmmasksd.evaluation.tables import format_table


def expression(sent_id, intersection, union, sentence="the dog", protocol=ORIGINAL, ref_id=5):
    return ExpressionScore(ref_id, 9, sent_id, sentence, intersection, union, union, protocol.iou(intersection, union))


def scores_of(rows, protocol=ORIGINAL):
    return protocol.scores((row.intersection, row.union) for row in rows)


ROWS = [
    expression(2, 30, 60, "linkes Schaf, große Ohren"),
    expression(1, 9, 10, 'the "red" \u2028 one'),
    expression(3, 0, 0),
]


def write(out, rows=ROWS, split="val", protocol=ORIGINAL, **extra):
    return write_results(out, SplitScores(split, rows, protocol, extra))


def test_round_trip(tmp_path):
    path = write(tmp_path / "new" / "val", data="refcoco", truncated=4)
    results = read_results(path)
    assert results == read_results(path.parent)
    assert list(results)[:8] == ["split", *METRIC_NAMES]
    assert results["split"] == "val"
    assert results["expressions"] == 3
    assert (results["data"], results["truncated"]) == ("refcoco", 4)
    assert ScoringProtocol(**results["protocol"]) == ORIGINAL
    assert {name: results[name] for name in METRIC_NAMES} == scores_of(ROWS)
    assert read_expressions(path.parent) == sorted(ROWS, key=lambda row: row.sent_id)


def test_the_files_read_without_this_package(tmp_path):
    write(tmp_path)
    lines = (tmp_path / "expressions.jsonl").read_bytes().decode("utf-8").rstrip("\n").split("\n")
    first = json.loads(lines[0])
    assert list(first) == ["ref_id", "image_id", "sent_id", "sentence", "intersection", "union", "target", "IoU"]
    assert first["IoU"] == 0.9
    assert "große" in lines[1]  # readable, not escaped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expressions.jsonl", "results.json"]  # no temporaries


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.text()), min_size=1, max_size=12))
def test_every_score_can_be_computed_again_from_the_rows(tmp_path, triples):
    rows = [expression(n, min(a, b), max(a, b), text) for n, (a, b, text) in enumerate(triples)]
    path = write(tmp_path, rows)
    again = read_expressions(tmp_path)
    assert again == rows
    results = read_results(path)
    assert scores_of(again) == {name: results[name] for name in METRIC_NAMES}


def test_a_lone_surrogate_survives(tmp_path):
    rows = [expression(1, 1, 2, "broken \ud800 text")]
    write(tmp_path, rows)
    assert read_expressions(tmp_path) == rows


def test_the_scores_follow_from_the_rows(tmp_path):
    result = SplitScores("val", ROWS, ORIGINAL, {"data": "refcoco"})
    assert result.scores == scores_of(ROWS)
    assert [row.sent_id for row in result.rows] == [1, 2, 3]
    assert read_results(write_results(tmp_path, result)) == result.as_dict()


def test_an_iou_that_does_not_follow_from_its_counts_is_not_written(tmp_path):
    wrong = ExpressionScore(1, 1, 1, "a", 1, 2, 2, 0.7)
    with pytest.raises(ValueError, match="does not follow"):
        write(tmp_path, [wrong])
    assert list(tmp_path.iterdir()) == []


def test_duplicates_taken_keys_and_empty_splits_are_refused(tmp_path):
    with pytest.raises(UserError, match="twice"):
        write(tmp_path, [ROWS[0], ROWS[0]])
    with pytest.raises(ValueError, match="mIoU"):
        write(tmp_path, mIoU=1.0)
    with pytest.raises(UserError, match="no expression"):
        write(tmp_path, [])


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = write(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write(tmp_path, extra_value=float("nan"))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expressions.jsonl", "results.json"]


def test_unreadable_files_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_results(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_expressions(tmp_path)
    (tmp_path / "results.json").write_text('{"split": "val", "IoU": 0.5}')
    with pytest.raises(UserError, match="oIoU"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"split": ')
    with pytest.raises(UserError, match="not JSON"):
        read_results(tmp_path)
    (tmp_path / "expressions.jsonl").write_text('{"sent_id": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        read_expressions(tmp_path)


def test_an_iou_that_its_counts_contradict_is_refused(tmp_path):
    write(tmp_path)
    file = tmp_path / "expressions.jsonl"
    file.write_text(file.read_text().replace('"IoU": 0.9', '"IoU": 0.99'))
    with pytest.raises(UserError, match="line 1, is not an expression's row"):
        read_expressions(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("scene_size", 10**9), ("references", 2**62)])
def test_sizes_that_no_scoring_has_are_refused(tmp_path, key, value):
    """The report would generate the scenes again."""
    write(tmp_path, **{key: value})
    with pytest.raises(UserError, match=f"{key} is {value}"):
        read_results(tmp_path)


def test_table_has_both_means_side_by_side(tmp_path):
    results = [read_results(write(tmp_path / split, split=split)) for split in ("val", "testA")]
    assert format_table(results).split("\n") == [
        "split   oIoU   mIoU   P@0.5  P@0.6  P@0.7  P@0.8  P@0.9  expressions",
        "-----  -----  -----  ------  -----  -----  -----  -----  -----------",
        "val    55.71  80.00  100.00  66.67  66.67  66.67  66.67            3",
        "testA  55.71  80.00  100.00  66.67  66.67  66.67  66.67            3",
        "protocol original: threshold 0.5, comparison >=, frame original, empty_iou 1.0, expressions all",
    ]


def test_table_names_data_sets_and_tells_protocols_apart(tmp_path):
    strict = ScoringProtocol(name="strict", comparison=">", empty_iou=0.0)
    rows = [expression(1, 1, 2, protocol=strict)]
    results = [
        read_results(write(tmp_path / "a", rows, data="refcoco")),
        read_results(write(tmp_path / "b", rows, protocol=strict, data="refcoco+")),
    ]
    lines = format_table(results).split("\n")
    assert lines[2].split()[:5] == ["refcoco", "val", "50.00", "50.00", "100.00"]
    assert lines[3].split()[:5] == ["refcoco+", "val", "50.00", "50.00", "0.00"]
    assert lines[4].endswith("(refcoco val)")
    assert lines[5].startswith("protocol strict: ")
    assert lines[5].endswith("(refcoco+ val)")


def test_reading_and_reporting_need_no_torch():
    code = (
        "import sys; import cmmasksd.evaluation.protocols, cmmasksd.evaluation.results, cmmasksd.evaluation.report,"
        " cmmasksd.evaluation.compare, cmmasksd.inference.visualize; print({'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "set()"
