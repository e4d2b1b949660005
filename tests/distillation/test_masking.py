"""What is masked: exactly the ratio, whole words, never start, end or padding, and the end of the scale asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmmasksd.distillation.masking import choose, choose_patches, choose_words, masked_patches, patch_scores

RATIOS = st.floats(0.01, 0.99)
WHICH = st.sampled_from(["high", "low", "random"])
SENTENCES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=8), min_size=1, max_size=4)
"""Each sentence: how many pieces each of its words has."""


def word_ids_of(sentences: list[list[int]]) -> Tensor:
    """(B, L), with start, end, and two columns of padding at least."""
    length = 4 + max(sum(words) for words in sentences)
    ids = torch.full((len(sentences), length), -1)
    for row, words in zip(ids, sentences, strict=True):
        pieces = [word for word, count in enumerate(words) for _ in range(count)]
        row[1 : 1 + len(pieces)] = torch.tensor(pieces)
    return ids


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ------------------------------------------------------------------------------------------------------------- patches


@given(st.integers(2, 60), RATIOS, WHICH, st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_exactly_the_ratio_of_the_patches(patches, ratio, which, batch, seed):
    hidden = choose_patches(random(batch, patches, seed=seed), ratio, which)
    assert hidden.shape == (batch, patches)
    assert hidden.dtype == torch.bool
    count = hidden.sum(1)
    assert (count == masked_patches(patches, ratio)).all()
    assert (count >= 1).all()
    assert (count <= patches - 1).all()
    if 1 <= ratio * patches <= patches - 1:
        assert (count - ratio * patches).abs().amax() <= 0.5


def test_ratios_in_numbers():
    counts = {(900, 0.5): 450, (900, 0.25): 225, (7, 0.3): 2, (2, 0.01): 1, (2, 0.99): 1, (64, 0.75): 48}
    assert {(n, ratio): masked_patches(n, ratio) for n, ratio in counts} == counts


@given(st.integers(2, 40), RATIOS, st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_high_masks_the_highest_and_low_the_lowest(patches, ratio, seed):
    scores = random(1, patches, seed=seed)
    high, low = (choose_patches(scores, ratio, which) for which in ("high", "low"))
    assert scores[high].amin() >= scores[~high].amax()
    assert scores[low].amax() <= scores[~low].amin()


def test_random_takes_no_notice_of_the_scores():
    torch.manual_seed(0)
    scores = torch.arange(10.0).expand(2000, 10)
    hidden = choose_patches(scores, 0.3, "random")
    share = hidden.float().mean(0)  # each patch in 30 % of the draws
    assert (share - 0.3).abs().amax() < 0.05
    torch.manual_seed(0)
    assert torch.equal(choose_patches(scores, 0.3, "random"), hidden)
    assert not torch.equal(choose_patches(scores, 0.3, "random"), hidden)


def test_equal_scores_still_give_the_exact_number():
    assert choose_patches(torch.zeros(3, 9), 0.5, "high").sum(1).tolist() == [4, 4, 4]


def test_choose_never_takes_what_is_not_valid():
    valid = torch.tensor([[False, True, True, False, True]])
    scores = torch.tensor([[9.0, 1.0, 2.0, 8.0, 3.0]])
    for which in ("high", "low", "random"):
        chosen = choose(scores, torch.tensor([2]), which, valid)
        assert chosen.sum() == 2
        assert not (chosen & ~valid).any()
    assert choose(scores, torch.tensor([1]), "high", valid)[0].tolist() == [False, False, False, False, True]
    assert choose(scores, torch.tensor([1]), "low", valid)[0].tolist() == [False, True, False, False, False]


# --------------------------------------------------------------------------------------------------- scores of patches


def test_patch_scores_by_hand():
    correlation = torch.tensor([[[0.9, 0.1, -0.5, 0.3], [0.0, -0.2, -0.4, 0.8]]])  # (1, 2 patches, 4 tokens)
    mask = torch.tensor([[False, True, True, False]])
    assert patch_scores(correlation, mask, "max")[0].tolist() == pytest.approx([0.1, -0.2])
    assert patch_scores(correlation, mask, "mean")[0].tolist() == pytest.approx([-0.2, -0.3])


@pytest.mark.parametrize("guide", ["max", "mean"])
def test_a_sentence_without_words_scores_zero(guide):
    scores = patch_scores(random(2, 5, 4), torch.zeros(2, 4, dtype=torch.bool), guide)
    assert torch.equal(scores, torch.zeros(2, 5))


# --------------------------------------------------------------------------------------------------------------- words


@given(SENTENCES, RATIOS, WHICH, st.booleans(), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_whole_words_and_nothing_else(sentences, ratio, which, hide_single, seed):
    word_ids = word_ids_of(sentences)
    correlation = random(len(sentences), 6, word_ids.shape[1], seed=seed)
    torch.manual_seed(seed)
    hidden = choose_words(correlation, word_ids, ratio, which, hide_single_word=hide_single)
    assert hidden.dtype == torch.bool
    assert not (hidden & (word_ids < 0)).any()  # start, end, padding
    for row, ids, words in zip(hidden, word_ids, sentences, strict=True):
        masked = set(ids[row].tolist())
        assert not masked & set(ids[~row].tolist())  # a word is masked with all its pieces or not at all
        if len(words) == 1:
            assert len(masked) == int(hide_single)
        else:
            assert 1 <= len(masked) <= len(words) - 1
            if 1 <= ratio * len(words) <= len(words) - 1:
                assert abs(len(masked) - ratio * len(words)) <= 0.5 + 1e-5


def test_numbers_of_words():
    """max(1, round(ratio * words)), halves up, and one stays."""
    sentences = [[1] * n for n in range(1, 11)]
    word_ids = word_ids_of(sentences)
    correlation = random(10, 4, word_ids.shape[1])
    counts = {
        0.3: [0, 1, 1, 1, 2, 2, 2, 2, 3, 3],
        0.5: [0, 1, 2, 2, 3, 3, 4, 4, 5, 5],
        0.9: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    }
    for ratio, expected in counts.items():
        assert choose_words(correlation, word_ids, ratio, "high").sum(1).tolist() == expected


def test_a_words_score_is_the_best_of_its_pieces_over_all_patches():
    word_ids = torch.tensor([[-1, 0, 1, 1, 2, -1]])
    correlation = torch.tensor(
        [
            [
                # start, word 0, word 1 (two pieces), word 2, end
                [0.99, 0.10, -0.50, 0.20, 0.30, 0.99],
                [0.99, 0.40, 0.60, -0.90, 0.25, 0.99],
            ]
        ]
    )
    high = choose_words(correlation, word_ids, 0.3, "high")[0]
    assert high.tolist() == [False, False, True, True, False, False]  # 0.6
    low = choose_words(correlation, word_ids, 0.3, "low")[0]
    assert low.tolist() == [False, False, False, False, True, False]  # 0.3


@given(SENTENCES, RATIOS, st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_high_and_low_words(sentences, ratio, seed):
    word_ids = word_ids_of(sentences)
    correlation = random(len(sentences), 6, word_ids.shape[1], seed=seed)
    for which, sign in (("high", 1), ("low", -1)):
        hidden = choose_words(correlation, word_ids, ratio, which)
        for row, (ids, best) in enumerate(zip(word_ids, correlation.amax(1), strict=True)):
            scores = {word: max(best[ids == word].tolist()) for word in set(ids.tolist()) - {-1}}
            masked = set(ids[hidden[row]].tolist())
            if masked:
                inside = [sign * scores[word] for word in masked]
                outside = [sign * score for word, score in scores.items() if word not in masked]
                assert min(inside) >= max(outside)


def test_random_words_take_no_notice_of_the_correlation():
    torch.manual_seed(0)
    word_ids = word_ids_of([[1, 2, 1, 1]] * 2000)
    correlation = torch.arange(float(word_ids.shape[1])).expand(2000, 3, -1)
    hidden = choose_words(correlation, word_ids, 0.25, "random")
    share = torch.stack([(hidden & (word_ids == word)).any(1).float().mean() for word in range(4)])
    assert (share - 0.25).abs().amax() < 0.05


def test_a_sentence_without_words_is_left_alone():
    word_ids = torch.tensor([[-1, -1, -1], [-1, 0, -1]])
    hidden = choose_words(random(2, 3, 3), word_ids, 0.5, "high", hide_single_word=True)
    assert hidden.tolist() == [[False] * 3, [False, True, False]]
