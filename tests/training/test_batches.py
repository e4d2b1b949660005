"""Batches: every reference once per epoch, one order for any number of workers and processes, resumable anywhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmmasksd.data.samples import Expression, Reference
from cmmasksd.data.scenes import SceneDataset
from cmmasksd.data.workers import loaded
from cmmasksd.errors import UserError
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer
from cmmasksd.training.batches import (
    Batch,
    Draw,
    TrainingBatches,
    TrainingItems,
    fade,
    training_loader,
)
from noise import Noise


@pytest.fixture(scope="module")
def processor():
    return CMMaskSDProcessor(load_tokenizer("tiny"), (64, 64), patch_size=16)


@pytest.fixture(scope="module")
def scenes():
    return SceneDataset("scenes", "train", 15, scene_size=64)


def references(batch):
    return [reference for draw in batch for reference in draw.references]


def flat(batches):
    return [reference for batch in batches for reference in references(batch)]


GROUPS = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9], [10], [11, 12]]


# -- the order of an epoch


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    batch_size=st.integers(1, 6),
    per_image=st.integers(1, 5),
    world=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_every_reference_once_per_epoch_but_for_the_dropped_tail(counts, batch_size, per_image, world, epoch):
    ends = np.cumsum(counts)
    groups = [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]
    total = sum(counts)
    if world > 1 and total < batch_size * world:
        return
    ranks = [
        list(TrainingBatches(groups, batch_size, per_image=per_image, rank=rank, world=world).at(epoch))
        for rank in range(world)
    ]
    seen = [reference for batches in ranks for reference in flat(batches)]
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(range(total))
    step = min(batch_size, total) * world
    assert len(seen) == total // step * step
    assert {len(batches) for batches in ranks} == {total // step}


def test_two_ranks_share_the_single_global_order():
    whole = list(TrainingBatches(GROUPS, 6, per_image=2, seed=3).at(1))
    first, second = (list(TrainingBatches(GROUPS, 3, per_image=2, seed=3, rank=r, world=2).at(1)) for r in (0, 1))
    assert len(whole) == len(first) == len(second) == 2
    assert [references(a) + references(b) for a, b in zip(first, second, strict=True)] == [references(b) for b in whole]


def test_references_of_an_image_are_drawn_together():
    batches = list(TrainingBatches(GROUPS, 4, per_image=4, seed=1))
    image_of = {reference: image for image, group in enumerate(GROUPS) for reference in group}
    for batch in batches:
        images = [image_of[draw.references[0]] for draw in batch]
        assert len(images) == len(set(images))  # no image is repeated
        assert all(image_of[r] == image for draw, image in zip(batch, images, strict=True) for r in draw.references)
    assert max(len(draw.references) for batch in batches for draw in batch) > 1


def test_per_image_bounds_the_references_drawn_together():
    for per_image in (1, 2):
        draws = [draw for batch in TrainingBatches(GROUPS, 13, per_image=per_image) for draw in batch]
        assert max(len(draw.references) for draw in draws) == per_image


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return flat(TrainingBatches(GROUPS, 1, seed=seed).at(epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_starting_in_the_middle_gives_the_remaining_batches():
    batches = TrainingBatches(GROUPS, 2, per_image=3, seed=5)
    whole = list(batches.at(2))
    assert [list(batches.at(2, start=k)) for k in range(len(whole) + 1)] == [whole[k:] for k in range(len(whole) + 1)]
    assert list(batches.at(2)) == whole  # the start is not kept


def test_length_comes_from_the_data():
    for count in (12, 15, 27):
        groups = SceneDataset("scenes", "train", count, scene_size=64).groups()
        assert sum(map(len, groups)) == count
        assert len(TrainingBatches(groups, 4)) == count // 4
        assert len(TrainingBatches(groups, 2, world=3)) == count // 6


def test_fewer_references_than_a_batch():
    batches = TrainingBatches(GROUPS, 20)
    assert batches.batch_size == 13
    assert [sorted(references(batch)) for batch in batches] == [list(range(13))]
    with pytest.raises(UserError, match=r"13 references .* batch of 7 on 2 processes.*training\.batch"):
        TrainingBatches(GROUPS, 7, world=2)
    with pytest.raises(UserError, match="split is empty"):
        TrainingBatches([], 7)


# -- sentences and loading


def epoch_of(data, processor, workers, *, epoch=0, start=0, rank=0, world=1, size=4, per_image=3, seed=2):
    items = TrainingItems(data, processor, stride=4, seed=seed)
    batches = TrainingBatches(data.groups(), size, per_image=per_image, seed=seed, rank=rank, world=world)
    return list(loaded(training_loader(items, batches.at(epoch, start=start), workers)))


def assert_same(a: Batch, b: Batch):
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.tokens.input_ids, b.tokens.input_ids)
    assert torch.equal(a.targets, b.targets)
    assert torch.equal(a.image_index, b.image_index)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(scenes, processor, workers):
    alone, shared = epoch_of(scenes, processor, 0), epoch_of(scenes, processor, workers)
    assert len(alone) == len(shared) == 3
    for a, b in zip(alone, shared, strict=True):
        assert_same(a, b)


def test_a_worker_started_in_the_middle_reads_the_same(scenes, processor):
    whole, rest = epoch_of(scenes, processor, 0, epoch=1), epoch_of(scenes, processor, 1, epoch=1, start=2)
    assert len(rest) == 1
    assert_same(whole[2], rest[0])


def test_batch_contents(processor):
    data = Noise((3, 1, 2))
    items = TrainingItems(data, processor, stride=4)
    (batch,) = epoch_of(data, processor, 0, size=6)
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.targets.shape == (6, 16, 16)
    (order,) = TrainingBatches(data.groups(), 6, per_image=3, seed=2)
    sizes = [len(draw.references) for draw in order]
    assert batch.image_index.tolist() == [nth for nth, size in enumerate(sizes) for _ in range(size)]
    for nth, index in enumerate(references(order)):  # reference `index` fills its first index + 1 of 20 rows
        assert batch.targets[nth].mean().item() == pytest.approx((index + 1) / 20, abs=0.01)
        image, _ = processor.image(data.image(data[index]))
        assert torch.equal(batch.images[batch.image_index[nth]], image)
        assert processor.tokenizer.decode(batch.tokens.input_ids[nth]).find(f"thing {index} word") > 0
    assert items[order[0]][0].dtype == torch.uint8


def test_sentence_is_a_function_of_seed_epoch_and_reference(processor):
    data = Noise((3, 1, 2))

    def drawn(seed, epoch, **settings):
        """Which of its sentences each reference got."""
        items = TrainingItems(data, processor, stride=4, seed=seed)
        order = settings.pop("order", 0)
        batches = TrainingBatches(data.groups(), seed=order, **{"batch_size": 6, **settings}).at(epoch)
        return {r: text for b in batches for d in b for r, text in zip(d.references, items[d][1], strict=True)}

    assert drawn(0, 0) == drawn(0, 0, batch_size=2, per_image=3, order=9)  # neither order nor company matters
    assert len({tuple(sorted(drawn(0, epoch).items())) for epoch in range(4)}) > 1
    assert len({tuple(sorted(drawn(seed, 0).items())) for seed in range(4)}) > 1
    over_epochs = {r: {drawn(0, epoch)[r] for epoch in range(20)} for r in range(6)}
    assert all(len(texts) == 3 for texts in over_epochs.values())  # in time, all of them are heard


class Said(Noise):
    """Noise of which each reference has one given sentence."""

    def __init__(self, *sentences: str) -> None:
        super().__init__((1,) * len(sentences))
        self.sentences = sentences

    def __getitem__(self, index: int) -> Reference:
        reference = super().__getitem__(index)
        return replace(reference, expressions=(Expression(index, self.sentences[index]),))


def test_images_lose_their_colours_only_where_no_sentence_names_one(processor):
    data = Said(
        "the red car", "car on the left", "GREENISH thing", "man with the grey hat", "a coloured one", "the bored man"
    )
    greyed = TrainingItems(data, processor, stride=4, greyscale=1.0)
    for nth in range(6):
        draws = [Draw(epoch, (nth,)) for epoch in range(12)]
        plain, _ = processor.image(data.image(data[nth]))
        images = [greyed[draw][0] for draw in draws]
        assert all(torch.equal(image, greyed[draw][0]) for image, draw in zip(images, draws, strict=True))
        spreads = [(image.float().amax(0) - image.float().amin(0)).mean().item() for image in images]
        if nth not in (1, 5):
            assert all(torch.equal(image, plain) for image in images)
            continue
        whole = (plain.float().amax(0) - plain.float().amin(0)).mean().item()
        assert min(spreads) == 0  # wholly grey at times
        assert any(0.05 * whole < spread < 0.95 * whole for spread in spreads)  # in part at others
    off = TrainingItems(data, processor, stride=4)
    assert torch.equal(off[Draw(0, (1,))][0], processor.image(data.image(data[1]))[0])


def test_one_sentence_that_names_a_colour_keeps_them_for_all(processor):
    class Together(Said):
        def image(self, reference):
            return super().image(self[0])

    items = TrainingItems(Together("the red car", "car on the left"), processor, stride=4, greyscale=1.0)
    plain, _ = processor.image(items.data.image(items.data[0]))
    assert all(torch.equal(items[Draw(epoch, (0, 1))][0], plain) for epoch in range(8))
    assert not all(torch.equal(items[Draw(epoch, (1,))][0], plain) for epoch in range(8))


def test_fading_keeps_lightness():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.equal(fade(image, 1.0), image)
    for keep in (0.0, 0.5):
        before, after = ((pixels.float() * luma).sum(0) for pixels in (image, fade(image, keep)))
        assert (before - after).abs().max() <= 0.51
    assert fade(image, 0.0).float().std(0).max() == 0


def test_ranks_read_what_one_process_reads(scenes, processor):
    (whole, *_) = epoch_of(scenes, processor, 0, size=6)
    two = [epoch_of(scenes, processor, 0, size=3, rank=rank, world=2)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat([batch.targets for batch in two]), whole.targets)
    images = torch.cat([batch.images[batch.image_index] for batch in two])
    assert torch.equal(images, whole.images[whole.image_index])


def test_loading_leaves_the_global_random_state_alone(scenes, processor):
    before = torch.get_rng_state()
    epoch_of(scenes, processor, 0)
    epoch_of(scenes, processor, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mask_of_another_size_is_one_plain_line(processor, workers):
    data = Noise(mask_size=(30, 20))
    with pytest.raises(UserError, match="they must have one size") as training:
        epoch_of(data, processor, workers)
    assert "Traceback" not in str(training.value)
    assert str(training.value).startswith("a mask of (30, 20)")
