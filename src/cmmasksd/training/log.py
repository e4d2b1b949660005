"""metrics.jsonl and the trackers: rows with the means of the losses since the last row, and with validation scores."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cmmasksd.errors import UserError, reason
from cmmasksd.files import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


class Meter:
    """Means of the named losses, and references (or images) per second, since the last `take`.

    Args:
        sums, counts: sum and number of values of each loss, to continue from.
    """

    def __init__(self, sums: dict[str, Tensor] | None = None, counts: dict[str, int] | None = None) -> None:
        self.sums, self.counts = sums or {}, counts or {}  # counts differ: the masked branches begin later
        self._seen, self._since = 0, time.perf_counter()

    def add(self, losses: dict[str, Tensor], seen: int) -> None:
        """Count one forward pass over `seen` references in all processes, without waiting for the device."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1
        self._seen += seen

    def take(self, speed: str) -> dict[str, float]:
        """The means by name, and the references per second under the name `speed`; starts again."""
        row = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        row[speed] = self._seen / (time.perf_counter() - self._since)
        self.restart()
        return row

    def restart(self) -> None:
        """Forget everything and restart the clock."""
        self.sums, self.counts, self._seen, self._since = {}, {}, 0, time.perf_counter()


class Log:
    """metrics.jsonl, and trackers that get the same rows.

    Args:
        out: folder of the run.
        config_yaml: written beside the log.
        updates: number of updates that a resumed run has done; rows after them are dropped, since they will be written
            again.
        validated: last update whose validation is done; later validations are dropped, too. None: all are done.
        trackers: started trackers, see `start_trackers`.

    Raises:
        UserError: the log of a resumed run holds anything but rows.
    """

    def __init__(
        self,
        out: Path,
        config_yaml: str,
        updates: int,
        validated: int | None = None,
        trackers: Sequence[GeneralTracker] = (),
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "metrics.jsonl"
        kept = _rows(file, updates, updates if validated is None else validated) if updates and file.exists() else []
        (out / "config.yaml").write_text(config_yaml, encoding="utf-8")
        write_text(file, "".join(kept))
        self.file, self.trackers = file.open("a", encoding="utf-8", newline="\n"), trackers

    def write(self, row: dict[str, float]) -> None:
        """Write one row; "step" is the update."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        values = {name: value for name, value in row.items() if name not in ("step", "epoch")}
        for tracker in self.trackers:
            tracker.log(values, step=int(row["step"]))

    def close(self) -> None:
        """Close the file and finish the trackers."""
        self.file.close()
        for tracker in self.trackers:
            tracker.finish()


def _rows(file: Path, updates: int, validated: int) -> list[str]:
    """The lines of a log up to an update. The last line may be cut short, as a crash leaves it."""
    kept = []
    *lines, _cut = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(row, dict) or type(step) is not int:
            raise UserError(f"{file}, line {number}, is not a row of a run's log: mend or remove it, then resume")
        if step <= (validated if "mIoU" in row else updates):
            kept.append(line.decode("utf-8") + "\n")
    return kept


def known_trackers(names: Sequence[str] | None) -> list[str]:
    """The trackers to use, by the names that accelerate has for them; None: TensorBoard where it is installed.

    Raises:
        UserError: accelerate offers no such tracker, or its package is not installed.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    installed = [tracker.value for tracker in get_available_trackers()]
    if names is None:
        return ["tensorboard"] if "tensorboard" in installed else []
    offered = sorted({tracker.value for tracker in LoggerType} - {"all"})
    for name in names:
        if name not in offered:
            raise UserError(f"training.trackers names {name!r}, which is not a tracker: use {', '.join(offered)}")
        if name not in installed:
            raise UserError(f"training.trackers names {name}, which is not installed: pip install {name}")
    return list(names)


def start_trackers(accelerator: Accelerator, settings: dict[str, Any], updates: int) -> list[GeneralTracker]:
    """Start the trackers that the accelerator was made with.

    Args:
        settings: the run's settings by dotted key, which trackers show beside the curves.
        updates: number of updates that a resumed run has done.

    Raises:
        UserError: a tracker cannot start, for example because its service wants a login.
    """
    plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
    try:
        accelerator.init_trackers(
            "cmmasksd", init_kwargs={"tensorboard": {"purge_step": updates + 1 if updates else None}}
        )
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # it would add a run of its own for them at every start
                tracker.store_init_configuration(plain)
    except Exception as error:  # each tracker raises its own
        raise UserError(f"a tracker of training.trackers cannot start: {reason(error)}") from error
    return accelerator.trackers
