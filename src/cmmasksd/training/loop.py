"""train(config): the whole run as a straight line: build, then for every epoch step, log, validate, save.

It runs on a CPU, one GPU or several. For more than one process start it with `torchrun`, or with `accelerate launch` on
GPUs (on a CPU, that starts one process only). On a CPU a run that was interrupted and resumed gives the same bits as
one that was not.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmmasksd.config import Config
from cmmasksd.data.loading import Batch, TrainingBatches, TrainingItems, loaded, open_dataset, training_loader
from cmmasksd.data.samples import ReferringDataset
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.errors import UserError
from cmmasksd.evaluation.evaluate import evaluate, make_accelerator
from cmmasksd.evaluation.results import write_atomically
from cmmasksd.training.checkpoint import STATE, load_state, recover, save_model, save_state
from cmmasksd.training.optim import parameter_groups, rate_scale, set_rates

if TYPE_CHECKING:
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor


def train(config: Config, config_yaml: str | None = None) -> dict[str, Any]:
    """Train a model as configured, or go on with a run.

    Args:
        config: everything.
        config_yaml: the resolved configuration as text, saved beside the checkpoints; None: made from `config`.

    Returns:
        The last validation: "oIoU", "mIoU", …, and "best" (the best mIoU so far).

    Raises:
        UserError: when the configuration does not fit the data, the model or the folder.
    """
    from accelerate.utils import set_seed
    from tqdm import tqdm

    how, distillation, workers = config.training, config.distillation, config.data.workers
    out = Path(how.out)
    resume_from = _resume_point(out, how.resume)
    accelerator = make_accelerator(how.precision)
    main = accelerator.is_main_process
    set_seed(how.seed)  # the same weights in every process
    model, processor = build(config)
    objective = MaskedSelfDistillation(model, distillation, model.config.clip_config.projection_dim)
    groups = parameter_groups(objective, lr=how.lr, clip_lr_scale=how.clip_lr_scale, weight_decay=how.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=(0.9, 0.98))
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    set_seed(how.seed + accelerator.process_index)  # but different masks

    train_data, val_data = open_split(config, config.data.train_split), open_split(config, config.data.val_split)
    items = TrainingItems(train_data, processor, stride=model.stride, seed=how.seed, greyscale=config.data.greyscale)
    batches = TrainingBatches(
        train_data.groups(),
        how.batch_size,
        per_image=config.data.per_image,
        seed=how.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    per_epoch = len(batches) // how.accumulate  # updates
    if not per_epoch:
        raise UserError(f"{len(batches)} batches are fewer than training.accumulate {how.accumulate}: lower it")
    total = per_epoch * how.epochs

    config_yaml = config_yaml or json.dumps(config.as_dict(), indent=2) + "\n"  # JSON is YAML
    update, best, validation, meter = 0, -1.0, {}, Meter()
    if resume_from is not None:
        progress = load_state(resume_from, wrapped, optimizer, accelerator)
        if progress["total"] != total:
            raise UserError(
                f"{resume_from} is of a run of {progress['total']} updates, this one has {total}: "
                "resume with the same data, batch size and epochs"
            )
        update, best, validation = progress["update"], progress["best"], progress["validation"]
        meter.sums, meter.counts = progress["meter"]

    def save() -> None:
        progress = {"update": update, "total": total, "best": best, "validation": validation}
        progress["meter"] = (meter.sums, meter.counts)
        save_state(out / f"{STATE}.new", wrapped, optimizer, accelerator, progress)
        if main:
            file, masked = out / f"{STATE}.new", objective.own_weights()
            save_model(out / "last", model, processor, config_yaml, masked=masked, state=file)
        accelerator.wait_for_everyone()

    references = batches.batch_size * how.accumulate * accelerator.num_processes  # of one update
    log = Log(out, config_yaml, updates=update) if main else None
    bar = tqdm(total=total * references, initial=update * references, desc="train", unit="ref", disable=not main)
    logged, losses, health = update, {}, torch.zeros(2)
    for epoch in range(update // per_epoch, how.epochs):
        source = loaded(training_loader(items, batches.at(epoch, start=update % per_epoch * how.accumulate), workers))
        while update < (epoch + 1) * per_epoch:
            objective.train()
            scale = rate_scale(update, total, warmup=how.warmup_steps, final=how.final_lr_scale)
            ramp = distillation.ramp(update / total)
            set_rates(optimizer, scale)
            for part in range(how.accumulate):
                last_part = part + 1 == how.accumulate  # processes exchange gradients once per update
                with nullcontext() if last_part else accelerator.no_sync(wrapped):
                    losses = _losses(wrapped, next(source), processor, accelerator.device, ramp)
                    accelerator.backward(losses["loss"] / how.accumulate)
                meter.add(losses)
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), how.max_grad_norm)
            health = torch.stack([losses["loss"].detach(), torch.as_tensor(norm)])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update += 1
            bar.update(references)
            if update % how.log_every == 0 or update == total:
                row = meter.take(references * (update - logged))
                logged = update
                _require_finite(health, update)
                row |= {"lr": how.lr * scale, "ramp": ramp, "grad_norm": float(health[1])}
                bar.set_postfix(loss=f"{row['loss']:.3f}", seg=f"{row['seg']:.3f}")
                if log:
                    log.write({"step": update, "epoch": update / per_epoch, **row})
            if how.save_every and update % how.save_every == 0 and update % per_epoch:
                _require_finite(health, update)
                save()
        _require_finite(health, update)
        if epoch + 1 == how.epochs or (epoch + 1) % how.validate_every == 0:
            bar.set_postfix_str("validating")
            limit = config.data.val_references
            _, validation, _ = evaluate(
                model, processor, val_data, accelerator=accelerator, workers=workers, references=limit, progress=False
            )
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
        save()
    bar.close()
    if log:
        log.close()
    return {**validation, "best": best}


def build(config: Config) -> tuple[CMMaskSDModel, CMMaskSDProcessor]:
    """The model to train and its processor: on the configured backbone, or going on from `weights`.

    Raises:
        UserError: when the backbone or the weights cannot be loaded, or the sizes do not fit.
    """
    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor

    how = config.model
    if how.weights is not None:
        source, model = how.weights, CMMaskSDModel.from_pretrained(how.weights)
    else:
        source = how.backbone
        model = CMMaskSDModel.from_backbone(
            source,
            decoder_width=how.decoder_width,
            decoder_layers=how.decoder_layers,
            decoder_heads=how.decoder_heads,
            decoder_mlp=how.decoder_mlp,
            head_width=how.head_width,
            dropout=how.dropout,
        )
    model.clip.logit_scale.requires_grad_(False)  # contrastive training's temperature: nothing here depends on it
    if config.training.freeze_text:
        model.clip.text_model.requires_grad_(False)
        model.clip.text_projection.requires_grad_(False)
    clip = model.config.clip_config
    context = clip.text_config.max_position_embeddings
    if not 3 <= how.max_tokens <= context:
        raise UserError(f"model.max_tokens {how.max_tokens} does not fit {source}: choose from 3 to {context}")
    processor = CMMaskSDProcessor.from_backbone(
        source,
        how.size,
        patch_size=clip.vision_config.patch_size,
        resize=how.resize,
        max_tokens=how.max_tokens,
    )
    return model, processor


def open_split(config: Config, split: str) -> ReferringDataset:
    """One split of the configured data set; generated splits have `train_references` or `val_references` references."""
    data = config.data
    count = data.train_references if split == data.train_split else data.val_references
    return open_dataset(
        data.name, split, root=data.root, references=count, seed=data.scene_seed, canvas=data.scene_size
    )


def _resume_point(out: Path, resume: bool) -> Path | None:
    """The state to go on from. A run is never overwritten, and never silently started afresh."""
    recover(out / "last")
    state = out / "last" / STATE
    if resume and not state.is_file():
        raise UserError(f"there is no run to resume in {out} (no {state}): start one without --resume")
    if not resume and state.exists():
        raise UserError(f"{out} holds a run already: go on with --resume, or choose another folder with --training.out")
    return state if resume else None


def _losses(
    objective: nn.Module, batch: Batch, processor: CMMaskSDProcessor, device: torch.device, ramp: float
) -> dict[str, Tensor]:
    """One forward pass; images are normalised on the device."""
    images = processor.pixel_values(batch.images.to(device, non_blocking=True))
    return objective(images, batch.tokens.to(device), batch.targets.to(device), batch.image_index.to(device), ramp)


def _require_finite(health: Tensor, update: int) -> None:
    """Stop a run that has blown up, before its weights replace the last good ones. health: (loss, gradient norm)."""
    loss, norm = health.tolist()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise UserError(
            f"the loss is {loss} and the norm of its gradient {norm} at update {update}: "
            "lower training.lr or leave out bf16"
        )


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
        updates: of a resumed run, how many are kept; rows after them are dropped, since they will be written again.
    """

    def __init__(self, out: Path, config_yaml: str, updates: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(config_yaml, encoding="utf-8")
        file = out / "metrics.jsonl"
        kept = []
        if updates and file.exists():
            whole = [
                line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")
            ]
            kept = [line for line in whole if json.loads(line)["step"] <= updates]
        write_atomically(file, "".join(kept))
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
