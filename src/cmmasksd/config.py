"""Every setting of a training run: Data, Model, Distillation, Training. YAML in and out through jsonargparse.

[P] marks what the paper says, [I] our reading of what it leaves open; every [I] is a switch. Unknown keys fail, and the
resolved configuration is saved beside every checkpoint.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cmmasksd.errors import UserError

DATASETS = ("scenes", "scenes+", "scenesg", "refcoco", "refcoco+", "refcocog-umd", "refcocog-google", "manifest")
MAX_REFERENCES, MAX_SCENE_SIZE = 10_000_000, 4096
"""Bounds of generated scenes: references per split, and the side of an image in pixels. More is a slip, and would take
all memory or for ever."""


@dataclass
class DataConfig:
    """What to train and validate on.

    Attributes:
        name: one of DATASETS.
        root: folder that holds `refcoco/…` and `images/train2014/…`; for "manifest", your own data, a .jsonl or .csv
            file, or a folder of labelme files (see cmmasksd/data/readers/manifest.py); none for scenes.
        train_split: split to train on.
        val_split: split that chooses the best checkpoint.
        train_references: of generated scenes, how many references an epoch has. Real data brings its own number.
        val_references: score at most this many references while training (0: all). Scenes: how many to generate.
        scene_seed: seed of the generated scenes.
        scene_size: side of the generated images in pixels.
        per_image: references of one image that are trained together in a batch (at most). One image encoding serves
            them all; 1 draws every reference on its own, as the peers do.
        greyscale: chance that a training image loses its colours, all or in part, where no sentence that is drawn with
            it names one (in English): shapes are learned apart from colours.
        workers: processes that read images.
    """

    name: str = "scenes"
    root: Path | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_references: int = 30000
    val_references: int = 600
    scene_seed: int = 0
    scene_size: int = 128
    per_image: int = 3
    greyscale: float = 0.0
    workers: int = 1

    def __post_init__(self) -> None:
        for name, least in (("per_image", 1), ("workers", 0), ("val_references", 0), ("train_references", 1)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} is {getattr(self, name)}: it must be at least {least}")
        if not 0 <= self.greyscale <= 1:
            raise UserError(f"data.greyscale is {self.greyscale}: a chance lies between 0 and 1")


@dataclass
class ModelConfig:
    """The network and how pictures get into it.

    Attributes:
        backbone: a CLIP in transformers' format by folder or hub id, or "tiny", the small one that this package ships.
        weights: a trained model of ours to start from, by folder, hub id or "scenes", the one that this package ships.
            Its own backbone and decoder are used then, and the sizes of both below are not read.
        size: (height, width) of the input in pixels. None: that of `weights`, or 128x128 for a new model.
        resize: "warp" to the canvas, or "letterbox". None: as `weights` does, or "warp" for a new model.
        max_tokens: maximum number of tokens per sentence, start and end included; more are cut (and counted). None:
            that of `weights`, or 48 for a new model.
        decoder_width, decoder_layers, decoder_heads, decoder_mlp, head_width, dropout: see CMMaskSDConfig. [I]
    """

    backbone: str = "tiny"
    weights: str | None = None
    size: tuple[int, int] | None = None
    resize: Literal["warp", "letterbox"] | None = None
    max_tokens: int | None = None
    decoder_width: int = 128
    decoder_layers: int = 3
    decoder_heads: int = 4
    decoder_mlp: int = 256
    head_width: int = 48
    dropout: float = 0.0


@dataclass
class DistillationConfig:
    """Masked self-distillation (training only).

    Attributes:
        vision: LMVSD, the branch with masked patches. [P]
        language: VMLSD, the branch with masked words. [P]
        vision_which: which patches are masked: those of high or low correlation, or random ones. [I]
        language_which: the same for words. [I]
        vision_guide: a patch's score is its max or mean correlation over the words, or that with the sentence. [I]
        correlation: from the patches, or from the values of CLIP's last attention (MaskCLIP's dense features). [I]
        vision_ratio: fraction of the patches that is masked. [I]
        language_ratio: fraction of the words that is masked, at least one word. [I]
        vision_level: "feature" masks after the encoder; "input" drops patches from a second encoder pass; "blank"
            paints them over and runs the whole pass again, as MaskRIS does. [I]
        language_level: "input" runs the text tower again without the words; "feature" hides them from the decoder only,
            so they leak through the end-of-text token. [I]
        hide_single_word: also hide the word of a sentence that has only one. [I]
        loss: per-pixel Bernoulli KL, mean squared error of probabilities, or soft-target cross-entropy. [I]
        temperature: of both distributions in "kl" and "soft_bce". [I]
        vision_weight, language_weight: lambda_v and lambda_l. [I]
        joint: one masked branch that hides patches and words at once, in place of the two. Not CM-MaskSD: with "blank"
            and random masks it is MaskRIS's way, for comparison.
        start: fraction of the training that passes before the branches begin; until then they cost nothing. [I]
        warmup: fraction of the training, after `start`, over which both weights rise from 0: the teacher is poor at
            first. [I]
        share_weights: one decoder for all three branches [P]; off: a decoder of its own for each (ablation).
        ground_truth: weight of the ground-truth loss on the masked branches. [I]
        segmentation: loss of the main branch, BCE + Dice or BCE alone. [I]
    """

    vision: bool = True
    language: bool = True
    vision_which: Literal["high", "low", "random"] = "high"
    language_which: Literal["high", "low", "random"] = "high"
    vision_guide: Literal["max", "mean", "sentence"] = "max"
    correlation: Literal["patches", "values"] = "patches"
    vision_ratio: float = 0.5
    language_ratio: float = 0.3
    vision_level: Literal["feature", "input", "blank"] = "feature"
    language_level: Literal["feature", "input"] = "input"
    hide_single_word: bool = False
    loss: Literal["kl", "mse", "soft_bce"] = "kl"
    temperature: float = 1.0
    vision_weight: float = 1.0
    language_weight: float = 1.0
    joint: bool = False
    start: float = 0.8
    warmup: float = 0.1
    share_weights: bool = True
    ground_truth: float = 0.0
    segmentation: Literal["bce_dice", "bce"] = "bce_dice"

    def ramp(self, progress: float) -> float:
        """Factor of the distillation weights when `progress` (0 to 1) of the training is done."""
        since = progress - self.start
        if since < 0:
            return 0.0
        return 1.0 if self.warmup == 0 else min(1.0, since / self.warmup)

    def __post_init__(self) -> None:
        for name in ("vision_ratio", "language_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is no fraction: give a number between 0 and 1")
        for name in ("start", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is no fraction of the training: give one from 0 to 1")
        if self.joint and not (self.vision and self.language):
            raise UserError("joint hides patches and words at once: it needs vision: true and language: true")
        _require_positive(self, "distillation", "temperature")
        _require_positive(self, "distillation", "vision_weight", "language_weight", "ground_truth", zero=True)


@dataclass
class TrainingConfig:
    """The run.

    Attributes:
        out: folder of the run: checkpoints, log, resolved configuration.
        epochs: passes over the references; each draws one sentence per reference. With `resume`, a larger number
            extends the run.
        batch: references per update, over all processes. 24 where neither it nor `batch_size` is given.
        batch_size: maximum number of references per step and process, for what memory holds. An update takes as many
            steps (gradients are accumulated) as `batch` needs. None: one step.
        lr: of the new layers (AdamW). [I, from relatives]
        clip_lr_scale: CLIP trains at this fraction of it. [I]
        freeze_text: CLIP's text tower keeps its weights. On a long training with few kinds of sentences it learns by
            heart which words go together, and unseen pairs suffer (scenes, 190,000 references: testB mIoU 0.38, with
            the text tower of the first 40,000 put back 0.51).
        weight_decay: of matrices; biases, norms and embeddings have none.
        warmup_steps: of the learning rate, linear.
        final_lr_scale: the cosine ends at this fraction.
        max_grad_norm: gradients are clipped to this norm.
        precision: "no" is float32; "bf16" autocasts.
        seed: of weights, order, sentences and masks.
        log_every: updates between lines of metrics.jsonl.
        validate_every: epochs between validations; the last epoch is always validated.
        save_every: also save after so many updates within an epoch (0: at the end of epochs only).
        trackers: experiment trackers that get the rows of metrics.jsonl too, by accelerate's names (tensorboard, wandb,
            mlflow, …), comma-separated. None: TensorBoard where it is installed.
        resume: resume the run in `out` from its last checkpoint, with the same settings.
        allow_change: settings that may differ from those of the run that is resumed: dotted keys, comma-separated.
    """

    out: Path = Path("runs/train")
    epochs: int = 1
    batch: int | None = None
    batch_size: int | None = None
    lr: float = 1e-3
    clip_lr_scale: float = 0.1
    freeze_text: bool = False
    weight_decay: float = 0.05
    warmup_steps: int = 50
    final_lr_scale: float = 0.01
    max_grad_norm: float = 1.0
    precision: Literal["no", "bf16"] = "no"
    seed: int = 0
    log_every: int = 10
    validate_every: int = 1
    save_every: int = 0
    trackers: list[str] | str | None = None
    resume: bool = False
    allow_change: list[str] | str = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.batch is None:
            if self.batch_size is not None:
                raise UserError(
                    f"training.batch_size {self.batch_size} only limits the references per step and process: give "
                    "training.batch too, the references per update over all processes"
                )
            self.batch = 24
        for name in ("allow_change", "trackers"):
            if isinstance(given := getattr(self, name), str):
                setattr(self, name, re.findall(r"[^\s,]+", given))
        for name in ("epochs", "batch", "batch_size", "log_every", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"training.{name} is {value}: it must be at least 1")
        for name in ("warmup_steps", "save_every", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"training.{name} is {getattr(self, name)}: it must be at least 0")
        if self.seed >= 2**31:
            raise UserError(f"training.seed is {self.seed}: it must be below {2**31}")
        _require_positive(self, "training", "lr", "max_grad_norm")
        _require_positive(self, "training", "clip_lr_scale", "weight_decay", zero=True)
        if not 0 <= self.final_lr_scale <= 1:
            raise UserError(f"training.final_lr_scale is {self.final_lr_scale}: it must be between 0 and 1")


def _require_positive(settings: Any, part: str, *names: str, zero: bool = False) -> None:
    for name in names:
        value = getattr(settings, name)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise UserError(f"{part}.{name} is {value}: it must be a positive number{' or 0' if zero else ''}")


@dataclass
class Config:
    """A whole training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, Path):
                return str(value)
            return list(value) if isinstance(value, tuple) else value

        return plain(asdict(self))

    def as_yaml(self) -> str:
        """The settings of the run as YAML; --resume is not one of them."""
        import yaml

        settings = self.as_dict()
        settings["training"] |= {"resume": False, "allow_change": []}
        return yaml.safe_dump(settings, sort_keys=False)


@dataclass
class ScoreConfig:
    """A model and the split that it is scored on.

    Attributes:
        model: folder of a trained model, hub id, or scenes: the one that ships.
        data: scenes, scenes+, scenesg, refcoco, refcoco+, refcocog-umd, refcocog-google or manifest.
        split: such as val, testA, testB or test.
        root: folder of RefCOCO, or for manifest its file or folder; None for generated scenes.
        references: number of references (generated scenes only).
        scene_seed: seed of the generated scenes.
        scene_size: side of the generated images in pixels.
        threshold: a pixel above this probability is in the mask.
        workers: number of processes that read images.
    """

    model: str
    data: str
    split: str
    root: Path | None = None
    references: int = 1500
    scene_seed: int = 0
    scene_size: int = 128
    threshold: float = 0.5
    workers: int = 0


@dataclass
class PretrainConfig:
    """Contrastive training of a small CLIP.

    Attributes:
        out: folder for the model, its log and the state to resume from.
        init: a CLIP to begin with, by folder or hub id, with its tokenizer; it decides the sizes. None: fresh weights.
        steps: optimiser steps.
        batch_size: images per step (an even number: a scene and its twin each).
        phrases: phrases about single objects per scene.
        lr: peak learning rate of AdamW, after `warmup` steps, then a cosine down to a hundredth.
        weight_decay: of matrices; biases, norms and embeddings have none.
        region_weight: of the late-interaction term.
        image_size: side of the scenes in pixels.
        patch_size: side of a patch in pixels.
        width: of both towers and of the joint space.
        vision_layers: blocks of the image tower.
        text_layers: blocks of the text tower.
        vocabulary: entries of the tokenizer, at least 514 (256 bytes, twice, and the two ends).
        context: the most tokens of a sentence, start and end included.
        workers: processes that draw scenes.
        seed: of everything.
        bf16: autocast to bfloat16.
        save_every: steps between states to resume from.
        resume: resume the run in `out` from its last state.
    """

    out: Path = Path("runs/tiny-clip")
    init: str | None = None
    steps: int = 6000
    batch_size: int = 64
    phrases: int = 4
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 150
    region_weight: float = 1.0
    image_size: int = 128
    patch_size: int = 16
    width: int = 192
    vision_layers: int = 6
    text_layers: int = 3
    vocabulary: int = 768
    context: int = 64
    workers: int = 1
    seed: int = 0
    bf16: bool = True
    save_every: int = 250
    resume: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.batch_size % 2:
            raise UserError(f"pretrain.batch_size is {self.batch_size}: it must be an even number, at least 2")
