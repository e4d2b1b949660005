"""`predict`: sources to predictions, with a segmenter that only counts. The command: tests/cli/test_predict.py."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmmasksd.inference.base import BaseSegmenter, Encoded
from cmmasksd.inference.predict import Failure, Prediction, Unit, predict
from cmmasksd.inference.rows import json_row
from cmmasksd.inference.sources import Source
from cmmasksd.model.placement import Placement, place

VALUES = ["text", "score", "presence", "present", "area", "box", "size", "rle"]


class Counting(BaseSegmenter):
    """Takes the whole image for every sentence, and counts how often it encodes one."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.encoded = 0

    def canvas(self, image: np.ndarray) -> tuple[None, Placement]:
        return None, place(*image.shape[:2], canvas=(8, 8), resize="warp")

    def encode_images(self, canvases: list[None]) -> None:
        self.encoded += len(canvases)

    def encode_texts(self, texts: list[str]) -> tuple[None, None]:
        return None, None

    def restored(self, encoded: Encoded, part: slice) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        for owner in encoded.owner[part]:
            ones = np.ones(encoded.placements[owner].original, "float32")
            yield ones, ones, 1.0


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """Two neighbouring sources about one image, an animation, and a missing file twice."""
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    frames = [Image.new("L", (4, 3), value) for value in (0, 90, 200)]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    asked = [("a.png", "x", "y"), ("a.png", "z"), ("absent.png", "x"), ("b.gif", "x", "y"), ("absent.png", "y")]
    return [Source(name, tmp_path / name, texts, id=name[:1]) for name, *rest in asked for texts in [tuple(rest)]]


def told(results: Iterator[Prediction | Failure]) -> list[tuple[int, int | None, str, bool] | str]:
    return [
        result.reason if isinstance(result, Failure) else (
            result.index, result.frame, result.source.texts[result.nth], result.last
        )
        for result in results
    ]  # fmt: skip


def test_every_sentence_in_order_and_a_failure_once(sources: list[Source]):
    segmenter = Counting()
    results = told(predict(segmenter, sources))
    assert results[:3] == [(0, None, "x", False), (0, None, "y", False), (1, None, "z", True)]
    assert "absent.png does not exist" in str(results[3])
    assert results[4:] == [(3, frame, text, text == "y") for frame in (1, 2, 3) for text in ("x", "y")]
    assert segmenter.encoded == 4  # a.png once for two sources, three frames


@pytest.mark.parametrize(
    ("done", "left"), [({(0, None)}, {3}), ({(2, 1), (2, 3)}, {0, 1, 3}), ({(0, None), (2, 1), (2, 2), (2, 3)}, set())]
)
def test_units_of_an_earlier_run_are_left_out(sources: list[Source], done: set[Unit], left: set[int]):
    results = [result for result in predict(Counting(), sources, done=done) if isinstance(result, Prediction)]
    assert {result.index for result in results} == left
    assert not {result.unit for result in results} & done
    everything = [result for result in predict(Counting(), sources) if isinstance(result, Prediction)]
    assert [json_row(result) for result in results] == [
        json_row(result) for result in everything if result.unit not in done
    ]


def test_a_row_holds_what_the_source_has(sources: list[Source]):
    first, *_, last = (json_row(result) for result in predict(Counting(), sources) if isinstance(result, Prediction))
    assert list(first) == ["image", "id", *VALUES]
    assert first["area"] == 12
    assert list(last) == ["image", "id", "frame", *VALUES]
    assert last["frame"] == 3
