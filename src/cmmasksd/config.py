"""Settings of every command that trains or scores, as dataclasses; YAML in and out through jsonargparse.

The note below a field is its help on the command line. [P] marks what the paper says, [I] our reading of what it leaves
open; every [I] is a switch. Unknown keys fail, and the resolved configuration is saved beside every checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cmmasksd.errors import UserError, require_between

DatasetName = Literal[
    "scenes", "scenes+", "scenesg", "refcoco", "refcoco+", "refcocog-umd", "refcocog-google", "manifest", "instances"
]
DATASETS: tuple[str, ...] = get_args(DatasetName)
MAX_REFERENCES, MAX_SCENE_SIZE, MAX_WORKERS = 10_000_000, 4096, 256
"""Upper bounds of references per split, of the side of a scene in pixels, and of processes: more is a typing error that
would exhaust memory or time."""


@dataclass
class SplitConfig:
    """One split of a data set."""

    data: DatasetName
    """data set"""
    split: str
    """split, such as val, testA, testB or test"""
    root: Path | None = None
    """folder that holds refcoco/… and images/train2014/…; for manifest, a .jsonl or .csv file, a COCO, CVAT or Label
    Studio file with sentences, or a folder of labelme files; for instances, annotations without sentences: a file as
    for `data expressions`, or a folder of folders with an instances.json each; not for scenes"""
    references: int = 1500
    """number of references (scenes only)"""
    scene_seed: int = 0
    """seed of the scenes"""
    scene_size: int = 128
    """side of the scenes in pixels"""

    def __post_init__(self) -> None:
        require_between("references", self.references, 1, MAX_REFERENCES)
        require_between("scene_size", self.scene_size, 64, MAX_SCENE_SIZE)


@dataclass(kw_only=True)
class ScoreConfig(SplitConfig):
    """A model and the split that it is scored on."""

    model: str
    """folder of a trained model, hub id, or a shipped model: photos or scenes"""
    threshold: float = 0.5
    """probability above which a pixel is in the mask"""
    workers: int = 0
    """number of processes that read images"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between("workers", self.workers, 0, MAX_WORKERS)


@dataclass
class ExpressionConfig:
    """Sentences that are generated for annotated images."""

    per_object: int = 1
    """maximum number of different sentences per object"""
    keep: float = 0.4
    """probability that a sentence says more than it must"""
    no_target: float = 0.0
    """share of sentences that name nothing (manifest only)"""
    val: float = 0.1
    """share of the images in the split val"""
    test: float = 0.0
    """share of the images in the split test"""
    min_area: float = 0.004
    """share of the image below which an object is not named"""
    seed: int = 0
    """seed of sentences and splits"""

    def __post_init__(self) -> None:
        require_between("per_object", self.per_object, 1, 20)
        for name in ("keep", "val", "test", "min_area"):
            require_between(name, getattr(self, name), 0, 1)
        require_between("no_target", self.no_target, 0, 0.9)
        if self.val + self.test >= 1:
            raise UserError(f"val {self.val} and test {self.test} leave no image to train on: give smaller ones")


@dataclass
class AugmentConfig:
    """Changes of photographs in training (data.name instances only); sentences are made after them."""

    flip: float = 0.5
    """probability that left and right are exchanged"""
    crop: float = 0.5
    """probability that a part of at least 0.6 of each side is cut out"""
    paste: float = 0.3
    """probability that an object of another photograph is pasted in"""
    light: float = 0.2
    """largest relative change of brightness and contrast"""
    no_target: float = 0.4
    """probability that one of the sentences names nothing"""

    def __post_init__(self) -> None:
        for name in ("flip", "crop", "paste", "light", "no_target"):
            require_between(f"data.augment.{name}", getattr(self, name), 0, 1)


@dataclass
class DataConfig:
    """Data to train on and to validate on."""

    name: DatasetName = "scenes"
    """data set"""
    root: Path | None = None
    """folder that holds refcoco/… and images/train2014/…; for manifest, a .jsonl or .csv file, a COCO, CVAT or Label
    Studio file with sentences, or a folder of labelme files (see cmmasksd/data/readers/manifest.py); for instances,
    annotations without sentences: a file as for `data expressions`, or a folder of folders with an instances.json each
    (all one set, or train, val and test); not for scenes"""
    train_split: str = "train"
    """split to train on"""
    val_split: str = "val"
    """split that selects the best checkpoint"""
    workers: int = 1
    """number of processes that read images"""

    # scenes
    train_references: int = 30000
    """number of references per epoch (scenes only; other data sets are used whole)"""
    val_references: int = 600
    """maximum number of references per validation, 0 for all; for scenes, how many are generated"""
    scene_seed: int = 0
    """seed of the scenes"""
    scene_size: int = 128
    """side of the scenes in pixels"""

    # sampling and augmentation
    per_image: int = 3
    """maximum number of references of one image in a batch; they share one image encoding. 1 draws every reference
    independently, as other RIS code does"""
    greyscale: float = 0.0
    """probability that a training image loses its colours, wholly or partly, where none of its drawn sentences names a
    colour (in English): shapes are learnt apart from colours"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        for name, least in (("per_image", 1), ("val_references", 0), ("train_references", 1)):
            require_between(f"data.{name}", getattr(self, name), least)
        require_between("data.workers", self.workers, 0, MAX_WORKERS)
        require_between("data.greyscale", self.greyscale, 0, 1)

    @property
    def training(self) -> SplitConfig:
        """The split to train on."""
        return self._split(self.train_split, self.train_references)

    @property
    def validation(self) -> SplitConfig:
        """The split to validate on."""
        return self._split(self.val_split, self.val_references or SplitConfig.references)

    def _split(self, split: str, references: int) -> SplitConfig:
        return SplitConfig(self.name, split, self.root, references, self.scene_seed, self.scene_size)


@dataclass
class ModelConfig:
    """The network and its input."""

    backbone: str = "tiny"
    """CLIP or SigLIP: folder or hub id in transformers' format; CLIP of OpenAI or open_clip as a file or
    hf-hub:USER/NAME; EfficientNet-Lite with its text tower (model_type lite): folder; or tiny, the shipped CLIP"""
    weights: str | None = None
    """trained model to start from: folder, hub id, or a shipped one, photos or scenes; or a CLIPSeg of transformers,
    whose CLIP stays frozen. It brings its own backbone and decoder, so that the keys of both are ignored"""

    # input; None: that of `weights`, or the default for a new model
    size: tuple[int, int] | None = None
    """height and width of the input in pixels; default that of `weights`, or 128x128 for a new model"""
    resize: Literal["warp", "letterbox"] | None = None
    """warp: stretch to `size`; letterbox: keep the aspect ratio and pad; default that of `weights`, or warp for a new
    model"""
    max_tokens: int | None = None
    """maximum number of tokens per sentence, start and end included; further ones are cut and counted; default that of
    `weights`, or 48 for a new model"""

    # decoder [I]; the defaults of CMMaskSDConfig, too
    decoder_width: int = 128
    """channels of the fusion decoder; 512 in CRIS and ETRIS [I]"""
    decoder_layers: int = 3
    """layers of the fusion decoder; 3 in CRIS and ETRIS [I]"""
    decoder_heads: int = 4
    """attention heads of the fusion decoder; must divide decoder_width [I]"""
    decoder_mlp: int = 256
    """hidden channels of the fusion decoder's MLP [I]"""
    head_width: int = 48
    """channels of the mask head at twice the patch grid, a multiple of 16; half as many at four times [I]"""
    dropout: float = 0.0
    """dropout rate in the decoder [I]"""


@dataclass
class DistillationConfig:
    """Masked self-distillation (training only)."""

    # branches
    vision: bool = True
    """LMVSD, the branch with masked patches [P]"""
    language: bool = True
    """VMLSD, the branch with masked words [P]"""
    joint: bool = False
    """one branch that masks patches and words at once, in place of the two. Not CM-MaskSD: with vision_level blank and
    random masks it is MaskRIS, for comparison"""
    share_weights: bool = True
    """one decoder for all branches [P]; false: a decoder for each (ablation)"""

    # vision branch: which patches are masked
    vision_which: Literal["high", "low", "random"] = "high"
    """patches that are masked: those of high or low correlation, or random ones [I]"""
    vision_guide: Literal["max", "mean", "sentence"] = "max"
    """correlation of a patch: maximum or mean over the words, or that with the sentence [I]"""
    correlation: Literal["patches", "values"] = "patches"
    """image features for the correlation: the patches, or the values of CLIP's last attention, as in MaskCLIP [I]"""
    vision_ratio: float = 0.5
    """fraction of the patches that is masked [I]"""
    vision_level: Literal["feature", "input", "blank"] = "feature"
    """feature: mask after the encoder; input: drop patches from a second encoder pass; blank: paint them over and run
    the whole pass again, as MaskRIS does [I]"""

    # language branch: which words are masked
    language_which: Literal["high", "low", "random"] = "high"
    """words that are masked: those of high or low correlation, or random ones [I]"""
    language_ratio: float = 0.3
    """fraction of the words that is masked, at least one word [I]"""
    language_level: Literal["feature", "input"] = "input"
    """input: run the text tower again without the words; feature: hide them from the decoder only, so that they leak
    through the end-of-text token [I]"""
    hide_single_word: bool = False
    """also mask the word of a one-word sentence [I]"""

    # loss
    segmentation: Literal["bce_dice", "bce"] = "bce_dice"
    """loss of the main branch: BCE + Dice, or BCE alone [I]"""
    presence: float = 0.0
    """weight of the loss of presence: whether the image holds what the sentence names. Needs sentences that name
    nothing"""
    loss: Literal["kl", "mse", "soft_bce"] = "kl"
    """distillation loss: Bernoulli KL per pixel, mean squared error of probabilities, or soft-target BCE [I]"""
    temperature: float = 1.0
    """temperature of teacher and student in kl and soft_bce [I]"""
    vision_weight: float = 1.0
    """lambda_v, the weight of LMVSD's distillation loss [I]"""
    language_weight: float = 1.0
    """lambda_l, the weight of VMLSD's distillation loss [I]"""
    ground_truth: float = 0.0
    """weight of the segmentation loss on the masked branches [I]"""

    # schedule
    start: float = 0.8
    """fraction of the training after which the branches begin; until then they cost nothing [I]"""
    warmup: float = 0.1
    """fraction of the training, after `start`, over which both weights rise from 0: the teacher is poor at first [I]"""

    def ramp(self, progress: float) -> float:
        """Factor of the distillation weights when `progress` (0 to 1) of the training is done."""
        since = progress - self.start
        if since < 0:
            return 0.0
        return 1.0 if self.warmup == 0 else min(1.0, since / self.warmup)

    def __post_init__(self) -> None:
        for name in ("vision_ratio", "language_ratio"):
            require_between(f"distillation.{name}", getattr(self, name), 0, 1, exclusive=True)
        for name in ("start", "warmup"):
            require_between(f"distillation.{name}", getattr(self, name), 0, 1)
        for name in ("vision_weight", "language_weight", "ground_truth", "presence"):
            require_between(f"distillation.{name}", getattr(self, name), 0)
        require_between("distillation.temperature", self.temperature, 0, exclusive=True)
        if self.joint and not (self.vision and self.language):
            raise UserError("distillation.joint masks patches and words at once: set vision and language to true")


@dataclass
class TrainingConfig:
    """The run."""

    out: Path = Path("runs/train")
    """folder of the run: checkpoints, log, resolved configuration"""
    seed: int = 0
    """seed of weights, order, sentences and masks"""
    precision: Literal["no", "bf16"] = "no"
    """no: float32; bf16: autocast"""

    # length and batches
    epochs: int = 1
    """passes over the references, each with one sentence per reference; a resumed run may have more"""
    batch: int | None = None
    """references per update, over all processes; default 24"""
    batch_size: int | None = None
    """maximum number of references per step and process, as memory allows; gradients are accumulated up to `batch`.
    Default: one step per update"""

    # optimiser: AdamW, linear warm-up, cosine
    lr: float = 1e-3
    """peak learning rate of the new layers [I, from related methods]"""
    clip_lr_scale: float = 0.1
    """learning rate of CLIP as a fraction of `lr`"""
    freeze_image: bool = False
    """keep the weights of the image tower, which saves the backward pass through it"""
    freeze_text: bool = False
    """keep the weights of CLIP's text tower. In long trainings with few kinds of sentences it memorises word
    co-occurrences, which hurts unseen pairs (scenes, 190,000 references: testB mIoU 0.38, with the text tower of the
    first 40,000 put back 0.51)"""
    weight_decay: float = 0.05
    """weight decay of matrices; biases, norms and embeddings have none"""
    warmup_steps: int = 50
    """updates over which the learning rate rises"""
    final_lr_scale: float = 0.01
    """learning rate at the end as a fraction of the peak"""
    max_grad_norm: float = 1.0
    """maximum norm of the gradients; larger ones are clipped"""

    # log, validation, checkpoints
    log_every: int = 10
    """updates between rows of metrics.jsonl"""
    validate_every: int = 1
    """epochs between validations; the last epoch is always validated"""
    save_every: int = 0
    """updates between checkpoints within an epoch; 0: only at the end of epochs"""
    trackers: list[str] | str | None = None
    """experiment trackers that also get the rows of metrics.jsonl, by accelerate's names (tensorboard, wandb, mlflow,
    …), comma-separated. Default: tensorboard if it is installed"""
    resume: bool = False
    """resume the run in `out` from its last checkpoint, with the same settings"""
    allow_change: list[str] | str = field(default_factory=list)
    """settings that may differ from those of the resumed run: dotted keys, comma-separated"""

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
            if (value := getattr(self, name)) is not None:
                require_between(f"training.{name}", value, 1)
        for name in ("warmup_steps", "save_every", "clip_lr_scale", "weight_decay"):
            require_between(f"training.{name}", getattr(self, name), 0)
        for name in ("lr", "max_grad_norm"):
            require_between(f"training.{name}", getattr(self, name), 0, exclusive=True)
        require_between("training.seed", self.seed, 0, 2**31 - 1)
        require_between("training.final_lr_scale", self.final_lr_scale, 0, 1)


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
        """The settings of the run as YAML, without those that say how it was resumed."""
        import yaml

        settings = self.as_dict()
        del settings["training"]["resume"], settings["training"]["allow_change"]
        return yaml.safe_dump(settings, sort_keys=False)


@dataclass
class PretrainConfig:
    """Contrastive training of a small CLIP."""

    out: Path = Path("runs/tiny-clip")
    """folder for the model, its log and the state to resume from"""
    init: str | None = None
    """CLIP to start from, with its tokenizer and sizes: folder or hub id; default: fresh weights"""
    seed: int = 0
    """seed of weights and scenes"""

    # data
    image_size: int = 128
    """side of the scenes in pixels"""
    batch_size: int = 64
    """images per step, an even number: each scene comes with its twin"""
    phrases: int = 4
    """phrases about single objects per scene"""
    workers: int = 1
    """number of processes that draw scenes"""

    # model
    patch_size: int = 16
    """side of a patch in pixels"""
    width: int = 192
    """channels of both towers and of the joint space"""
    vision_layers: int = 6
    """layers of the image tower"""
    text_layers: int = 3
    """layers of the text tower"""
    vocabulary: int = 768
    """entries of the tokenizer, at least 514: 256 bytes, twice, and the two ends"""
    context: int = 64
    """maximum number of tokens per sentence, start and end included"""

    # optimiser: AdamW, linear warm-up, cosine to a hundredth
    steps: int = 6000
    """optimiser steps"""
    lr: float = 1e-3
    """peak learning rate"""
    warmup: int = 150
    """steps over which the learning rate rises"""
    weight_decay: float = 0.05
    """weight decay of matrices; biases, norms and embeddings have none"""
    region_weight: float = 1.0
    """weight of the late-interaction loss"""
    bf16: bool = True
    """autocast to bfloat16"""

    # checkpoints
    save_every: int = 250
    """steps between states to resume from"""
    resume: bool = False
    """resume the run in `out` from its last state"""

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.batch_size % 2:
            raise UserError(f"pretrain.batch_size must be an even number of at least 2, got {self.batch_size}")
