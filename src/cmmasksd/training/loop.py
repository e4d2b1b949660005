"""train(config): the whole run as a straight line: build, then for every epoch step, log, validate, save.

It runs on a CPU, one GPU or several. For more than one process start it with `torchrun`, or with `accelerate launch` on
GPUs (on a CPU, that starts one process only). On a CPU a run that was interrupted and resumed gives the same bits as
one that was not.
"""

from __future__ import annotations

import math
import os
import reprlib
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmmasksd.config import Config, TrainingConfig
from cmmasksd.data.datasets import open_dataset
from cmmasksd.data.workers import loaded
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.errors import UserError
from cmmasksd.evaluation.evaluate import evaluate, make_accelerator
from cmmasksd.training.batches import Batch, TrainingBatches, TrainingItems, training_loader
from cmmasksd.training.checkpoint import (
    STATE,
    read_state,
    recover,
    refused,
    require_resumable,
    restore_state,
    save_model,
    save_state,
)
from cmmasksd.training.log import Log, Meter
from cmmasksd.training.optim import parameter_groups, rate_scale, set_rates

if TYPE_CHECKING:
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor


def train(config: Config) -> dict[str, Any]:
    """Train a model as configured, or resume a run.

    SIGTERM, which schedulers send, saves at the end of the current update and leaves; `resume` then gives the same run
    as without the interruption. At the start and in a validation, when there is nothing to save, it leaves at once.

    Args:
        config: everything. What is None in `config.model` is set to what it resolves to.

    Returns:
        The last validation: "oIoU", "mIoU", …, and "best" (the best mIoU so far).

    Raises:
        UserError: when the configuration does not fit the data, the model or the folder.
        SystemExit: 143, after SIGTERM.
    """
    with _sigterm() as stop:
        scores = _run(config, stop)
        if stop.asked:  # too late to interrupt anything
            raise SystemExit(143)
    return scores


def _run(config: Config, stop: SimpleNamespace) -> dict[str, Any]:
    from accelerate.utils import set_seed
    from tqdm import tqdm

    how, distillation, workers = config.training, config.distillation, config.data.workers
    out = Path(how.out)
    resume_from = _resume_point(out, how.resume)
    accelerator = make_accelerator(how.precision)
    main, world = accelerator.is_main_process, accelerator.num_processes
    batch_size, accumulate = split_batch(how, world)
    set_seed(how.seed)  # the same weights in every process
    model, processor = build(config)
    state = None
    if resume_from is not None:
        state = read_state(resume_from, world)
        _check_progress(state["progress"], resume_from)
        _require_same(config, state["progress"]["config"], out)
    objective = MaskedSelfDistillation(model, distillation, model.config.clip_config.projection_dim)
    groups = parameter_groups(objective, lr=how.lr, clip_lr_scale=how.clip_lr_scale, weight_decay=how.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=(0.9, 0.98))
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    set_seed(how.seed + accelerator.process_index)  # but different masks

    train_data, val_data = open_dataset(config.data.training), open_dataset(config.data.validation)
    items = TrainingItems(train_data, processor, stride=model.stride, seed=how.seed, greyscale=config.data.greyscale)
    batches = TrainingBatches(
        train_data.groups(),
        batch_size,
        per_image=config.data.per_image,
        seed=how.seed,
        rank=accelerator.process_index,
        world=world,
    )
    per_epoch = len(batches) // accumulate  # updates
    if not per_epoch:
        raise UserError(f"{batches.total} references are fewer than training.batch {how.batch}: lower it")
    total = per_epoch * how.epochs
    references = batches.batch_size * accumulate * world  # of one update
    less = "" if references == how.batch else f" (training.batch is {how.batch}, the data has {batches.total})"
    _say(f"{references} references per update{less} = {_count(world)} × {batches.batch_size} × accumulate {accumulate}")

    update, validated, best, validation, meter = 0, 0, -1.0, {}, Meter()
    synced = False  # whether own decoders have begun, see `share_weights`
    if state is not None and resume_from is not None:
        progress = state["progress"]
        update, validated, best = progress["update"], progress["validated"], progress["best"]
        validation = progress["validation"]
        synced = progress["synced"] and distillation.ramp(update / total) > 0  # an extended run may wait again
        meter.sums, meter.counts = progress["sums"], progress["counts"]
        if progress["per_epoch"] != per_epoch:
            raise UserError(
                f"{resume_from} is of a run with {progress['per_epoch']} updates per epoch, this one has {per_epoch}: "
                "resume with the same data and training.batch"
            )
        if (before := progress["epochs"]) != how.epochs:
            if total <= update:
                raise UserError(
                    f"the run in {out} has done {update / per_epoch:g} epochs, training.epochs is {how.epochs}: give "
                    f"more, or {before} as before"
                )
            old, new = update / (per_epoch * before), update / total
            rate = partial(rate_scale, update, warmup=how.warmup_steps, final=how.final_lr_scale)
            _say(
                f"training.epochs {before} is now {how.epochs}: update {update} continues on the schedule of {total} "
                f"updates; factor of the learning rate {rate(per_epoch * before):.3g}, now {rate(total):.3g}; of the "
                f"masked branches {distillation.ramp(old):.3g}, now {distillation.ramp(new):.3g}"
            )
        restore_state(state, wrapped, optimizer, accelerator.process_index, resume_from)
        del state

    config_yaml = config.as_yaml()

    def save() -> None:
        progress = {"update": update, "per_epoch": per_epoch, "epochs": how.epochs, "validated": validated}
        progress |= {"synced": synced, "best": best, "validation": validation, "config": compared(config)}
        progress |= {"sums": meter.sums, "counts": meter.counts}
        save_state(out / f"{STATE}.new", wrapped, optimizer, accelerator, progress)
        if main:
            file, masked = out / f"{STATE}.new", objective.own_weights()
            save_model(out / "last", model, processor, config_yaml, masked=masked, state=file)
        accelerator.wait_for_everyone()

    def terminated() -> bool:
        """Whether any process has got SIGTERM: all leave after the same update. They ask each other after every one,
        since many updates may take longer than a scheduler waits."""
        if world == 1:
            return stop.asked
        asked = torch.tensor(float(stop.asked), device=accelerator.device)
        return bool(accelerator.gather(asked).any())  # pyright: ignore

    log = Log(out, config_yaml, updates=update, validated=validated * per_epoch) if main else None
    bar = tqdm(total=total * references, initial=update * references, desc="train", unit="ref", disable=not main)
    logged, losses, health = update, {}, torch.zeros(2)
    for epoch in range(validated, how.epochs):
        loader = training_loader(items, batches.at(epoch, start=(update - epoch * per_epoch) * accumulate), workers)
        stop.at_once = False
        with closing(loaded(loader)) as source:
            while update < (epoch + 1) * per_epoch:
                objective.train()
                scale = rate_scale(update, total, warmup=how.warmup_steps, final=how.final_lr_scale)
                ramp = distillation.ramp(update / total)
                if ramp > 0 and not synced:
                    for parameter in objective.sync_own_decoders():
                        for moment in optimizer.state.get(parameter, {}).values():
                            moment.zero_()
                    synced = True
                set_rates(optimizer, scale)
                for part in range(accumulate):
                    last_part = part + 1 == accumulate  # processes exchange gradients once per update
                    with nullcontext() if last_part else accelerator.no_sync(wrapped):
                        losses = _losses(wrapped, next(source), processor, accelerator.device, ramp)
                        accelerator.backward(losses["loss"] / accumulate)
                    meter.add(losses)
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), how.max_grad_norm)
                health = torch.stack([losses["loss"].detach(), torch.as_tensor(norm)])
                _step(optimizer, update + 1)
                update += 1
                bar.update(references)
                if update % how.log_every == 0 or update == total:
                    row = meter.take(references * (update - logged))
                    logged = update
                    _require_finite(health, objective, update)
                    row |= {"lr": how.lr * scale, "ramp": ramp, "grad_norm": float(health[1])}
                    bar.set_postfix(loss=f"{row['loss']:.3f}", seg=f"{row['seg']:.3f}")
                    if log:
                        log.write({"step": update, "epoch": update / per_epoch, **row})
                leaves = terminated()
                if leaves or (how.save_every and update % how.save_every == 0 and update % per_epoch):
                    _require_finite(health, objective, update)
                    save()
                if leaves:
                    raise SystemExit(143)
        _require_finite(health, objective, update)
        if epoch + 1 == how.epochs or (epoch + 1) % how.validate_every == 0:
            save()
            stop.at_once = True  # a validation can take longer than a scheduler waits
            if stop.asked:
                raise SystemExit(143)
            bar.set_postfix_str("validating")
            limit = config.data.val_references
            validation = evaluate(
                model, processor, val_data, accelerator=accelerator, workers=workers, references=limit, progress=False
            ).scores
            stop.at_once = False
            if log:
                log.write({"step": update, "epoch": epoch + 1, **validation})
                bar.write(
                    f"epoch {epoch + 1}: {val_data.name} {val_data.split} "
                    f"oIoU {100 * validation['oIoU']:.2f}  mIoU {100 * validation['mIoU']:.2f}"
                )
            if validation["mIoU"] > best:
                best = validation["mIoU"]
                if main:
                    save_model(out / "best", model, processor, config_yaml, masked=objective.own_weights())
            meter, logged = Meter(), update  # its clock would count the validation
        validated = epoch + 1
        save()
    bar.close()
    if log:
        log.close()
    return {**validation, "best": best}


@contextmanager
def _sigterm() -> Iterator[SimpleNamespace]:
    """Note SIGTERM as `asked`, and leave at once while `at_once`. Only the main thread can be told of signals."""
    stop = SimpleNamespace(asked=False, at_once=True)

    def handle(_signal: int, _frame: object) -> None:
        stop.asked = True
        if stop.at_once:
            raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def split_batch(how: TrainingConfig, processes: int) -> tuple[int, int]:
    """References per step and process, and steps per update.

    Raises:
        UserError: when the processes cannot share `batch` evenly.
    """

    def step(batch: int) -> int:
        """References per step and process; 0: they do not fit."""
        share = batch // processes
        size = min(how.batch_size or share, share)
        return size if size and batch % (processes * size) == 0 else 0

    assert how.batch is not None
    if size := step(how.batch):
        return size, how.batch // (processes * size)
    below = next((batch for batch in range(how.batch - 1, 0, -1) if step(batch)), None)
    above = next(batch for batch in count(how.batch + 1) if step(batch))
    size = min(how.batch_size or how.batch, max(1, how.batch // processes))
    raise UserError(
        f"training.batch {how.batch} cannot be divided into steps of {size} references on {_count(processes)}: use "
        f"{f'{below} or ' if below else ''}{above}"
    )


def build(config: Config) -> tuple[CMMaskSDModel, CMMaskSDProcessor]:
    """The model to train and its processor: a new one on the configured backbone, or `weights`.

    What is None of `config.model`'s size, resize and max_tokens is set to what it resolves to.

    Raises:
        UserError: when the backbone or the weights cannot be loaded, or the sizes do not fit.
    """
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

    how = config.model
    if how.weights is None:
        source, trained = how.backbone, None
        model = CMMaskSDModel.from_backbone(
            source,
            decoder_width=how.decoder_width,
            decoder_layers=how.decoder_layers,
            decoder_heads=how.decoder_heads,
            decoder_mlp=how.decoder_mlp,
            head_width=how.head_width,
            dropout=how.dropout,
        )
        default = {"size": (128, 128), "resize": "warp", "max_tokens": 48}
    else:
        source = how.weights
        model, trained = CMMaskSDModel.from_pretrained(source), CMMaskSDProcessor.from_pretrained(source)
        default = {"size": trained.size, "resize": trained.resize, "max_tokens": trained.max_tokens}
    for name, value in default.items():
        given = getattr(how, name)
        if given is None:
            setattr(how, name, value)
        elif trained is not None and given != value:
            _say(f"model.{name} is {given}, in place of {value}, which {source} was trained with")
    assert how.size is not None
    assert how.resize is not None
    assert how.max_tokens is not None
    model.clip.logit_scale.requires_grad_(False)  # contrastive training's temperature: nothing here depends on it
    if config.training.freeze_text:
        model.clip.text_model.requires_grad_(False)
        model.clip.text_projection.requires_grad_(False)
    clip = model.config.clip_config
    context = clip.text_config.max_position_embeddings
    if not 3 <= how.max_tokens <= context:
        raise UserError(f"model.max_tokens {how.max_tokens} does not fit {source}: choose from 3 to {context}")
    patch_size = clip.vision_config.patch_size
    if trained is None:
        processor = CMMaskSDProcessor.from_backbone(
            source, how.size, patch_size=patch_size, resize=how.resize, max_tokens=how.max_tokens
        )
    else:
        processor = CMMaskSDProcessor(
            trained.tokenizer,
            how.size,
            patch_size=patch_size,
            resize=how.resize,
            max_tokens=how.max_tokens,
            mean=trained.mean,
            std=trained.std,
        )
    return model, processor


def _resume_point(out: Path, resume: bool) -> Path | None:
    """The state to resume from; None for a new run."""
    recover(out / "last")
    state = out / "last" / STATE
    require_resumable(state, out, resume, "--training.out")
    return state if resume else None


def compared(config: Config) -> dict[str, Any]:
    """The settings that a run must be resumed with, by dotted key: all that decide what an update does. The number of
    epochs is checked apart, since it may grow."""
    free = {"out", "epochs", "log_every", "save_every", "resume", "allow_change", "workers"}
    parts = config.as_dict()
    return {f"{part}.{key}": value for part in parts for key, value in parts[part].items() if key not in free}


def _require_same(config: Config, old: dict[str, Any], out: Path) -> None:
    """Refuse to resume with settings of another run.

    Args:
        config: of this run, resolved.
        old: the run in `out`, see `compared`.

    Raises:
        UserError: naming the keys that differ and that `training.allow_change` does not name.
    """
    new, allowed = compared(config), set(config.training.allow_change)
    known = {f"{part}.{key}" for part, settings in config.as_dict().items() for key in settings}
    if unknown := sorted(allowed - known):
        raise UserError(
            f"training.allow_change names {reprlib.repr(unknown[0])}, which is not a setting: give such as training.lr"
        )
    if fixed := sorted(key for key in allowed if _is_fixed(key)):
        raise UserError(f"training.allow_change names {fixed[0]}, which decides what is trained: start a new run")
    if old.keys() != new.keys():
        raise UserError(
            f"the run in {out} was trained by another version, whose settings have other names: start afresh in "
            "another folder"
        )
    differ = [key for key in new if key not in allowed and old[key] != new[key]]
    if differ:
        some = [f"{key} {reprlib.repr(old[key])} (now {reprlib.repr(new[key])})" for key in differ[:3]]
        some += [f"and {len(differ) - 3} more"] if len(differ) > 3 else []
        fixed = any(map(_is_fixed, differ))
        allow = "" if fixed else f", or let them change with --training.allow_change {','.join(differ[:3])}"
        raise UserError(f"the run in {out} has other settings: {', '.join(some)}; resume with the same ones{allow}")


def _is_fixed(key: str) -> bool:
    """Whether a setting decides which weights there are, or which of them are trained."""
    sizes = ("decoder_width", "decoder_layers", "decoder_heads", "decoder_mlp", "head_width")
    fixed = {"training.freeze_text", *(f"model.{name}" for name in ("backbone", "weights", *sizes))}
    fixed |= {f"distillation.{name}" for name in ("vision", "vision_level", "joint", "share_weights")}
    return key in fixed


def _check_progress(progress: Any, file: Path) -> None:
    """Check the types of what `save` in `_run` stores.

    Raises:
        UserError: for anything else.
    """
    kinds = dict.fromkeys(("update", "per_epoch", "epochs", "validated"), int) | {"synced": bool, "best": float}
    kinds |= dict.fromkeys(("validation", "sums", "counts", "config"), dict)
    good = isinstance(progress, dict) and progress.keys() == kinds.keys()
    good = good and all(type(progress[name]) is kind for name, kind in kinds.items())
    good = good and all(type(value) is float for value in progress["validation"].values())
    good = good and all(isinstance(value, Tensor) and value.ndim == 0 for value in progress["sums"].values())
    good = good and progress["counts"].keys() == progress["sums"].keys()
    good = good and all(type(value) is int and value > 0 for value in progress["counts"].values())
    good = good and all(isinstance(key, str) for key in progress["config"])
    good = good and not any(isinstance(value, Tensor) for value in progress["config"].values())
    good = good and -1 <= progress["best"] <= 1 and progress["epochs"] < 2**31
    good = good and all(value < 2**53 for value in progress["counts"].values())
    good = good and progress["validated"] >= 0 and progress["epochs"] > 0
    if good:
        in_epoch = progress["update"] - progress["validated"] * progress["per_epoch"]
        good = 0 <= in_epoch <= progress["per_epoch"] > 0
    if not good:
        raise refused(file, "its place in the run (progress) is not what a run stores")


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _say(line: str) -> None:
    """Print a line, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _losses(
    objective: nn.Module, batch: Batch, processor: CMMaskSDProcessor, device: torch.device, ramp: float
) -> dict[str, Tensor]:
    """One forward pass; images are normalised on the device."""
    images = processor.pixel_values(batch.images.to(device, non_blocking=True))
    return objective(images, batch.tokens.to(device), batch.targets.to(device), batch.image_index.to(device), ramp)


def _step(optimizer: torch.optim.Optimizer, update: int) -> None:
    try:
        optimizer.step()
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        raise UserError(f"a step is too large for float32 at update {update}: lower training.lr") from None
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _require_finite(health: Tensor, objective: nn.Module, update: int) -> None:
    """Stop a run that has blown up, before its weights replace the last good ones. health: (loss, gradient norm)."""
    loss, norm = health.tolist()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise UserError(
            f"the loss is {loss} and the norm of its gradient {norm} at update {update}: "
            "lower training.lr or leave out bf16"
        )
    norm = float(nn.utils.get_total_norm(objective.parameters()))
    if not math.isfinite(norm):
        raise UserError(f"the norm of the weights is {norm} after update {update}: lower training.lr")
