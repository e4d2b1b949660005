"""What every segmenter must do, torch or onnxruntime: inherit SegmenterContract and give it a `segmenter`."""

import numpy as np
import pytest
from PIL import Image

from cmmasksd.data.scenes import SceneDataset
from cmmasksd.errors import UserError
from cmmasksd.inference.base import DECODE_TOGETHER, ENCODE_TOGETHER, BaseSegmenter, Segmentation


def scenes() -> list[tuple[np.ndarray, list[str]]]:
    """Generated images, every second one stretched to an odd size, with their sentences."""
    data, requests = SceneDataset("scenes", "val", 6), []
    for nth, group in enumerate(data.groups()):
        image = data.image(data[group[0]])
        image = np.asarray(Image.fromarray(image).resize((203, 301))) if nth % 2 else image
        requests.append((image, [expression.text for index in group for expression in data[index].expressions]))
    return requests


def assert_close(left: Segmentation, right: Segmentation) -> None:
    """Equal but for rounding, which may move single pixels across the threshold."""
    assert left.text == right.text
    np.testing.assert_array_equal(left.image, right.image)
    np.testing.assert_allclose(left.probability, right.probability, atol=1e-4)
    assert (left.mask != right.mask).mean() < 0.002
    assert left.score == pytest.approx(right.score, abs=2e-3)
    assert left.presence == pytest.approx(right.presence, abs=1e-4)
    assert left.present == right.present


class SegmenterContract:
    """The segmenter runs the shipped model `scenes` on the CPU."""

    @pytest.fixture
    def segmenter(self) -> BaseSegmenter:
        raise NotImplementedError

    def test_shapes_types_and_order(self, segmenter: BaseSegmenter):
        requests = scenes()
        batch = segmenter.segment_batch(requests)
        assert [[result.text for result in row] for row in batch] == [texts for _, texts in requests]
        for (image, _), row in zip(requests, batch, strict=True):
            for result in row:
                assert result.mask.shape == result.probability.shape == image.shape[:2]
                assert (type(result.mask), type(result.probability)) == (np.ndarray, np.ndarray)
                assert (result.mask.dtype, result.probability.dtype) == (np.bool_, np.float32)
                assert 0 <= result.probability.min() <= result.probability.max() <= 1
                assert 0 <= result.presence <= 1
                assert (type(result.presence), result.present) == (float, True)
                np.testing.assert_array_equal(result.image, image)
        assert len({result.mask.tobytes() for row in batch for result in row}) > 3  # images and sentences matter

    @pytest.mark.parametrize("size", [(128, 128), (17, 90), (200, 31), (1, 1), (3, 300)])
    def test_the_mask_has_the_size_of_the_image(self, segmenter: BaseSegmenter, size: tuple[int, int]):
        (result,) = segmenter.segment(np.full((*size, 3), 90, np.uint8), "red circle")
        assert result.mask.shape == result.probability.shape == size

    def test_a_batch_gives_what_each_image_gives_alone(self, segmenter: BaseSegmenter):
        requests = scenes()
        requests[1] = (requests[1][0], requests[1][1][0])  # one sentence as a plain string
        for row, (image, texts) in zip(segmenter.segment_batch(requests), requests, strict=True):
            for together, alone in zip(row, segmenter.segment(image, texts), strict=True):
                assert_close(together, alone)
        assert segmenter.segment_batch([]) == []

    def test_many_sentences_give_what_each_gives_alone(self, segmenter: BaseSegmenter):
        image, texts = scenes()[0]
        many = [texts[0], *["small red star"] * (max(DECODE_TOGETHER, ENCODE_TOGETHER) + 1), texts[-1]]
        together = segmenter.segment(image, many)
        assert [result.text for result in together] == many
        for result in (together[0], together[DECODE_TOGETHER + 1], together[-1]):
            assert_close(result, segmenter.segment(image, result.text)[0])

    def test_the_same_input_gives_the_same_bits(self, segmenter: BaseSegmenter):
        image, texts = scenes()[0]
        for left, right in zip(segmenter.segment(image, texts), segmenter.segment(image, texts), strict=True):
            np.testing.assert_array_equal(left.probability, right.probability)
            assert (left.score, left.presence) == (right.score, right.presence)

    def test_thresholds_and_scores(self, segmenter: BaseSegmenter):
        image, texts = scenes()[0]
        encoded = segmenter.encode([(image, texts[0]), (image, texts[0])])
        low, high = segmenter.decode(encoded, [0.05, 0.9])
        (plain,) = segmenter.segment(image, texts[0])
        for result, threshold in ((low, 0.05), (high, 0.9), (plain, 0.5)):
            np.testing.assert_array_equal(result.mask, result.probability > threshold)
            expected = result.probability[result.mask].mean() if result.mask.any() else 0
            assert result.score == pytest.approx(expected, abs=1e-5)
        assert low.area > high.area > 0
        segmenter.threshold = 1 - 1e-7
        (nothing,) = segmenter.segment(image, texts[0])
        assert (nothing.area, nothing.score, nothing.box) == (0, 0, None)

    def test_the_mask_of_a_sentence_of_low_presence_is_empty(self, segmenter: BaseSegmenter):
        image, texts = scenes()[0]
        plain = segmenter.segment(image, texts)
        low, high = sorted({result.presence for result in plain})[:: len(texts) - 1]
        segmenter.min_score = high  # a presence equal to it is enough
        for result, expected in zip(segmenter.segment(image, texts), plain, strict=True):
            assert result.presence == expected.presence
            np.testing.assert_array_equal(result.probability, expected.probability)
            assert result.present == (result.presence == high)
            np.testing.assert_array_equal(result.mask, expected.mask & result.present)
            assert result.score == (expected.score if result.present else 0)
            assert result.present or result.label().endswith("not\xa0found")
        encoded = segmenter.encode([(image, texts[0]), (image, texts[0])])
        assert [result.present for result in segmenter.decode(encoded, None, [1.0, low])] == [False, True]

    @pytest.mark.parametrize("min_score", [-0.1, 1.1, float("nan")])
    def test_min_score_is_between_0_and_1(self, segmenter: BaseSegmenter, min_score: float):
        encoded = segmenter.encode([(np.zeros((9, 9, 3), np.uint8), "a star")])
        with pytest.raises(UserError, match="min_score must be between 0 and 1"):
            list(segmenter.decode(encoded, None, [min_score]))

    @pytest.mark.parametrize("texts", ["", "  ", [], ["a star", "\t"]])
    def test_no_sentence_is_a_mistake(self, segmenter: BaseSegmenter, texts: str | list[str]):
        with pytest.raises(UserError, match="sentence"):
            segmenter.segment(np.zeros((9, 9, 3), np.uint8), texts)

    @pytest.mark.parametrize(
        "image", [np.zeros((5, 5, 2), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)]
    )
    def test_an_array_that_is_no_image(self, segmenter: BaseSegmenter, image: np.ndarray):
        with pytest.raises(UserError, match=r"\(H, W, 3\) uint8"):
            segmenter.segment(image, "a star")

    @pytest.mark.parametrize("threshold", [0, 1, -0.1, float("nan")])
    def test_a_threshold_is_between_0_and_1(self, segmenter: BaseSegmenter, threshold: float):
        encoded = segmenter.encode([(np.zeros((9, 9, 3), np.uint8), "a star")])
        with pytest.raises(UserError, match="between 0 and 1"):
            list(segmenter.decode(encoded, [threshold]))
