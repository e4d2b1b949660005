"""Data loaders whose workers survive SIGTERM, and whose UserErrors stay one line."""

from __future__ import annotations

import signal
from collections.abc import Generator
from typing import Any

from torch.utils.data import DataLoader

from cmmasksd.errors import UserError


def outlive_sigterm(_worker: int) -> None:
    """`worker_init_fn` of a loader: schedulers send SIGTERM to every process of a job, but the main one saves first.

    It fails when a worker dies before that, and ends its workers itself. The alarm ends a worker that has lost it.
    """
    if hasattr(signal, "alarm"):  # Windows has no such signals
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def loaded(loader: DataLoader) -> Generator[Any]:
    """The batches of a loader. A UserError of a worker keeps its message and loses its traceback."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError as error:  # torch sends the worker's traceback, whose last entry is the error
            raise UserError(str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]) from None
        yield batch
