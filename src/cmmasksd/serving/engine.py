"""Engine: one thread that owns the model, behind a bounded queue. Waiting requests are batched.

Decoding the image, the network and encoding the response all happen in that thread. So memory holds one batch and the
compressed files of the waiting requests, whatever clients send. A request whose client has left is dropped before its
image is decoded, or between two sentences.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cmmasksd.data.images import read_image
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.serving.results import sentence_result, word_maps
from cmmasksd.serving.settings import ServeSettings

log = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The server is shutting down."""


@dataclass
class Job:
    """One request.

    Attributes:
        image: content of an image file.
        sentences: K sentences.
        threshold: a pixel above this probability is in the mask.
        min_score: the mask of a sentence whose presence is below it is empty.
        want: optional fields of the results: "rle", "png", "probability", "words".
        answer: future of the response; cancelled if nobody waits for it.
    """

    image: bytes
    sentences: list[str]
    threshold: float
    min_score: float
    want: frozenset[str]
    answer: Future[dict[str, Any]] = field(default_factory=Future)


class Engine:
    """The model behind a queue.

    Args:
        segmenter: the model; only the thread of the engine uses it from now on.
        settings: sizes of batch and queue, maximum number of pixels.
        observe: called with (requests, sentences, seconds) of every batch.
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
        """Number of requests in the queue."""
        return self._queue.qsize()

    def check(self) -> None:
        """Check that a request would be accepted now.

        Raises:
            Busy, Stopped: it would not.
        """
        if self._stopping.is_set() or not self._thread.is_alive():
            raise Stopped
        if self._queue.full():
            raise Busy

    def submit(self, job: Job) -> Future[dict[str, Any]]:
        """Queue a request. Its future gets the response, or a UserError if the image cannot be read.

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
        """Finish the current batch, refuse the waiting requests, end the thread."""
        self._stopping.set()
        with suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes the thread
        self._thread.join(seconds)
        self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        with suppress(queue.Empty):
            while True:
                if (job := self._queue.get_nowait()) is not None:
                    _settle(job, Stopped())

    # -- in the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            jobs = self._next_batch()
            self._compute(jobs)
        self._refuse_waiting()

    def _next_batch(self) -> list[Job]:
        jobs, deadline = [], None
        while len(jobs) < self.settings.max_batch:
            try:
                if deadline is None:
                    job = self._queue.get()
                    deadline = time.monotonic() + self.settings.max_wait
                else:
                    job = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                break
            if not job.answer.cancelled():
                jobs.append(job)
        return jobs

    def _compute(self, jobs: Sequence[Job]) -> None:
        batch = []
        for job in jobs:
            if job.answer.cancelled():  # while the images before it were decoded
                continue
            try:
                batch.append((job, read_image(job.image, exif=True, max_pixels=self.settings.max_pixels)))
            except Exception as error:
                _settle(job, error)
        if not batch:
            return
        try:
            self._answer(batch)
        except Exception as error:
            # the place but not the message, which may hold a sentence
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s in a batch of %d\n%s", type(error).__name__, len(batch), frames)
            if len(batch) == 1:
                _settle(batch[0][0], error)
                return
            for item in batch:  # the request that fails must not cost the others their responses
                try:
                    self._answer([item])
                except Exception as item_error:
                    _settle(item[0], item_error)

    def _answer(self, batch: Sequence[tuple[Job, np.ndarray]]) -> None:
        started = time.monotonic()
        encoded = self.segmenter.encode([(pixels, job.sentences) for job, pixels in batch])
        segmentations = self.segmenter.decode(
            encoded, [job.threshold for job, _ in batch], [job.min_score for job, _ in batch]
        )
        results: list[list[dict[str, Any]]] = [[] for _ in batch]
        for index, owner in enumerate(encoded.owner):
            if all(job.answer.cancelled() for job, _ in batch):
                return
            job, segmentation = batch[owner][0], next(segmentations)
            if not job.answer.cancelled():
                result = sentence_result(segmentation, job.want)
                result["truncated"] = bool(encoded.tokens.truncated[index])
                if "words" in job.want:
                    result["words"] = word_maps(self.segmenter, encoded, index)
                results[owner].append(result)
        self.observe(len(batch), len(encoded.texts), time.monotonic() - started)
        for (job, pixels), of_job in zip(batch, results, strict=True):
            height, width = pixels.shape[:2]
            limits = {"threshold": job.threshold, "min_score": job.min_score}
            _settle(job, {"width": width, "height": height, **limits, "results": of_job})


def _settle(job: Job, answer: dict[str, Any] | Exception) -> None:
    with suppress(InvalidStateError):  # cancelled: nobody waits
        if isinstance(answer, Exception):
            job.answer.set_exception(answer)
        else:
            job.answer.set_result(answer)
