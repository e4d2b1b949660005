"""metrics.jsonl: what it holds, and the means that a run writes into it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch import Tensor

from cmmasksd.errors import UserError
from cmmasksd.files import write_text


class Meter:
    """Means of the named losses, and references per second, since the last `take`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # apart for each loss: those of the masked branches begin later
        self.since = time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Count one forward pass, without waiting for the device."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self, references: int) -> dict[str, float]:
        """The means, and references per second; start again.

        Args:
            references: seen since the last `take`, in all processes.
        """
        row = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        row["references_per_s"] = references / (time.perf_counter() - self.since)
        self.__init__()
        return row


class Log:
    """metrics.jsonl, and TensorBoard where it is installed.

    Args:
        out: folder of the run.
        config_yaml: written beside the log.
        updates: number of updates that a resumed run has done; rows after them are dropped, since they will be written
            again.
        validated: last update whose validation is done; later validations are dropped, too. None: all are done.

    Raises:
        UserError: when the log of a resumed run holds anything but rows.
    """

    def __init__(self, out: Path, config_yaml: str, updates: int, validated: int | None = None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "metrics.jsonl"
        kept = _rows(file, updates, updates if validated is None else validated) if updates and file.exists() else []
        (out / "config.yaml").write_text(config_yaml, encoding="utf-8")
        write_text(file, "".join(kept))
        self.file = file.open("a", encoding="utf-8", newline="\n")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=updates or None)

    def write(self, row: dict[str, float]) -> None:
        """Write one row; "step" is the update."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.board:
            self.board.close()


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
