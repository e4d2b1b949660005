"""`cmmasksd evaluate`: results that agree with their rows and with the data."""

import json
from pathlib import Path

import numpy as np
import pytest

from cli.commands import METRICS, SCENES, lines, main
from cmmasksd.data.readers.refer import ReferDataset
from cmmasksd.data.scenes import SceneDataset


def test_evaluate_and_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "a" / "b"
    given = ["--model", run / "best", "--data", "scenes", "--split", "testA", "--out", out, *SCENES]
    assert main("evaluate", *given) == 0
    header = capsys.readouterr().out.splitlines()[0].split()
    assert header.index("mIoU") == header.index("oIoU") + 1

    results, rows = json.loads((out / "results.json").read_text()), lines(out / "expressions.jsonl")
    data = SceneDataset("scenes", "testA", 6, seed=0, scene_size=64)
    said = {e.sent_id: (r.ref_id, r.image_id, e.text) for r in (data[i] for i in range(6)) for e in r.expressions}
    assert {row["sent_id"]: (row["ref_id"], row["image_id"], row["sentence"]) for row in rows} == said
    assert results["split"] == "testA"
    assert results["expressions"] == len(rows) == len(said)
    assert results["protocol"]["threshold"] == 0.5
    intersections, unions = ([row[key] for row in rows] for key in ("intersection", "union"))
    assert results["oIoU"] == pytest.approx(sum(intersections) / sum(unions))
    assert results["mIoU"] == pytest.approx(np.mean([row["IoU"] for row in rows]))
    assert all(0 <= results[name] <= 1 for name in METRICS)

    page = tmp_path / "page.html"
    given = ["--model", run / "best", "--results", out, "--metrics", run / "metrics.jsonl", "--out", page]
    assert main("report", *given) == 0
    assert all(name in page.read_text() for name in ("<html", "oIoU", "mIoU", "testA"))

    before = page.read_text()
    assert main("report", "--model", "scenes", "--results", out, "--out", page) == 2
    assert "holds the scores of another model" in capsys.readouterr().err
    assert page.read_text() == before


def test_a_folder_for_results_is_made_before_the_scoring(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Hours of scoring must not end in a folder that cannot be made."""

    def never(*given: object, **named: object) -> None:
        raise AssertionError("scored before the folder was made")

    import cmmasksd.evaluation.score as scoring

    monkeypatch.setattr(scoring, "evaluate", never)
    (tmp_path / "taken").write_text("a file")
    given = ["--model", run / "best", "--data", "scenes", "--split", "val", "--out", tmp_path / "taken", *SCENES]
    assert main("evaluate", *given) == 2
    assert "File exists" in capsys.readouterr().err


@pytest.mark.parametrize(("split", "count"), [("testA", 10), ("testB", 4)])
def test_real_photographs(real_data: Path, run: Path, tmp_path: Path, split: str, count: int):
    root = real_data / "refer-mini"
    given = ["--data", "refcoco", "--root", root, "--split", split, "--out", tmp_path]
    assert main("evaluate", "--model", run / "best", *given) == 0
    rows = lines(tmp_path / "expressions.jsonl")
    assert len({row["ref_id"] for row in rows}) == count
    data = ReferDataset("refcoco", root, split)
    area = {data[i].ref_id: int(data.mask(data[i]).sum()) for i in range(len(data))}
    assert all(row["union"] >= area[row["ref_id"]] >= row["intersection"] for row in rows)
