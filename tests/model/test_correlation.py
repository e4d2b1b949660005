"""Patch-word correlation: cosines by hand, no gradient, full precision, and zero where there is no word."""

import pytest
import torch
import torch.nn.functional as F

from cmmasksd.model.correlation import correlation, pointing, sentence_correlation
from cmmasksd.model.towers.base import ImageFeatures, TextFeatures


def features(scale: float = 1.0) -> tuple[ImageFeatures, TextFeatures]:
    draw = torch.Generator().manual_seed(0)
    patches, dense, words = (torch.randn(2, n, 8, generator=draw) * scale for n in (6, 6, 4))
    sentence = torch.randn(2, 8, generator=draw)
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    parts = [part.requires_grad_() for part in (patches, dense, words, sentence)]
    return ImageFeatures(parts[0], (2, 3), dense=parts[1]), TextFeatures(parts[2], parts[3], mask)


@pytest.mark.parametrize("source", ["patches", "values"])
def test_cosine_by_hand(source):
    image, text = features(scale=7.0)
    patches = image.patches if source == "patches" else image.dense
    corr = correlation(image, text, source)
    assert corr.shape == (2, 6, 4)
    for b in range(2):
        for n in range(6):
            for token in range(4):
                expected = F.cosine_similarity(patches[b, n], text.words[b, token], dim=0)
                expected = expected if text.word_mask[b, token] else torch.tensor(0.0)
                assert corr[b, n, token].item() == pytest.approx(expected.item(), abs=1e-6)
    sentences = sentence_correlation(image, text, source)
    expected = F.cosine_similarity(patches, text.sentence[:, None], dim=-1)
    torch.testing.assert_close(sentences, expected.detach(), rtol=1e-5, atol=1e-6)


def test_no_gradient_runs_through_it():
    image, text = features()
    assert not correlation(image, text).requires_grad
    assert not sentence_correlation(image, text).requires_grad


def test_it_stays_float32_under_autocast():
    """In bfloat16 a cosine has two or three digits: most patches of a picture tie, and ties are cut by order."""
    image, text = features()
    with torch.autocast("cpu", torch.bfloat16):
        corr, sentences = correlation(image, text), sentence_correlation(image, text)
    assert corr.dtype == sentences.dtype == torch.float32
    assert torch.equal(corr, correlation(image, text))
    assert torch.equal(sentences, sentence_correlation(image, text))


def test_values_need_the_value_path():
    image, text = features()
    with pytest.raises(ValueError, match="value_path"):
        correlation(ImageFeatures(image.patches, image.grid), text, "values")


def test_pointing_asks_whether_the_best_patch_is_in_the_object():
    target = torch.zeros(4, 8, 12)
    target[:, :4, 4:8] = 1  # the second patch of a grid of 2 x 3
    scores = torch.zeros(4, 6)
    for row, best in enumerate((1, 0, 2, 4)):
        scores[row, best] = 1
    assert pointing(scores, target, (2, 3)).tolist() == [True, False, False, False]
    assert pointing(scores, 1 - target, (2, 3)).tolist() == [False, True, True, True]
