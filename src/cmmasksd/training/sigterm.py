"""SIGTERM, which schedulers send before they kill a job: the run saves after the current update and exits with 143."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Sigterm:
    """Whether SIGTERM has arrived.

    Attributes:
        received: SIGTERM has arrived in this process.
        at_once: exit on arrival instead, because there is nothing to save.
    """

    def __init__(self) -> None:
        self.received, self.at_once = False, True

    def handle(self, _signal: int, _frame: object) -> None:
        """The signal handler."""
        self.received = True
        if self.at_once:
            raise SystemExit(143)

    def received_anywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process has received it, so that all leave after the same update. Every process must ask after
        every update: several updates can take longer than a scheduler waits."""
        if accelerator.num_processes == 1:
            return self.received
        received = torch.tensor(float(self.received), device=accelerator.device)
        return bool(accelerator.gather(received).any())  # pyright: ignore (a tensor, as its argument)

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Exit on arrival within the block, or now if SIGTERM has arrived already."""
        self.at_once = True
        if self.received:
            raise SystemExit(143)
        yield
        self.at_once = False


@contextmanager
def sigterm() -> Iterator[Sigterm]:
    """Handle SIGTERM within the block. Threads other than the main one cannot receive signals; there nothing happens.

    Raises:
        SystemExit: 143, at the end of the block if SIGTERM arrived too late to interrupt anything.
    """
    stop = Sigterm()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.handle)
    try:
        yield stop
        if stop.received:
            raise SystemExit(143)
    finally:
        signal.signal(signal.SIGTERM, before)
