"""train(config): the whole run as a straight line: build, resume, then for every epoch step, log, save, validate.

It runs on a CPU, one GPU or several. For more than one process start it with `torchrun`, or with `accelerate launch` on
GPUs (on a CPU, that starts one process only). On a CPU a run that was interrupted and resumed gives the same bits as
one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmmasksd.config import Config, TrainingConfig
from cmmasksd.data.datasets import open_dataset, open_training_dataset
from cmmasksd.data.workers import loaded
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.errors import UserError
from cmmasksd.evaluation.evaluate import evaluate, make_accelerator
from cmmasksd.files import recover_folder
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.training.batches import Batch, TrainingBatches, TrainingItems, named_count, split_batch, training_loader
from cmmasksd.training.build import build
from cmmasksd.training.checkpoint import STATE, read_state, require_resumable, restore_state, run_state, save_model
from cmmasksd.training.log import Log, known_trackers, say, start_trackers
from cmmasksd.training.optim import parameter_groups, rate_scale, set_rates, zero_moments
from cmmasksd.training.progress import Progress, compared
from cmmasksd.training.sigterm import Sigterm, sigterm

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(config: Config) -> dict[str, Any]:
    """Train a model as configured, or resume a run.

    SIGTERM, which schedulers send, saves after the current update and exits; `resume` then gives the same run as
    without the interruption. At the start and during validation, when there is nothing to save, it exits at once.

    Args:
        config: all settings. What is None in `config.model` is set to what it resolves to.

    Returns:
        The last validation: "oIoU", "mIoU", …, and "best" (the best mIoU so far).

    Raises:
        UserError: the configuration does not fit the data, the model or the folder.
        SystemExit: 143, after SIGTERM.
    """
    with sigterm() as stop:
        return _run(config, stop)


def _run(config: Config, stop: Sigterm) -> dict[str, Any]:
    from accelerate.utils import set_seed
    from tqdm import tqdm

    training, distillation, workers = config.training, config.distillation, config.data.workers
    out = Path(training.out)
    last, state_file = out / "last", out / "last" / STATE
    recover_folder(last)
    require_resumable(state_file, out, training.resume, "--training.out")

    # build
    accelerator = make_accelerator(known_trackers(training.trackers), out / "tensorboard")
    main, world = accelerator.is_main_process, accelerator.num_processes
    batch_size, accumulate = split_batch(training, world)
    set_seed(training.seed)  # the same weights in every process
    model, processor = build(config)
    objective = MaskedSelfDistillation(model, distillation, model.patch_width)
    groups = parameter_groups(
        objective, lr=training.lr, clip_lr_scale=training.clip_lr_scale, weight_decay=training.weight_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=(0.9, 0.98))
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    set_seed(training.seed + accelerator.process_index)  # but different masks
    train_data, val_data = open_training_dataset(config.data), open_dataset(config.data.validation)
    items = TrainingItems(
        train_data, processor, stride=model.stride, seed=training.seed, greyscale=config.data.greyscale
    )
    batches = TrainingBatches(
        train_data.groups(),
        batch_size,
        per_image=config.data.per_image,
        seed=training.seed,
        rank=accelerator.process_index,
        world=world,
    )
    per_epoch = len(batches) // accumulate
    if not per_epoch:
        raise UserError(f"{batches.total} references are fewer than training.batch {training.batch}: lower it")
    references = batches.batch_size * accumulate * world
    fewer = f" (training.batch is {training.batch}, the data has {batches.total})"
    say(
        f"{references} references per update{'' if references == training.batch else fewer} = {named_count(world)} × "
        f"{batches.batch_size} × accumulate {accumulate}"
    )
    progress, config_yaml = Progress(per_epoch, training.epochs, compared(config)), config.as_yaml()

    # resume
    if training.resume:
        state = read_state(state_file, world)
        progress = progress.resumed(state["progress"], config, state_file)
        restore_state(state, wrapped, optimizer, accelerator.process_index, state_file)
        del state

    def save() -> None:
        state = run_state(wrapped, optimizer, accelerator, progress.as_dict())
        if main:
            save_model(last, model, processor, config_yaml, masked=objective.own_weights(), state=state)
        accelerator.wait_for_everyone()

    log = None
    if main:
        out.mkdir(parents=True, exist_ok=True)  # before the trackers, which would be blamed
        trackers = start_trackers(accelerator, progress.config, progress.update)
        log = Log(out, config_yaml, progress.update, progress.validated * per_epoch, trackers)
    total, health = progress.total, torch.zeros(2)
    bar = tqdm(
        total=total * references, initial=progress.update * references, desc="train", unit="ref", disable=not main
    )
    stop.at_once = False
    for epoch in range(progress.validated, training.epochs):
        start = (progress.update - epoch * per_epoch) * accumulate
        with closing(loaded(training_loader(items, batches.at(epoch, start), workers))) as source:
            while progress.update < (epoch + 1) * per_epoch:
                # single training step
                scale = rate_scale(progress.update, total, warmup=training.warmup_steps, final=training.final_lr_scale)
                set_rates(optimizer, scale)
                ramp = distillation.ramp(progress.done)
                if ramp > 0 and not progress.synced:
                    zero_moments(optimizer, objective.sync_own_decoders())
                    progress.synced = True
                health = train_step(
                    wrapped, optimizer, source, processor, accelerator, progress, training, accumulate, ramp
                )
                bar.update(references)

                # once in a while: log
                if progress.update % training.log_every == 0 or progress.update == total:
                    row = progress.meter.take("references_per_s")
                    _require_finite(health, objective, progress.update)
                    row |= {"lr": training.lr * scale, "ramp": ramp, "grad_norm": float(health[1])}
                    bar.set_postfix(loss=f"{row['loss']:.3f}", seg=f"{row['seg']:.3f}")
                    if log:
                        log.write({"step": progress.update, "epoch": progress.update / per_epoch, **row})

                # once in a while: save
                leaves = stop.received_anywhere(accelerator)
                due = training.save_every and progress.update % training.save_every == 0
                if leaves or (due and progress.update % per_epoch):  # the end of an epoch is saved below
                    _require_finite(health, objective, progress.update)
                    save()
                if leaves:
                    raise SystemExit(143)

        # once in a while: validate, keep the best model
        _require_finite(health, objective, progress.update)
        if epoch + 1 == training.epochs or (epoch + 1) % training.validate_every == 0:
            save()  # a validation can take longer than a scheduler waits
            with stop.leaving_at_once():
                bar.set_postfix_str("validating")
                scores = evaluate(
                    model,
                    processor,
                    val_data,
                    accelerator=accelerator,
                    workers=workers,
                    references=config.data.val_references,
                    progress=False,
                ).scores
            if log:
                log.write({"step": progress.update, "epoch": epoch + 1, **scores})
                bar.write(
                    f"epoch {epoch + 1}: {val_data.name} {val_data.split} "
                    f"oIoU {100 * scores['oIoU']:.2f}  mIoU {100 * scores['mIoU']:.2f}"
                )
            if scores["mIoU"] > progress.best:
                progress.best = scores["mIoU"]
                if main:
                    save_model(out / "best", model, processor, config_yaml, masked=objective.own_weights())
            progress.validation = scores
            progress.meter.restart()  # its clock would count the validation
        progress.validated = epoch + 1
        save()
    bar.close()
    if log:
        log.close()
    return {**progress.validation, "best": progress.best}


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Iterator[Batch],
    processor: CMMaskSDProcessor,
    accelerator: Accelerator,
    progress: Progress,
    training: TrainingConfig,
    accumulate: int,
    ramp: float,
) -> Tensor:
    """One update of the weights.

    Args:
        objective, optimizer: as the accelerator prepared them.
        source: `accumulate` batches are taken from it.
        progress: its update is counted, its meter gets the losses of every batch.
        ramp: factor of the distillation weights, see `DistillationConfig.ramp`.

    Returns:
        (2,): loss of the last batch, norm of the gradient. They stay on the device, so that nothing waits for it.

    Raises:
        UserError: the step is too large for float32.
    """
    objective.train()
    losses: dict[str, Tensor] = {}
    for part in range(accumulate):
        last_part = part + 1 == accumulate  # processes exchange gradients once per update
        with nullcontext() if last_part else accelerator.no_sync(objective):
            batch = next(source)
            losses = _losses(objective, batch, processor, accelerator.device, ramp, training.precision == "bf16")
            accelerator.backward(losses["loss"] / accumulate)
        progress.meter.add(losses, len(batch.targets) * accelerator.num_processes)
    progress.update += 1
    norm = accelerator.clip_grad_norm_(objective.parameters(), training.max_grad_norm)
    try:
        optimizer.step()
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        raise UserError(f"a step is too large for float32 at update {progress.update}: lower training.lr") from None
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([losses["loss"].detach(), torch.as_tensor(norm)])


def _losses(
    objective: nn.Module, batch: Batch, processor: CMMaskSDProcessor, device: torch.device, ramp: float, bf16: bool
) -> dict[str, Tensor]:
    """One forward pass; images are normalised on the device."""
    images = processor.pixel_values(batch.images.to(device, non_blocking=True))
    tokens, targets, image_index = (part.to(device) for part in (batch.tokens, batch.targets, batch.image_index))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return objective(images, tokens, targets, image_index, ramp)


@torch.no_grad()
def _require_finite(health: Tensor, objective: nn.Module, update: int) -> None:
    """Stop a run that has diverged, before its weights replace the last good ones. health: see `train_step`."""
    loss, norm = health.tolist()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise UserError(
            f"the loss is {loss} and the norm of its gradient {norm} at update {update}: "
            "lower training.lr or leave out bf16"
        )
    norm = float(nn.utils.get_total_norm(objective.parameters()))
    if not math.isfinite(norm):
        raise UserError(f"the norm of the weights is {norm} after update {update}: lower training.lr")
