"""Metrics of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Counters and times in a registry of their own, so that several applications can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "cmmasksd_requests", "Requests to /v1/segment by status", ["status"], registry=registry
        )
        self._seconds = Histogram("cmmasksd_request_seconds", "From request head to response", registry=registry)
        self._batch = Histogram(
            "cmmasksd_batch_requests", "Requests per batch", buckets=[1, 2, 4, 8, 16, 32], registry=registry
        )
        self._batch_seconds = Histogram("cmmasksd_batch_seconds", "Time per batch", registry=registry)
        self._sentences = Counter("cmmasksd_sentences", "Sentences computed", registry=registry)

    def count_request(self, status: int, seconds: float) -> None:
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def count_batch(self, requests: int, sentences: int, seconds: float) -> None:
        self._batch.observe(requests)
        self._sentences.inc(sentences)
        self._batch_seconds.observe(seconds)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Report the number of waiting requests."""
        Gauge("cmmasksd_waiting", "Requests in the queue", registry=self.registry).set_function(waiting)

    def exposition(self) -> bytes:
        """All values in Prometheus's text format."""
        return generate_latest(self.registry)
