"""Segment many images, one after the other. An image is encoded once for all neighbouring sources about it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cmmasksd.data.images import read_frames
from cmmasksd.data.video import is_video, video_frames
from cmmasksd.errors import UserError
from cmmasksd.inference.base import BaseSegmenter, Segmentation
from cmmasksd.inference.sources import Source

Unit = tuple[int, int | None]
"""Unit of resuming: index of a group of neighbouring sources about one image, and its frame (None: a still image)."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The mask of one sentence in one image, or in one frame of it.

    Attributes:
        index: index of the source.
        source: the source.
        nth: index of the sentence within its source.
        frame: number of the frame, from 1; None for a still image.
        segmentation: the mask and its score.
        unit: the unit that the prediction belongs to.
        last: whether it is the last prediction of its unit.
    """

    index: int
    source: Source
    nth: int
    frame: int | None
    segmentation: Segmentation
    unit: Unit
    last: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that could not be read completely.

    Attributes:
        image: path or content of the image.
        reason: error in one line.
    """

    image: Path | bytes
    reason: str


def predict(
    segmenter: BaseSegmenter, sources: Sequence[Source], *, done: Container[Unit] = (), progress: bool = False
) -> Iterator[Prediction | Failure]:
    """Segment the images of all sources.

    Args:
        segmenter: see `load_segmenter`.
        sources: images, each with its sentences; see `find_sources`.
        done: units of an earlier run, which are skipped; see `json_rows`.
        progress: show a progress bar on a terminal.

    Yields:
        One prediction per sentence of every image or frame, in the order of the sources; and one failure per image
        that cannot be read, even if several sources name it.
    """
    failed: set[Path | bytes] = set()
    start = 0  # index of the first source of a group
    with tqdm(total=len(sources), unit="image", disable=not progress or len(sources) == 1 or None) as bar:
        for group, (image, members) in enumerate(groupby(sources, key=lambda source: source.image)):
            questions = [
                (index, source, nth) for index, source in enumerate(members, start) for nth in range(len(source.texts))
            ]
            try:
                yield from _segment(segmenter, image, questions, group, done)
            except UserError as error:
                if image not in failed:
                    failed.add(image)
                    yield Failure(image, str(error))
            bar.update(questions[-1][0] + 1 - start)
            start = questions[-1][0] + 1


def failure_summary(reasons: Sequence[str], images: int) -> str:
    """One line of less than 400 characters about the images that failed; the reason itself for a single image.

    Args:
        reasons: one line per image that failed.
        images: number of all images.
    """
    if images == 1:
        return reasons[0]
    limit = 270 // min(3, len(reasons))
    # cut at the front, which holds the folders of the path
    lines = [line if len(line) <= limit else f"…{line[1 - limit :]}" for line in reasons[:3]]
    if len(reasons) > 3:
        lines.append(f"and {len(reasons) - 3} more")
    return f"{len(reasons)} of {images} images could not be read, the others are done: {'; '.join(lines)}"


def _segment(
    segmenter: BaseSegmenter,
    image: Path | bytes,
    questions: list[tuple[int, Source, int]],
    group: int,
    done: Container[Unit],
) -> Iterator[Prediction]:
    """Predictions for one group. A question is the index of a source, the source, and the index of a sentence in it."""
    if (group, None) in done:
        return
    texts = [source.texts[nth] for _, source, nth in questions]
    for frame, pixels in _frames(image):
        if (group, frame) in done:
            continue
        segmentations = segmenter.decode(segmenter.encode([(pixels, texts)]))
        for question, segmentation in zip(questions, segmentations, strict=True):
            yield Prediction(*question, frame, segmentation, (group, frame), last=question is questions[-1])


def _frames(image: Path | bytes) -> Iterator[tuple[int | None, np.ndarray]]:
    return video_frames(image) if is_video(image) else read_frames(image)
