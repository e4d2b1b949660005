"""Engine: one thread that has the model, and a bounded queue before it. Requests that wait together are computed
together.

Everything that costs time or memory happens in that thread: decoding the image, the network, encoding the answer. So
what is in memory is one batch and the compressed files of those that wait, whatever clients send. A request that nobody
waits for any more is dropped where that is noticed first: before its image is decoded, or between two sentences.
"""

from __future__ import annotations

import base64
import io
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from cmmasksd.data.images import read_image
from cmmasksd.inference.base import Encoded, Segmentation
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.model.correlation import correlation
from cmmasksd.serving.settings import ServeSettings

MAP_SIDE, WORD_SIDE = 512, 64
"""The longer side of a probability map and of a word's map in pixels, at most."""

log = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The server is shutting down."""


@dataclass
class Job:
    """One request: an image file's content, K sentences, and what is wanted ("rle", "png", "probability", "words")."""

    image: bytes
    sentences: list[str]
    threshold: float
    want: frozenset[str]
    answer: Future[dict[str, Any]] = field(default_factory=Future)


class Engine:
    """The model behind a queue.

    Args:
        segmenter: used by the engine's thread alone from now on.
        settings: sizes of batch and queue, the limit of pixels.
        observe: called with (requests, sentences, seconds) of every batch, for the metrics.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        settings: ServeSettings,
        observe: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        self.segmenter, self.settings, self.observe = segmenter, settings, observe
        self._queue: queue.Queue[Job | None] = queue.Queue(settings.queue)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cmmasksd-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    def check(self) -> None:
        """Whether a request would be taken now.

        Raises:
            Busy, Stopped: no.
        """
        if self._stopping.is_set() or not self._thread.is_alive():
            raise Stopped
        if self._queue.full():
            raise Busy

    def submit(self, job: Job) -> Future[dict[str, Any]]:
        """Queue a request; its future gets the answer, or a UserError for an image that cannot be read.

        Raises:
            Busy, Stopped: see `check`.
        """
        self.check()
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise Busy from None
        return job.answer

    def close(self, seconds: float = 10.0) -> None:
        """Finish the batch at hand, tell those that wait that the server stops, end the thread."""
        self._stopping.set()
        with suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes a thread that waits
        self._thread.join(seconds)
        self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                _settle(job, Stopped())

    # -- in the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            jobs = self._next_batch()
            self._compute(jobs)
        self._refuse_waiting()

    def _next_batch(self) -> list[Job]:
        jobs, until = [], None
        while len(jobs) < self.settings.max_batch:
            try:
                if until is None:
                    job = self._queue.get()
                    until = time.monotonic() + self.settings.max_wait
                else:
                    job = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                break
            if not job.answer.cancelled():
                jobs.append(job)
        return jobs

    def _compute(self, jobs: Sequence[Job]) -> None:
        ready = []
        for job in jobs:
            if job.answer.cancelled():  # while the images before it were read
                continue
            try:
                ready.append((job, read_image(job.image, exif=True, max_pixels=self.settings.max_pixels)))
            except Exception as error:
                _settle(job, error)
        if not ready:
            return
        try:
            self._answer(ready)
        except Exception as error:
            # where, but not what: a message may hold a sentence
            log.error(
                "%s in a batch of %d\n%s",
                type(error).__name__,
                len(ready),
                "".join(traceback.format_tb(error.__traceback__)),
            )
            for job, pixels in ready:  # one request must not cost the others their answers
                try:
                    if len(ready) == 1:
                        raise error
                    self._answer([(job, pixels)])
                except Exception as own:
                    _settle(job, own)

    def _answer(self, ready: Sequence[tuple[Job, np.ndarray]]) -> None:
        started = time.monotonic()
        encoded = self.segmenter.encode([(pixels, job.sentences) for job, pixels in ready])
        found = self.segmenter.decode(encoded, [job.threshold for job, _ in ready])
        results: list[list[dict[str, Any]]] = [[] for _ in ready]
        for nth, owner in enumerate(encoded.owner):
            if all(job.answer.cancelled() for job, _ in ready):
                return
            job, one = ready[owner][0], next(found)
            if not job.answer.cancelled():
                result = describe(one, job.want) | {"truncated": bool(encoded.tokens.truncated[nth])}
                if "words" in job.want:
                    result["words"] = word_maps(self.segmenter, encoded, nth)
                results[owner].append(result)
        self.observe(len(ready), len(encoded.texts), time.monotonic() - started)
        for (job, pixels), of_job in zip(ready, results, strict=True):
            height, width = pixels.shape[:2]
            _settle(job, {"width": width, "height": height, "threshold": job.threshold, "results": of_job})


def _settle(job: Job, answer: dict[str, Any] | Exception) -> None:
    with suppress(InvalidStateError):  # nobody waits any more
        if isinstance(answer, Exception):
            job.answer.set_exception(answer)
        else:
            job.answer.set_result(answer)


def describe(found: Segmentation, want: frozenset[str]) -> dict[str, Any]:
    """A segmentation as JSON can hold it: text, score, area, box, and what is wanted of rle, png and probability."""
    shown: dict[str, Any] = {"text": found.text, "score": found.score, "area": found.area, "box": found.box}
    if "rle" in want:
        shown["rle"] = found.rle
    if "png" in want:
        file = io.BytesIO()
        Image.fromarray(found.mask).save(file, "PNG")
        shown["png"] = base64.b64encode(file.getvalue()).decode()
    if "probability" in want:
        height, width = _fitted(found.mask.shape, MAP_SIDE)
        small = Image.fromarray(found.probability).resize((width, height), Image.Resampling.BILINEAR)
        shown["probability"] = _map(np.asarray(small))
    return shown


def word_maps(segmenter: Segmenter, encoded: Encoded, nth: int) -> list[dict[str, Any]]:
    """Where in the image each word of a sentence correlates with the patches.

    Words are those of the tokenizer; a word of several pieces gets their mean. Each map is scaled from its own lowest
    to its highest value, so maps of two words say nothing about which of them correlates more.
    """
    placement, text = encoded.placements[encoded.owner[nth]], encoded.texts[nth]
    index = torch.tensor([encoded.owner[nth]], device=segmenter.device)
    image, sentence = encoded.features.select(index), encoded.sentences.select(slice(nth, nth + 1))
    cosine = correlation(image, sentence)[0].T.unflatten(1, image.grid)  # (L, h, w)
    placement = replace(placement, original=_fitted(placement.original, WORD_SIDE))
    tokenizer, ids = segmenter.processor.tokenizer, encoded.tokens.word_ids[nth]
    read = tokenizer(
        text,
        truncation=True,
        max_length=segmenter.processor.max_tokens,
        split_special_tokens=True,
        return_offsets_mapping=True,
    )
    spans = read["offset_mapping"]
    words = []
    for word in range(int(ids.max()) + 1):
        pieces = (ids == word).nonzero()[:, 0].tolist()
        if not pieces:
            continue
        start, end = spans[pieces[0]][0], spans[pieces[-1]][1]
        values = segmenter.processor.restore(cosine[pieces].mean(0, keepdim=True), placement)[0].cpu().numpy()
        spread = float(values.max() - values.min())
        shown = _map((values - values.min()) / spread) if spread > 0 else None
        words.append({"text": text[start:end], "start": start, "end": end, "map": shown})
    return words


def _fitted(size: tuple[int, ...], side: int) -> tuple[int, int]:
    """(H, W) shrunk until its longer side fits."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _map(values: np.ndarray) -> dict[str, Any]:
    """(h, w) in [0, 1] as bytes, row by row."""
    data = np.rint(values * 255).clip(0, 255).astype(np.uint8).tobytes()
    return {"width": values.shape[1], "height": values.shape[0], "data": base64.b64encode(data).decode()}
