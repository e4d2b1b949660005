"""Fusion decoder and mask head: attention against torch's own, positions, and what the words' mask hides."""

from typing import Any

import pytest
import torch
from torch import nn

from cmmasksd.model.decoder import Attention, FusionDecoder, grid_positions
from cmmasksd.model.mask_head import MaskHead


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_features() -> dict[str, Any]:
    """What the fusion decoder takes, with all words visible: D = 12, E = 10, 6 patches, 4 words."""
    return {
        "patches": torch.randn(1, 6, 12),
        "words": torch.randn(1, 4, 12),
        "embedded": torch.randn(1, 4, 10),
        "sentence": torch.randn(1, 12),
        "word_mask": torch.ones(1, 4, dtype=torch.bool),
        "grid": (2, 3),
    }


def test_attention_equals_torch():
    ours, theirs = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    queries, keys = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    for key_mask in (None, mask):
        hidden = None if key_mask is None else ~key_mask
        expected, _ = theirs(queries, keys, keys, key_padding_mask=hidden)
        torch.testing.assert_close(ours(queries, keys, key_mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (30, 30), (2, 40)])
@pytest.mark.parametrize("width", [32, 30])  # one that four does not divide, too
def test_every_cell_has_a_position_of_its_own(grid, width):
    positions = grid_positions(grid, width, torch.device("cpu"))
    assert positions.shape == (grid[0] * grid[1], width)
    assert positions.abs().amax() <= 1
    distance = torch.cdist(positions, positions) + 10 * torch.eye(len(positions))
    assert distance.amin() > 0.05


def test_positions_tell_rows_from_columns_and_run_row_by_row():
    positions = grid_positions((4, 6), 32, torch.device("cpu")).unflatten(0, (4, 6))
    row, column = positions[..., :16], positions[..., 16:]
    assert torch.equal(row, row[:, :1].expand_as(row))
    assert torch.equal(column, column[:1].expand_as(column))


def test_positions_do_not_depend_on_the_size_of_the_grid():
    """The centre of a grid is the centre of a finer one: a model works at another size than it was trained at."""
    coarse, fine = (grid_positions((side, side), 32, torch.device("cpu")).unflatten(0, (side, side)) for side in (3, 9))
    torch.testing.assert_close(coarse[1, 1], fine[4, 4])
    torch.testing.assert_close(coarse[0, 2], fine[1, 7])


def test_masked_words_have_no_influence_and_the_others_do():
    decoder = FusionDecoder(12, 10, width=16, layers=2, heads=2, mlp=24).eval()
    features = random_features()
    features["word_mask"] = torch.tensor([[True, False, True, False]])
    before = decoder(**features)
    assert before.shape == (1, 6, 16)
    for index, visible in enumerate(features["word_mask"][0]):
        for name in ("words", "embedded"):
            changed = features[name].clone()
            changed[:, index, ::2] += 1
            assert torch.equal(decoder(**features | {name: changed}), before) is not bool(visible)


def test_a_sentence_without_words_still_decodes():
    decoder = FusionDecoder(12, 10, width=16, layers=2, heads=2, mlp=24)
    none = torch.zeros(1, 4, dtype=torch.bool)
    assert decoder(**random_features() | {"word_mask": none}).isfinite().all()


def test_decoder_knows_where_a_patch_lies():
    """Permuted patches give permuted features only if positions are missing."""
    decoder = FusionDecoder(12, 10, width=16, layers=1, heads=2, mlp=24).eval()
    features = random_features()
    turned = decoder(**features | {"patches": features["patches"].flip(1)}).flip(1)
    assert not torch.allclose(turned, decoder(**features), atol=1e-2)


def test_decoder_reads_how_well_each_patch_matches_the_sentence():
    """Compared with the other patches: whatever the length of the features, and the level of all cosines."""
    decoder = FusionDecoder(12, 10, width=16, layers=0, heads=2, mlp=24)
    with torch.no_grad():  # nothing but the match is left: no patch content, and one position for all
        decoder.patch_in.weight.zero_()
        sentence, patches = torch.randn(1, 12), torch.randn(1, 6, 12)
        rest = {"words": torch.zeros(1, 1, 12), "embedded": torch.zeros(1, 1, 10), "grid": (2, 3)}
        rest["word_mask"] = torch.ones(1, 1, dtype=torch.bool)
        empty = decoder(patches=torch.zeros(1, 6, 12), sentence=sentence, **rest)
        seen = decoder(patches=patches, sentence=sentence, **rest)
        assert not torch.allclose(seen, empty, atol=1e-2)
        longer = decoder(patches=7 * patches, sentence=3 * sentence, **rest)
        torch.testing.assert_close(longer, seen, rtol=1e-4, atol=1e-4)
        # the same ranking of the patches, nearer to the sentence as a whole: the match, and so the output, is the same
        cosine = torch.tensor([0.1, 0.2, -0.1, 0.3, 0.0, 0.15])
        axis, other = torch.eye(12)[:2]

        def turned(cosines):
            return (cosines[:, None] * axis + (1 - cosines**2).sqrt()[:, None] * other)[None]

        low, high = (decoder(patches=turned(c), sentence=axis[None], **rest) for c in (cosine, cosine + 0.5))
        torch.testing.assert_close(low, high, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("by", ["sentence", "words"])
def test_the_sentence_gates_content_and_position(by):
    """Before any layer, two sentences weigh equal patches differently from place to place, not all alike. So do two
    words that the text tower makes the same of."""
    decoder = FusionDecoder(12, 10, width=16, layers=0, heads=2, mlp=24)
    decoder.norm = nn.Identity()
    same = {"words": torch.zeros(1, 1, 12), "word_mask": torch.ones(1, 1, dtype=torch.bool), "grid": (2, 3)}
    sentences, embedded = torch.randn(2, 1, 12), torch.randn(2, 1, 1, 10)
    sentences[1], embedded[1] = (sentences[1], embedded[0]) if by == "sentence" else (sentences[0], embedded[1])
    with torch.no_grad():
        same["patches"] = torch.zeros(1, 6, 12)  # all patches are the same: only their positions are left
        a, b = (decoder(embedded=embedded[i], sentence=sentences[i], **same) for i in range(2))
    difference = (a - b)[0]
    assert (difference - difference[:1]).abs().amax() > 1e-2


def test_head_applies_the_kernel_of_the_sentence():
    head = MaskHead(12, 16, width=32)
    features = {"fused": torch.randn(2, 6, 16), "pixels": torch.randn(2, 6, 192), "sentence": torch.randn(2, 12)}
    logits = head(**features, grid=(2, 3))
    assert logits.shape == (2, 8, 12)
    with torch.no_grad():  # a kernel of nothing but its bias leaves only that
        head.kernel.weight.zero_()
        head.kernel.bias.zero_()[-1] = 0.75
        assert torch.equal(head(**features, grid=(2, 3)), torch.full((2, 8, 12), 0.75))
        head.kernel.bias[0] = 2.0  # and one weight adds that channel, scaled by the root of their number
        channel = head(**features, grid=(2, 3)) - 0.75
    assert (channel >= 0).all()  # it comes out of a ReLU
    assert channel.amax() > 0


@pytest.mark.parametrize("which", ["fused", "pixels"])
def test_head_keeps_the_layout_of_the_grid(which):
    """A patch changes the logits at its own place most."""
    head = MaskHead(12, 16, width=32)
    parts = {"fused": torch.randn(1, 40, 16), "pixels": torch.randn(1, 40, 192)}
    sentence = torch.randn(1, 12)
    other = parts | {which: parts[which].clone()}
    other[which][:, 3 * 8 + 6, ::2] += 5  # row 3, column 6 of a grid of 5 x 8
    with torch.no_grad():
        after, before = (head(**given, sentence=sentence, grid=(5, 8)) for given in (other, parts))
    change = (after - before).abs()[0]
    row, column = divmod(int(change.argmax()), 32)
    assert abs((row + 0.5) / 4 - 3.5) < 1
    assert abs((column + 0.5) / 4 - 6.5) < 1
