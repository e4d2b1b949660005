"""The page is self-contained, escapes what it shows, and shows the scores, curves and cards it was given."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cmmasksd.errors import UserError
from cmmasksd.evaluation.examples import Example
from cmmasksd.evaluation.protocols import ORIGINAL
from cmmasksd.evaluation.report import write_report

HOSTILE = """<script>alert(1)</script> "><img src=x onerror='alert(2)'> &amp; {style}"""
VOID = {"meta", "img", "line", "path", "polyline", "circle", "br"}


def example(iou=0.5, sentence="the left dog", size=(30, 40), sent_id=1):
    height, width = size
    truth = np.zeros(size, bool)
    truth[height // 4 : height // 2, width // 4 : width // 2] = True
    image = np.full((*size, 3), 127, np.uint8)
    return Example(image, sentence, truth, np.roll(truth, 3, axis=1), iou, sent_id=sent_id, image_id=7)


def result(split="val", **extra):
    return {
        "split": split,
        **ORIGINAL.scores([(9, 10), (30, 60)]),
        "expressions": 2,
        "protocol": ORIGINAL.as_dict(),
        **extra,
    }


def curve_rows(steps=300):
    rows = [{"step": s, "loss": 3 / (1 + s), "seg": 2 / (1 + s), "lmvsd": 0.6 / (1 + s)} for s in range(steps)]
    return [
        *rows,
        {"step": 100, "oIoU": 0.3, "mIoU": 0.25},
        {"step": 299, "oIoU": 0.5, "mIoU": 0.45},
        {"note": "no step"},
    ]


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that the tags nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def page_of(tmp_path, **given_parts):
    parts = {"title": "scenes-tiny", "results": [result()], "examples": {"best": [example()]}, **given_parts}
    text = write_report(tmp_path / "new" / "report.html", **parts).read_text(encoding="utf-8")
    return text, Page(text)


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


def test_page_is_self_contained(tmp_path):
    text, page = page_of(tmp_path, curves=curve_rows())
    assert all(attrs["src"].startswith("data:image/webp;base64,") for attrs in page.all("img"))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in page.all("meta")[2]["content"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_hostile_text_is_shown_not_run(tmp_path):
    _, page = page_of(
        tmp_path,
        title=HOSTILE,
        results=[result(split=HOSTILE, data=HOSTILE, model=HOSTILE)],
        examples={"random": [example(sentence=HOSTILE)]},
        facts={HOSTILE: HOSTILE},
    )
    assert not page.all("script")
    assert len(page.all("img")) == 2
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.texts.count(HOSTILE) >= 4
    assert HOSTILE in page.all("img")[1]["alt"]


def test_unencodable_sentence_is_written(tmp_path):
    _, page = page_of(tmp_path, examples={"best": [example(sentence="a \ud800 b \U0001f415")]})
    assert "a \ufffd b \U0001f415" in page.texts


def test_scores_stand_side_by_side(tmp_path):
    _, page = page_of(tmp_path, results=[result("val", truncated=3), result("testA")])
    cells = [text for text in page.texts if text.strip()]
    at = cells.index("oIoU")
    assert cells[at : at + 3] == ["oIoU", "mIoU", "P@0.5"]
    at = cells.index("val")
    assert cells[at : at + 4] == ["val", "55.71", "70.00", "100.00"]
    assert "val: truncated 3" in cells
    assert any(text.startswith("protocol original: threshold 0.5") for text in cells)


def test_cards_tell_all(tmp_path):
    _, page = page_of(tmp_path, examples={"best": [example(0.914)], "worst": [], "random": [example(0.0)]})
    assert [text for text in page.texts if text in ("Best", "Worst", "Random sample")] == ["Best", "Random sample"]
    assert "the left dog" in page.texts
    assert "IoU 91.4 %" in page.texts
    assert "IoU 0.0 %" in page.texts
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert page.all("img")[1]["alt"] == "Prediction and truth for: the left dog. IoU 91.4 %"


@pytest.mark.parametrize(
    ("size", "displayed"), [((30, 40), (480, 640)), ((480, 960), (320, 640)), ((2000, 3), (640, 1))]
)
def test_images_are_shown_at_a_useful_size(tmp_path, size, displayed):
    _, page = page_of(tmp_path, examples={"best": [example(size=size)]})
    plain, drawn = (decoded(attrs["src"]) for attrs in page.all("img"))
    assert plain.shape == drawn.shape == (*displayed, 3)
    assert abs(plain.astype(int) - 127).max() <= 2


def test_overlay_marks_the_prediction(tmp_path):
    _, page = page_of(tmp_path)
    drawn = decoded(page.all("img")[1]["src"]).astype(int)
    # Scene pixel (10, 21) is prediction only; enlarged sixteen times.
    red, _, blue = drawn[10 * 16 + 8, 21 * 16 + 8]
    assert blue > red + 20
    assert red > 70  # the rest is dimmed
    assert abs(drawn[-1, -1] - 57).max() <= 3


def test_curves_are_drawn_with_axes_and_legend(tmp_path):
    _, page = page_of(tmp_path, curves=curve_rows())
    lines = page.all("polyline")
    assert len(lines) == 5  # loss, seg, lmvsd; oIoU, mIoU
    assert all(len(line["points"].split()) <= 200 for line in lines)
    assert {"loss (total)", "segmentation", "LMVSD", "oIoU", "mIoU"} <= set(page.texts)
    assert "VMLSD" not in page.texts
    points = [tuple(map(float, point.split(","))) for line in lines for point in line["points"].split()]
    assert all(0 <= x <= 480 and 0 <= y <= 270 for x, y in points)
    assert any("mean of up to 2 logged values" in text for text in page.texts)


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0, "loss": 0.0}],
        [{"step": 5, "loss": 2.5}, {"step": 5, "loss": 2.5}],
        [{"step": 1, "loss": -0.3}, {"step": 2, "loss": 1e6}],
        [{"step": 1, "loss": 1e-9}, {"step": 10**7, "loss": 2e-9}],
    ],
)
def test_curves_of_odd_ranges(tmp_path, rows):
    _, page = page_of(tmp_path, curves=rows)
    points = page.all("polyline")[0]["points"].split()
    assert all(0 <= float(v) <= 480 for point in points for v in point.split(","))


def test_a_diverged_run_says_so(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": float("inf")}]
    _, page = page_of(tmp_path, curves=rows)
    assert any("2 logged values were NaN or infinite" in text for text in page.texts)
    assert page.all("polyline")[0]["points"].count(",") == 1
    _, page = page_of(tmp_path, curves=rows[1:])
    assert any("2 logged values were NaN or infinite" in text for text in page.texts)


def test_nothing_but_a_title_is_a_page_too(tmp_path):
    _, page = page_of(tmp_path, results=[], examples={})
    assert not page.all("section")


def test_sizes_that_differ_are_refused(tmp_path):
    wrong = example()
    wrong = Example(wrong.image, "a", wrong.truth, wrong.prediction[:-1], 0.1, sent_id=1, image_id=1)
    with pytest.raises(UserError, match="own size"):
        page_of(tmp_path, examples={"best": [wrong]})
    assert not (tmp_path / "new" / "report.html").exists()
