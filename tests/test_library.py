"""The public functions as a library user calls them: paths are text or `Path`."""

import json
from pathlib import Path

from PIL import Image

import cmmasksd
from cmmasksd import ScoreConfig
from cmmasksd.inference.predict import Prediction, predict
from cmmasksd.inference.sources import find_sources


def test_paths_may_be_text(tiny_model_folder: Path, tmp_path: Path):
    model, scored, page = str(tiny_model_folder), str(tmp_path / "scored"), str(tmp_path / "page.html")
    scores = cmmasksd.score(ScoreConfig("scenes", "val", references=4, model=model), scored)
    assert json.loads((tmp_path / "scored" / "results.json").read_text())["mIoU"] == scores.scores["mIoU"]
    comparison, *_ = cmmasksd.compare_results(scored, f"{scored}/expressions.jsonl", resamples=20)
    assert comparison.a == comparison.b
    assert cmmasksd.report(model, [scored], page) == Path(page)
    card = tmp_path / "card.md"
    card.write_text("# Mine\n", encoding="utf-8")
    cmmasksd.publish(model, str(tmp_path / "published"), results=[scored], card=str(card))
    assert (tmp_path / "published" / "README.md").read_text() == "# Mine\n"


def test_predict_yields_one_prediction_per_sentence(tiny_model_folder: Path, tmp_path: Path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    segmenter = cmmasksd.Segmenter.from_pretrained(str(tiny_model_folder))
    predictions = list(predict(segmenter, find_sources(str(tmp_path / "a.png"), ["left", "right"])))
    assert [isinstance(each, Prediction) and each.segmentation.text for each in predictions] == ["left", "right"]
