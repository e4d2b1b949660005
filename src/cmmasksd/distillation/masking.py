"""Which patches and which words are hidden: scores from the correlation, then a fixed number of the highest, lowest or
random ones. Everything works on batches, without gradients; random choices use torch's global generator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Which = Literal["high", "low", "random"]


@torch.no_grad()
def patch_scores(correlation: Tensor, word_mask: Tensor, guide: Literal["max", "mean"]) -> Tensor:
    """Score patches by the words.

    Args:
        correlation: (B, N, L). word_mask: (B, L) bool, true for real words.

    Returns:
        (B, N): max or mean over the real words; 0 for a sentence without any.
    """
    if guide == "mean":
        return (correlation * word_mask[:, None]).sum(-1) / word_mask.sum(-1, keepdim=True).clamp(min=1)
    best = correlation.masked_fill(~word_mask[:, None], float("-inf")).amax(-1)
    return best.masked_fill(~word_mask.any(1)[:, None], 0.0)


@torch.no_grad()
def choose(scores: Tensor, count: Tensor, which: Which, valid: Tensor | None = None) -> Tensor:
    """Choose `count` entries of every row.

    Args:
        scores: (B, M). count: (B,) int64, at most the number of valid entries. valid: (B, M) bool, entries that may be
            chosen; None: all.

    Returns:
        (B, M) bool with exactly `count` true per row.
    """
    if which == "random":
        scores = torch.rand_like(scores)
    if which == "low":
        scores = -scores
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < count[:, None]


def masked_patches(patches: int, ratio: float) -> int:
    """Number of masked patches: round(ratio * patches), at least one and never all."""
    return min(max(1, round(ratio * patches)), patches - 1)


@torch.no_grad()
def choose_patches(scores: Tensor, ratio: float, which: Which) -> Tensor:
    """Mask `masked_patches` patches of every image: (B, N) scores to (B, N) bool."""
    batch, patches = scores.shape
    count = torch.full((batch,), masked_patches(patches, ratio), device=scores.device)
    return choose(scores, count, which)


@torch.no_grad()
def choose_words(
    correlation: Tensor, word_ids: Tensor, ratio: float, which: Which, *, hide_single_word: bool = False
) -> Tensor:
    """Mask whole words: max(1, round(ratio * words)) of them, and at least one stays.

    A word's score is the maximum over patches and over its pieces; its pieces are masked together.

    Args:
        correlation: (B, N, L). word_ids: (B, L), the word of each token, -1 for start, end and padding.
        hide_single_word: also mask the only word of a one-word sentence.

    Returns:
        (B, L) bool, true only where word_ids >= 0.
    """
    is_word = word_ids >= 0
    words = word_ids.amax(1) + 1  # (B,)
    index = word_ids.clamp(min=0)
    token_scores = correlation.amax(1).masked_fill(~is_word, float("-inf"))  # (B, L)
    scores = torch.full_like(token_scores, float("-inf")).scatter_reduce(1, index, token_scores, "amax")  # word w at w
    valid = torch.arange(scores.shape[1], device=scores.device) < words[:, None]
    count = (ratio * words + 0.5).floor().long().clamp(min=1)  # halves round up, on every device alike
    most = words - 1
    if hide_single_word:
        most = torch.where(words == 1, 1, most)
    hidden = choose(scores, torch.minimum(count, most.clamp(min=0)), which, valid)
    return hidden.gather(1, index) & is_word
