"""What every data loader needs: workers that outlive a signal, and mistakes of the user in one line."""

from __future__ import annotations

import signal
from collections.abc import Generator
from typing import Any

from torch.utils.data import DataLoader

from cmmasksd.errors import UserError


def outlive_sigterm(_worker: int) -> None:
    """For a loader's workers: schedulers send SIGTERM to every process of a job, but the main one saves first, and
    fails when a worker dies before. It ends them itself; the alarm is for one that is left alone."""
    if hasattr(signal, "alarm"):  # Windows has none, nor such signals
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def loaded(loader: DataLoader) -> Generator[Any]:
    """What a loader yields; a mistake of the user that a worker finds arrives as it was said, without its traceback."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError as error:  # torch sends the worker's traceback, whose last entry is the error
            raise UserError(str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]) from None
        yield batch
