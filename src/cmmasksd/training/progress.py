"""The place of a run, as state.pt keeps it, and which run may continue from it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cmmasksd.config import Config
from cmmasksd.errors import UserError
from cmmasksd.training.checkpoint import refused
from cmmasksd.training.log import Meter, say
from cmmasksd.training.optim import rate_scale


@dataclass
class Progress:
    """The place of a run.

    Attributes:
        per_epoch: number of updates per epoch.
        epochs: number of epochs of the whole run.
        config: the settings that a resumed run must share, see `compared`.
        update: number of updates done.
        validated: number of epochs done, their validation included.
        synced: whether decoders that are not shared have begun, see `MaskedSelfDistillation.sync_own_decoders`.
        best: best mIoU so far; -1 before the first validation.
        validation: scores of the last validation.
        meter: losses since the last row of the log.
    """

    per_epoch: int
    epochs: int
    config: dict[str, Any]
    update: int = 0
    validated: int = 0
    synced: bool = False
    best: float = -1.0
    validation: dict[str, float] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)

    @property
    def total(self) -> int:
        """Number of updates of the whole run."""
        return self.per_epoch * self.epochs

    @property
    def done(self) -> float:
        """Fraction of the run that is done."""
        return self.update / self.total

    def as_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for state.pt."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "meter"}
        return values | {"sums": self.meter.sums, "counts": self.meter.counts}

    def resumed(self, saved: Any, config: Config, file: Path) -> Progress:
        """The place that a run continues from. A longer run is announced, since its schedule changes.

        Args:
            saved: "progress" of a state, unchecked.
            config: settings of this run, resolved; `self` is the place where it would start afresh.
            file: the state, for messages.

        Raises:
            UserError: the values are not a run's, or the run has other settings, other data, or enough epochs already.
        """
        if not _is_saved_progress(saved):
            raise refused(file, "its place in the run (progress) is not what a run stores")
        out, training, distillation = config.training.out, config.training, config.distillation
        _require_same(config, self.config, saved["config"], out)
        if saved["per_epoch"] != self.per_epoch:
            raise UserError(
                f"{file} is from a run with {saved['per_epoch']} updates per epoch, this one has {self.per_epoch}: "
                "resume with the same data and training.batch"
            )
        meter = Meter(saved["sums"], saved["counts"])
        values = {name: value for name, value in saved.items() if name not in ("sums", "counts")}
        before = Progress(**values, meter=meter)
        now = Progress(**values | {"epochs": self.epochs, "config": self.config}, meter=meter)
        if before.epochs != now.epochs:
            if now.total <= now.update:
                raise UserError(
                    f"the run in {out} has done {now.update / now.per_epoch:g} epochs, training.epochs is "
                    f"{now.epochs}: give more, or {before.epochs} as before"
                )
            rate = partial(rate_scale, now.update, warmup=training.warmup_steps, final=training.final_lr_scale)
            say(
                f"training.epochs {before.epochs} is now {now.epochs}: update {now.update} continues on the schedule "
                f"of {now.total} updates; factor of the learning rate {rate(before.total):.3g}, now "
                f"{rate(now.total):.3g}; of the masked branches {distillation.ramp(before.done):.3g}, now "
                f"{distillation.ramp(now.done):.3g}"
            )
        now.synced = before.synced and distillation.ramp(now.done) > 0  # in an extended run they may wait again
        return now


def _is_saved_progress(values: Any) -> bool:
    """Whether values from a file are what `Progress.as_dict` returns."""
    kinds = dict.fromkeys(("update", "per_epoch", "epochs", "validated"), int) | {"synced": bool, "best": float}
    kinds |= dict.fromkeys(("validation", "sums", "counts", "config"), dict)
    return (
        isinstance(values, dict)
        and values.keys() == kinds.keys()
        and all(type(values[name]) is kind for name, kind in kinds.items())
        and all(type(score) is float for score in values["validation"].values())
        and all(isinstance(value, Tensor) and value.ndim == 0 for value in values["sums"].values())
        and values["counts"].keys() == values["sums"].keys()
        and all(type(count) is int and 0 < count < 2**53 for count in values["counts"].values())
        and all(isinstance(key, str) and not isinstance(value, Tensor) for key, value in values["config"].items())
        and -1 <= values["best"] <= 1
        and 0 < values["epochs"] < 2**31
        and values["validated"] >= 0
        and 0 <= values["update"] - values["validated"] * values["per_epoch"] <= values["per_epoch"] > 0
    )


def compared(config: Config) -> dict[str, Any]:
    """The settings that a resumed run must share, by dotted key: all that decide what an update does. The number of
    epochs is compared by itself, since it may grow."""
    free = {"out", "epochs", "log_every", "save_every", "resume", "allow_change", "workers", "trackers"}
    parts = config.as_dict()
    return {f"{part}.{key}": value for part in parts for key, value in parts[part].items() if key not in free}


def _require_same(config: Config, new: dict[str, Any], old: dict[str, Any], out: Path) -> None:
    """Refuse to resume with the settings of another run.

    Args:
        config: settings of this run, resolved.
        new, old: `compared` of this run and of the one in `out`.

    Raises:
        UserError: naming the keys that differ and that `training.allow_change` does not name.
    """
    allowed = set(config.training.allow_change)
    known = {f"{part}.{key}" for part, settings in config.as_dict().items() for key in settings}
    if unknown := sorted(allowed - known):
        raise UserError(
            f"training.allow_change names {reprlib.repr(unknown[0])}, which is not a setting: give such as training.lr"
        )
    if fixed := sorted(filter(_is_fixed, allowed)):
        raise UserError(f"training.allow_change names {fixed[0]}, which decides what is trained: start a new run")
    if old.keys() != new.keys():
        raise UserError(
            f"the run in {out} was trained by another version, whose settings have other names: start afresh in "
            "another folder"
        )
    differ = [key for key in new if key not in allowed and old[key] != new[key]]
    if differ:
        named = [f"{key} {reprlib.repr(old[key])} (now {reprlib.repr(new[key])})" for key in differ[:3]]
        named += [f"and {len(differ) - 3} more"] if len(differ) > 3 else []
        allow = f", or let them change with --training.allow_change {','.join(differ[:3])}"
        raise UserError(
            f"the run in {out} has other settings: {', '.join(named)}; resume with the same ones"
            f"{'' if any(map(_is_fixed, differ)) else allow}"
        )


def _is_fixed(key: str) -> bool:
    """Whether a setting decides which weights there are, or which of them are trained."""
    sizes = ("decoder_width", "decoder_layers", "decoder_heads", "decoder_mlp", "head_width")
    fixed = {
        "training.freeze_image",
        "training.freeze_text",
        *(f"model.{name}" for name in ("backbone", "weights", *sizes)),
    }
    fixed |= {f"distillation.{name}" for name in ("vision", "vision_level", "joint", "share_weights")}
    return key in fixed
