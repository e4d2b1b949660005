"""CMMaskSDProcessor: images and sentences to tensors, logits back to masks at the image's own size.

One processor serves training, evaluation, prediction and export, and is saved beside the weights, so that an image is
never resized in two ways.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from cmmasksd.errors import UserError, shown
from cmmasksd.model.locating import (
    MODEL_TYPE,
    OPEN_CLIP_CONFIG,
    PREPROCESSOR,
    TOKENIZER_FILES,
    backbone_folder,
    is_checkpoint,
    model_folder,
    model_type,
    open_clip_settings,
    read_json,
    require,
)
from cmmasksd.model.pixels import CLIP_MEAN, CLIP_STD, cover, lay, normalize, restore
from cmmasksd.model.placement import (
    MAX_SIDE,
    Placement,
    canvas_of,
    mean_and_std,
    place,
    threshold_to_logit,
    whole,
)
from cmmasksd.model.tokenizing import MAX_TOKENS, check_tokenizer, load_tokenizer, lower_case, tokenize
from cmmasksd.model.towers.base import EncoderSizes, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_NAME = "processor_config.json"
_PREPROCESSING = (PREPROCESSOR, FILE_NAME)


class CMMaskSDProcessor:
    """Turns images and sentences into the model's input and logits into masks.

    Args:
        tokenizer: the backbone's tokenizer, a fast one.
        size: (height, width) of the model's input in pixels; multiples of the patch size.
        resize: "warp" stretches the image to the canvas, "letterbox" keeps its aspect ratio and pads.
        max_tokens: maximum number of tokens per sentence, start and end included; never more than the tokenizer's own
            limit.
        patch_size: pixels per patch of the backbone, to check sizes against.
        mean, std: mean and standard deviation of pixel values in [0, 1].

    Raises:
        UserError: a size is out of bounds or not a multiple of the patch size, `max_tokens` holds no word, or `mean`
            and `std` are out of bounds.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        size: tuple[int, int],
        *,
        patch_size: int,
        resize: Literal["warp", "letterbox"] = "warp",
        max_tokens: int = 77,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        if resize not in ("warp", "letterbox"):
            raise UserError(f"unknown resize {shown(resize)}: choose warp or letterbox")
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} cannot say which word a piece belongs to: use a fast one"
            )
        self.tokenizer = tokenizer
        # at least 3: start, a word, end; at most the positions of the text tower
        self.max_tokens = min(whole("max_tokens", max_tokens, 3, MAX_TOKENS), tokenizer.model_max_length)
        self.patch_size = whole("patch_size", patch_size, 1, MAX_SIDE)
        self.resize: Literal["warp", "letterbox"] = resize
        self.mean, self.std = mean_and_std(mean, std)
        self.size = canvas_of(size, self.patch_size)

    # -- to tensors

    def placement(self, height: int, width: int) -> Placement:
        """Where an image of the given size goes on the canvas."""
        return place(height, width, self.size, self.resize)

    def image(self, image: np.ndarray) -> tuple[Tensor, Placement]:
        """Lay one image on the canvas.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            canvas: (3, h, w) uint8, see `pixel_values`.
            placement: where the image lies on it.

        Raises:
            UserError: it is not such an image.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise UserError(f"an image must be (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}")
        placement = self.placement(image.shape[0], image.shape[1])
        return lay(image, placement, self.mean), placement

    def pixel_values(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 to normalised float; done in one go on the model's device."""
        return normalize(images, self.mean, self.std)

    def target(self, mask: np.ndarray, placement: Placement, stride: float) -> Tensor:
        """A mask as the training target: how much of each logit's cell it covers (see `pixels.cover`)."""
        return cover(mask, placement, stride)

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Tokenise sentences (see `tokenize`)."""
        return tokenize(self.tokenizer, texts, self.max_tokens)

    def __call__(self, image: np.ndarray, texts: Sequence[str]) -> tuple[Tensor, Tokens, Placement]:
        """One image and its sentences: pixel values (1, 3, h, w), tokens, and the placement for `masks`."""
        pixels, placement = self.image(image)
        return self.pixel_values(pixels[None]), self.tokens(texts), placement

    # -- and back

    def probabilities(self, logits: Tensor, placement: Placement) -> Tensor:
        """Undo `image`: the probability of every pixel of the original image.

        Args:
            logits: (K, h, w) at any stride.

        Returns:
            (K, H, W) float in [0, 1].
        """
        return self.restore(logits, placement).sigmoid()

    def masks(self, logits: Tensor, placement: Placement, threshold: float = 0.5) -> Tensor:
        """The masks at the image's own size: (K, h, w) logits to (K, H, W) bool, true above the threshold in (0, 1)."""
        return self.restore(logits, placement) > threshold_to_logit(threshold)

    def restore(self, logits: Tensor, placement: Placement) -> Tensor:
        """Undo `image`: (K, h, w) logits at any stride to logits (K, H, W) of every pixel of the original image."""
        return restore(logits, placement)

    # -- files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `processor_config.json` and the tokenizer's files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        settings = {
            "processor_class": type(self).__name__,
            "size": list(self.size),
            "patch_size": self.patch_size,
            "resize": self.resize,
            "max_tokens": self.max_tokens,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        (folder / FILE_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> CMMaskSDProcessor:
        """Read what `save_pretrained` wrote, from a folder or a hub id; or the processor of a CLIPSeg.

        Args:
            name: a folder, a hub id, or a shipped model.
            **hub: `revision`, `token`, …, see `cmmasksd.model.locating.model_folder`.

        Raises:
            UserError: the files are not those of a CMMaskSDProcessor.
        """
        hub = {key: value for key, value in hub.items() if key not in ("trust_remote_code", "_from_auto")}
        folder = model_folder(name, **hub)  # AutoProcessor also passes the two keys above
        file = folder / FILE_NAME
        if model_type(folder) == "clipseg" and not (
            file.is_file() and read_json(file).get("processor_class") == cls.__name__
        ):
            return cls._of_clipseg(folder)
        require(folder, (FILE_NAME, "tokenizer.json", "tokenizer_config.json"))
        settings = read_json(file)
        settings.pop("processor_class", None)
        if wrong := settings.keys() ^ {"size", "patch_size", "resize", "max_tokens", "mean", "std"}:
            raise UserError(
                f"{file} is not a processor of ours ({shown(sorted(wrong)[0])} is missing or unknown): save it again "
                "with save_pretrained"
            )
        tokenizer = load_tokenizer(folder)
        try:
            processor = cls(tokenizer, **settings)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        if (sizes := _encoder_sizes(folder)) is not None:
            check_tokenizer(processor.tokenizer, sizes, folder)
            if processor.max_tokens > sizes.max_tokens or processor.patch_size != sizes.patch_size:
                raise UserError(
                    f"{file} has max_tokens {processor.max_tokens} and patch_size {processor.patch_size}, the model in "
                    f"its folder {sizes.max_tokens} and {sizes.patch_size}: they belong to different models"
                )
        return processor

    @classmethod
    def from_backbone(
        cls,
        name: str | Path,
        size: tuple[int, int],
        *,
        patch_size: int,
        resize: Literal["warp", "letterbox"],
        max_tokens: int,
    ) -> CMMaskSDProcessor:
        """A processor for a new model on a backbone (see `load_backbone`). Mean and standard deviation of pixels
        are the backbone's, or its family's where it names none.

        Raises:
            UserError: the tokenizer or these values cannot be read, or the tokenizer does not fit the backbone.
        """
        from cmmasksd.model.towers.families import NETWORKS

        folder = backbone_folder(name, (*TOKENIZER_FILES, "config.json", *_PREPROCESSING, OPEN_CLIP_CONFIG))
        tokenizer = load_tokenizer(folder)
        if is_checkpoint(name):
            from cmmasksd.model.loading import read_checkpoint

            config, _ = read_checkpoint(name)
            sizes, (mean, std) = NETWORKS[config.model_type].sizes(config), checkpoint_mean_and_std(folder)
        else:
            family = NETWORKS.get(model_type(folder), NETWORKS["clip"])
            sizes, (mean, std) = _encoder_sizes(folder), _mean_and_std(folder, family.mean_and_std)
            if family.lower_case:
                lower_case(tokenizer)
        if sizes is not None:
            check_tokenizer(tokenizer, sizes, folder)
            tokenizer.model_max_length = min(tokenizer.model_max_length, sizes.max_tokens)
        return cls(tokenizer, size, patch_size=patch_size, resize=resize, max_tokens=max_tokens, mean=mean, std=std)

    @classmethod
    def _of_clipseg(cls, folder: Path) -> CMMaskSDProcessor:
        """The processor of a CLIPSeg that transformers' own is saved beside: it warps every image to one size."""
        file, settings = _preprocessing(folder)
        if file is None:
            raise UserError(f"{folder} lacks {PREPROCESSOR}: get it too, it has the size and mean of the images")
        size, sizes = settings.get("size"), _encoder_sizes(folder)
        size = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
        assert sizes is not None
        try:
            canvas = canvas_of(size, sizes.patch_size)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        return cls.from_backbone(
            folder, canvas, patch_size=sizes.patch_size, resize="warp", max_tokens=sizes.max_tokens
        )


def checkpoint_mean_and_std(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels of a checkpoint of OpenAI or open_clip: CLIP's where no
    open_clip_config.json beside it names others.

    Raises:
        UserError: they cannot be read, or are out of bounds.
    """
    settings = open_clip_settings(folder, "preprocess_cfg")
    try:
        return mean_and_std(settings.get("mean", CLIP_MEAN), settings.get("std", CLIP_STD))
    except UserError as error:
        raise UserError(f"{folder / OPEN_CLIP_CONFIG}: {error}") from None


def _mean_and_std(
    folder: Path, default: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a backbone's pixels."""
    file, settings = _preprocessing(folder)
    try:
        return mean_and_std(settings.get("image_mean", default[0]), settings.get("image_std", default[1]), "image_")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _preprocessing(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The file with the settings of transformers' image processor, and these; transformers 5 writes them into a part of
    the second file. None and nothing where there is no such file."""
    file = next((folder / name for name in _PREPROCESSING if (folder / name).is_file()), None)
    if file is None:
        return None, {}
    settings = read_json(file)
    if file.name == FILE_NAME:
        settings = settings.get("image_processor", {})
    if not isinstance(settings, dict):
        raise UserError(f"{file}: image_processor is {shown(settings)}, expected an object")
    return file, settings


def _encoder_sizes(folder: Path) -> EncoderSizes | None:
    """Sizes of the model in a folder; None where there is no model, or one of another kind."""
    from cmmasksd.model.configuration import read_backbone_config, read_config
    from cmmasksd.model.towers.families import NETWORKS

    kind = model_type(folder)
    if kind in NETWORKS:
        return NETWORKS[kind].sizes(read_backbone_config(folder, NETWORKS))
    return read_config(folder).encoder if kind == MODEL_TYPE else None
