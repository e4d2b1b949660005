"""Scoring items: every sentence of every reference, with masks at the original size."""

import pytest

from cmmasksd.errors import UserError
from cmmasksd.evaluation.items import ScoringItems
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer
from noise import Noise


@pytest.fixture(scope="module")
def processor():
    return CMMaskSDProcessor(load_tokenizer("tiny"), (64, 64), patch_size=16)


def test_scoring_items_carry_every_sentence_of_every_reference(processor):
    data = Noise((3, 1, 2))
    items = ScoringItems(data, processor, data.groups())
    assert len(items) == 3
    item = items[0]
    assert item.placement.original == (20, 30)
    assert [item.mask(nth).shape for nth in range(9)] == [(20, 30)] * 9
    assert item.masks.shape == (3, 75)  # bits
    assert item.mask_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert item.sentences[4] == (101, 0, 11, "thing 1 word 1")
    assert len(item.tokens) == 9
    ids = [sentence[2] for i in range(3) for sentence in items[i].sentences]
    assert sorted(ids) == sorted(e.sent_id for index in range(6) for e in data[index].expressions)
    assert [int(items[2].mask(nth).sum()) for nth in (0, 3)] == [30 * 5, 30 * 6]


def test_scoring_refuses_a_mask_of_another_size(processor):
    data = Noise(mask_size=(30, 20))
    with pytest.raises(UserError, match=r"mask of reference 100 is \(30, 20\), its image \(20, 30\)"):
        ScoringItems(data, processor, data.groups())[0]
