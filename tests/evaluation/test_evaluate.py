"""Scoring: all sentences, at the original size, exact counts, and the same bytes from one process and from two.

Most tests use a rigged network whose answer is "the bright pixels", on images that fit the canvas without scaling.
Then the prediction is known to the pixel, and plain numpy gives the counts.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cmmasksd.cli import main
from cmmasksd.data.samples import Expression, Reference
from cmmasksd.errors import UserError
from cmmasksd.evaluation import evaluate as scoring
from cmmasksd.evaluation.evaluate import BLOCK, evaluate, make_accelerator
from cmmasksd.evaluation.protocols import METRIC_NAMES, ORIGINAL
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer
from cmmasksd.model.towers.base import ImageFeatures


@dataclass
class Boxes:
    """Bright boxes on black: image i has i % 3 + 1 references with two sentences each; the masks are off by some."""

    sizes: tuple[tuple[int, int], ...] = ((32, 64), (64, 48), (64, 64), (20, 64), (64, 20))
    mask_size: tuple[int, int] | None = None
    name: str = "boxes"
    split: str = "val"

    def groups(self):
        counts = [i % 3 + 1 for i in range(len(self.sizes))]
        ends = np.cumsum(counts)
        return [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]

    def __len__(self):
        return sum(map(len, self.groups()))

    def __getitem__(self, index):
        image = next(i for i, group in enumerate(self.groups()) if index in group)
        texts = tuple(Expression(1000 - 10 * index - k, f"box {index} said {k}") for k in range(2))
        return Reference(50 + index, image, (index,), self.split, texts)

    def _box(self, reference):
        height, width = self.sizes[reference.image_id]
        return height // 4, height - height // 4, width // 4, width - width // 4

    def image(self, reference):
        image = np.zeros((*self.sizes[reference.image_id], 3), np.uint8)
        top, bottom, left, right = self._box(reference)
        image[top:bottom, left:right] = 255
        return image

    def mask(self, reference):
        mask = np.zeros(self.mask_size or self.sizes[reference.image_id], bool)
        top, bottom, left, right = self._box(reference)
        mask[top : bottom - (reference.ref_id - 50) % 4, left:right] = True
        return mask


class Bright(nn.Module):
    """Answers every sentence with the bright pixels of the canvas."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.modes = []

    def encode_image(self, pixels):
        self.modes.append(self.training)
        return ImageFeatures(pixels.mean(1).flatten(1)[..., None], pixels.shape[-2:])

    def encode_text(self, tokens):
        assert len(tokens) <= scoring.SENTENCES
        return tokens

    def decode(self, image, text):
        assert len(image) == len(text)
        return image.patches.view(len(image), *image.grid)


@pytest.fixture(scope="module")
def processor():
    return CMMaskSDProcessor(load_tokenizer("tiny"), (64, 64), patch_size=16, resize="letterbox", max_tokens=16)


def by_hand(data):
    """sent_id -> (intersection, union), by numpy."""
    counts = {}
    for index in range(len(data)):
        reference = data[index]
        bright, mask = data.image(reference)[..., 0] > 127, data.mask(reference)
        for expression in reference.expressions:
            counts[expression.sent_id] = (int((bright & mask).sum()), int((bright | mask).sum()))
    return counts


def test_counts_and_scores_equal_a_computation_by_hand(processor):
    """Also: the letterbox is undone and the image's own size is what is scored."""
    data = Boxes()
    result = evaluate(Bright(), processor, data, progress=False)
    scores, counts = result.scores, by_hand(data)
    assert {row.sent_id: (row.intersection, row.union) for row in result.rows} == counts
    intersections, unions = np.array(list(counts.values())).T
    ious = intersections / unions
    expected = {"oIoU": intersections.sum() / unions.sum(), "mIoU": ious.mean()}
    expected |= {f"P@0.{x}": (ious >= x / 10).mean() for x in range(5, 10)}
    assert list(scores) == list(METRIC_NAMES)
    assert scores == pytest.approx(expected)
    assert 0.8 < scores["mIoU"] < scores["P@0.5"] == 1
    assert (result.split, result.protocol) == ("val", ORIGINAL)
    assert result.provenance == {"truncated_expressions": 0}


@pytest.mark.parametrize("resize", ["letterbox", "warp"])
def test_images_of_another_size_than_the_canvas_are_scored_at_their_own(processor, resize):
    data = Boxes(sizes=((96, 160), (40, 24)))
    other = CMMaskSDProcessor(processor.tokenizer, (64, 64), patch_size=16, resize=resize)
    rows = evaluate(Bright(), other, data, progress=False).rows
    counts = by_hand(data)
    for row in rows:
        assert row.union == pytest.approx(counts[row.sent_id][1], rel=0.1)
        assert row.iou == pytest.approx(counts[row.sent_id][0] / counts[row.sent_id][1], abs=0.1)


def test_every_sentence_once_sorted_by_its_id(processor):
    data = Boxes()
    rows = evaluate(Bright(), processor, data, progress=False).rows
    ids = [row.sent_id for row in rows]
    assert ids == sorted(e.sent_id for index in range(len(data)) for e in data[index].expressions)
    (row,) = (row for row in rows if row.sent_id == 1000 - 31)
    assert (row.ref_id, row.image_id, row.sentence) == (53, 2, "box 3 said 1")


def test_more_images_than_a_block_and_workers(processor):
    data = Boxes(sizes=((32, 64), (64, 48)) * BLOCK + ((64, 64),))
    result = evaluate(Bright(), processor, data, progress=False)
    assert {row.sent_id: (row.intersection, row.union) for row in result.rows} == by_hand(data)
    assert evaluate(Bright(), processor, data, progress=False, workers=1) == result


def test_the_limit_takes_whole_images(processor):
    data = Boxes()
    for limit, references in ((1, 1), (2, 3), (3, 3), (4, 6), (0, 9), (100, 9)):
        rows = evaluate(Bright(), processor, data, references=limit, progress=False).rows
        assert {row.ref_id for row in rows} == set(range(50, 50 + references)), limit


def test_threshold_and_truncation(processor):
    data = Boxes()
    strict = replace(ORIGINAL, threshold=0.95)
    result = evaluate(Bright(), processor, data, protocol=strict, progress=False)
    assert result.scores["oIoU"] == 0  # no logit is above 2.9
    short = CMMaskSDProcessor(processor.tokenizer, (64, 64), patch_size=16, resize="letterbox", max_tokens=4)
    assert evaluate(Bright(), short, data, progress=False).provenance["truncated_expressions"] == 18


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(processor, training):
    model = Bright().train(training)
    evaluate(model, processor, Boxes(), progress=False)
    assert model.training is training
    assert model.modes == [False]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mask_of_another_size_is_one_plain_line(processor, workers):
    with pytest.raises(UserError, match=r"^the mask of reference 50 is \(8, 8\), its image \(32, 64\)"):
        evaluate(Bright(), processor, Boxes(mask_size=(8, 8)), progress=False, workers=workers)


def test_a_sentence_that_is_scored_twice_is_refused(processor):
    """As a sampler that pads would do: it would weigh double."""

    class Repeated(Boxes):
        def groups(self):
            first, *others = super().groups()
            return [first, *others, first]

    with pytest.raises(UserError, match="was scored twice"):
        evaluate(Bright(), processor, Repeated(), progress=False)


# -- memory

MEMORY = """
import sys
import numpy as np
import torch
sys.path[:0] = sys.argv[1:]
from memory import peak_megabytes
from test_evaluate import Boxes, Bright
from cmmasksd.data.samples import Expression, Reference
from cmmasksd.evaluation.evaluate import evaluate
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer

class Many(Boxes):  # one photograph, 40 objects with a sentence each
    def groups(self):
        return [list(range(40))]
    def __getitem__(self, index):
        return Reference(50 + index, 0, (index,), "val", (Expression(index, f"box {index}"),))

processor = CMMaskSDProcessor(load_tokenizer("tiny"), (64, 64), patch_size=16)
small = evaluate(Bright(), processor, Many(sizes=((40, 60),)), progress=False)  # what is imported only now
before = peak_megabytes()
rows = evaluate(Bright(), processor, Many(sizes=((2000, 3000),)), progress=False).rows
assert len(rows) == 40
print(peak_megabytes() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the memory of a process is read by POSIX's getrusage")
def test_many_sentences_about_one_photograph_need_little_memory():
    """40 masks of 6 megapixels: 3 GB when restored together, and 240 MB of truth."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", MEMORY, str(here), str(here.parent)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    assert float(grown) < 1000, f"{grown} MB"  # 250 to 500, by how the allocator keeps what was freed


def test_digits_do_not_depend_on_how_sentences_are_taken_together(processor, monkeypatch):
    data = Boxes()
    expected = evaluate(Bright(), processor, data, progress=False)
    for sentences, pixels in ((1, 1), (3, 1), (5, 64 * 64 * 2)):
        monkeypatch.setattr(scoring, "SENTENCES", sentences)
        monkeypatch.setattr(scoring, "RESTORE_PIXELS", pixels)
        assert evaluate(Bright(), processor, data, progress=False) == expected


# -- processes


def test_two_processes_write_the_same_bytes_as_one(tmp_path, monkeypatch):
    """A real launch. 17 images make 3 blocks, which 2 processes cannot share out evenly."""
    from accelerate.state import AcceleratorState

    arguments = ["evaluate", "--model", "scenes", "--data", "scenes", "--split", "val"]
    arguments += ["--references", "51", "--scene_size", "64", "--workers", "0", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "cmmasksd"]
    run = subprocess.run(
        [*launch, *arguments, str(tmp_path / "two")],
        env={key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
        | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("scenes val") == 1  # one process prints the table

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*arguments, str(tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("results.json", "expressions.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    rows = [json.loads(line) for line in (tmp_path / "one" / "expressions.jsonl").read_text().splitlines()]
    assert len({row["ref_id"] for row in rows}) == 51
    assert len({row["IoU"] for row in rows}) > 10  # the comparison compares something


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch):
    """As on a Mac's GPU, which has no processes of torchrun: each would score everything, into the same files."""
    from accelerate.state import AcceleratorState

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(UserError, match=r"2 processes were launched .* joins 1 on .*: start one process"):
            make_accelerator()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
