"""CMMaskSDProcessor: images and sentences to tensors, logits back to masks at the image's own size.

One processor serves training, evaluation, prediction and export, and is saved beside the weights, so that a picture is
never resized in two ways (a mistake of several peers). Where an image lies is kept in a `Placement`; `masks` undoes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmmasksd.data.samples import is_blank
from cmmasksd.errors import UserError, reason, shown
from cmmasksd.model.locating import (
    MODEL_TYPE,
    TOKENIZER_BYTES,
    TOKENIZER_FILES,
    files_of,
    model_folder,
    no_panic,
    read_json,
    require,
    small,
)
from cmmasksd.model.placement import (
    MAX_SIDE,
    Placement,
    canvas_of,
    columns_first,
    inside,
    mean_and_std,
    place,
    threshold_to_logit,
    whole,
)
from cmmasksd.model.towers.base import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FILE_NAME = "processor_config.json"
MAX_TOKENS = 4096
_PREPROCESSING = ("preprocessor_config.json", FILE_NAME)
_TOKENIZER_SETTINGS = ("bos_token", "eos_token", "unk_token", "pad_token", "added_tokens_decoder", "model_max_length")


def normalize(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(..., 3, H, W) uint8 to float, by CLIP's mean and standard deviation."""
    shift = torch.tensor(mean, device=images.device)[:, None, None] * 255
    scale = torch.tensor(std, device=images.device)[:, None, None] * 255
    return (images.float() - shift) / scale


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
    """Tokenise sentences and say which word each token belongs to.

    Args:
        tokenizer: any fast tokenizer with start and end tokens, such as CLIP's.
        texts: B sentences.
        max_tokens: the most tokens of a sentence, start and end included; longer ones lose their last words, never the
            end token. None: the tokenizer's own limit.

    Raises:
        UserError: for an empty sentence.
    """
    for text in texts:
        if is_blank(text):
            raise UserError("an empty sentence names no object: give at least one word")
    encoded = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=max_tokens,
        split_special_tokens=True,  # a user who types "<|endoftext|>" does not end the sentence
        return_tensors="pt",
    )
    words = [[-1 if word is None else word for word in encoded.word_ids(i)] for i in range(len(texts))]
    mask = encoded["attention_mask"]
    word_ids = torch.tensor(words).masked_fill(mask == 0, -1)
    encodings = encoded.encodings
    assert encodings is not None  # fast tokenizers only; from_pretrained checks
    truncated = torch.tensor([bool(e.overflowing) for e in encodings])
    return Tokens(encoded["input_ids"], mask, word_ids, truncated)


def _resized(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    """(B, C, H, W) to (B, C, height, width), antialiased.

    torch resizes along the rows first, which costs too much for a long and narrow image (`columns_first`), and it fills
    a single column of floats with its first value (2.13). Such images are therefore resized on their side.
    """
    if images.shape[-1] == 1 or columns_first(images.shape[-2:], (height, width)):
        return F.interpolate(images.mT, (width, height), mode=mode, antialias=True).mT
    return F.interpolate(images, (height, width), mode=mode, antialias=True)


class CMMaskSDProcessor:
    """Turns images and sentences into the model's input and logits into masks.

    Args:
        tokenizer: of the CLIP backbone, a fast one.
        size: (height, width) of the model's input in pixels; multiples of the patch size.
        resize: "warp" stretches the image to the canvas, "letterbox" keeps its aspect ratio and pads.
        max_tokens: the most tokens of a sentence, start and end included; never more than the tokenizer's own limit.
        patch_size: of the backbone, to check sizes against.
        mean, std: of the pixel values in [0, 1].

    Raises:
        UserError: when a size is out of bounds or not a multiple of the patch size, `max_tokens` holds no word, or
            `mean` and `std` are not of pixel values in [0, 1].
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
        # 3: start, a word, end
        most = min(whole("max_tokens", max_tokens, 3, MAX_TOKENS), tokenizer.model_max_length)
        self.tokenizer, self.max_tokens = tokenizer, most  # the text tower has no more positions
        self.patch_size = whole("patch_size", patch_size, 1, MAX_SIDE)
        self.resize: Literal["warp", "letterbox"] = resize
        self.mean, self.std = mean_and_std(mean, std)
        self.size = canvas_of(size, self.patch_size)

    # -- to tensors

    def placement(self, height: int, width: int, size: tuple[int, int] | None = None) -> Placement:
        """Where an image of the given size goes on the canvas."""
        canvas = self.size if size is None else canvas_of(size, self.patch_size)
        return place(height, width, canvas, self.resize)

    def image(self, image: np.ndarray, size: tuple[int, int] | None = None) -> tuple[Tensor, Placement]:
        """Lay one image on the canvas.

        Args:
            image: (H, W, 3) uint8 RGB.
            size: another canvas than the processor's own.

        Returns:
            (3, h, w) uint8 (see `pixel_values`), and how it was laid.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise UserError(f"an image must be (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}")
        placement = self.placement(image.shape[0], image.shape[1], size)
        top, left, h, w = placement.content
        tensor = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
        if (h, w) != placement.original:
            tensor = _resized(tensor, h, w, "bicubic")
        if (h, w) == placement.canvas:
            return tensor[0], placement
        canvas = torch.tensor([round(255 * m) for m in self.mean], dtype=torch.uint8)[:, None, None]
        canvas = canvas.expand(-1, *placement.canvas).clone()
        canvas[:, top : top + h, left : left + w] = tensor[0]
        return canvas, placement

    def pixel_values(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 to normalised float; done in one go on the model's device."""
        return normalize(images, self.mean, self.std)

    def target(self, mask: np.ndarray, placement: Placement, stride: float) -> Tensor:
        """A mask as the training target: how much of each logit's cell it covers.

        Weighted by the bilinear filter, which reaches half a cell beyond: targets upsampled again then lie closer to
        the mask than plain fractions do (mean IoU 0.997 against 0.981 for discs and boxes at 480 pixels and stride 4).

        Args:
            mask: (H, W) bool at the image's own size.
            placement: how its image was laid.
            stride: pixels of the canvas per logit.

        Returns:
            (h / stride, w / stride) float in [0, 1].
        """
        if mask.shape != placement.original:
            raise UserError(
                f"a mask of {mask.shape} does not fit an image of {placement.original}: they must have one size"
            )
        top, left, h, w = placement.content
        value = torch.from_numpy(np.require(mask, requirements=["C", "W"]))[None, None].float()
        if (h, w) != placement.canvas:
            value = _resized(value, h, w, "bilinear")
            value = F.pad(value, (left, placement.canvas[1] - left - w, top, placement.canvas[0] - top - h))
        cells = (round(placement.canvas[0] / stride), round(placement.canvas[1] / stride))
        if value.shape[-2:] != cells:
            value = _resized(value, *cells, "bilinear")
        return value[0, 0].clamp(0, 1)

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
        top, left, h, w = placement.content
        value = logits[:, None].float()
        if (h, w) != placement.canvas:  # padding must go before anything mixes it with the image
            rows, columns = (
                torch.arange(cells, device=value.device).clamp(*inside(cells, *along))
                for cells, *along in zip(value.shape[-2:], placement.canvas, (top, left), (h, w), strict=True)
            )
            value = value[..., rows[:, None], columns]
            value = F.interpolate(value, placement.canvas, mode="bilinear")[..., top : top + h, left : left + w]
        return F.interpolate(value, placement.original, mode="bilinear")[:, 0]

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
        """Read what `save_pretrained` wrote, from a folder or a hub id.

        Args:
            name: a folder, a hub id, or a shipped model.
            **hub: `revision`, `token`, …, see `cmmasksd.model.locating.model_folder`.

        Raises:
            UserError: when the files are not those of a processor of ours.
        """
        hub = {key: value for key, value in hub.items() if key not in ("trust_remote_code", "_from_auto")}
        folder = model_folder(name, **hub)  # AutoProcessor also passes the two keys above
        file = folder / FILE_NAME
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
        if (clip := _clip_config(folder)) is not None:
            _check_tokenizer(processor.tokenizer, clip, folder)
            context, patch = clip.text_config.max_position_embeddings, clip.vision_config.patch_size
            if processor.max_tokens > context or processor.patch_size != patch:
                raise UserError(
                    f"{file} has max_tokens {processor.max_tokens} and patch_size {processor.patch_size}, the model in "
                    f"its folder {context} and {patch}: they belong to different models"
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
        """A processor for a new model on a CLIP (or another model with a tokenizer) given by folder or hub id. The mean
        and the standard deviation of its pixels are those of the backbone, or CLIP's own where it names none.

        Raises:
            UserError: when the tokenizer or these values cannot be read, or the tokenizer does not fit the CLIP.
        """
        folder = files_of(name, (*TOKENIZER_FILES, "config.json", *_PREPROCESSING))
        tokenizer, (mean, std) = load_tokenizer(folder), _mean_and_std(folder)
        if (clip := _clip_config(folder)) is not None:
            _check_tokenizer(tokenizer, clip, folder)
            tokenizer.model_max_length = min(tokenizer.model_max_length, clip.text_config.max_position_embeddings)
        return cls(tokenizer, size, patch_size=patch_size, resize=resize, max_tokens=max_tokens, mean=mean, std=std)


def _mean_and_std(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those of a backbone's pixels. transformers 5 writes them into a section of the second file."""
    file = next((folder / one for one in _PREPROCESSING if (folder / one).is_file()), None)
    if file is None:
        return CLIP_MEAN, CLIP_STD
    found = read_json(file)
    if file.name == FILE_NAME:
        found = found.get("image_processor", {})
    if not isinstance(found, dict):
        raise UserError(f"{file}: image_processor is {shown(found)}, expected an object")
    try:
        return mean_and_std(found.get("image_mean", CLIP_MEAN), found.get("image_std", CLIP_STD), "image_")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _clip_config(folder: Path) -> Any:
    """The CLIPConfig of the model in a folder; None where there is no model, or one of another kind."""
    from cmmasksd.model.configuration import read_clip_config, read_config

    if not (folder / "config.json").is_file():
        return None
    kind = read_json(folder / "config.json").get("model_type")
    if kind == "clip":
        return read_clip_config(folder)
    return read_config(folder).clip_config if kind == MODEL_TYPE else None


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, clip: Any, folder: Path) -> None:
    """Another model's tokenizer would give wrong masks without an error."""
    text, last = clip.text_config, max(tokenizer.get_vocab().values())
    # the first CLIPs in transformers' format say 2, and mean the last id
    end = last if text.eos_token_id == 2 else text.eos_token_id
    if last >= text.vocab_size or tokenizer.eos_token_id != end:
        raise UserError(
            f"the tokenizer in {folder} has ids up to {last} and the end token {tokenizer.eos_token_id}, its model has "
            f"{text.vocab_size} ids and the end token {end}: get the tokenizer of this model"
        )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a CLIP, by folder or hub id.

    Only its vocabulary, its special tokens and its limit are read; transformers would also act on other settings of a
    stranger's files.

    Raises:
        UserError: when the files are missing or damaged, or sentences get no start and end token.
    """
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    folder = files_of(name, TOKENIZER_FILES)
    if not all((folder / one).is_file() for one in ("vocab.json", "merges.txt")):  # the files of old CLIPs
        require(folder, ("tokenizer.json",), "get the tokenizer's files too")
    settings = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_json(folder / file) if (folder / file).is_file() else {}
    clips = settings.get("tokenizer_class", "CLIPTokenizer") in ("CLIPTokenizer", "CLIPTokenizerFast")
    kind: Any = CLIPTokenizer if clips else PreTrainedTokenizerFast
    with TemporaryDirectory() as clean:
        for file in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
            if (folder / file).is_file():
                shutil.copyfile(small(folder / file, TOKENIZER_BYTES), Path(clean) / file)
        kept = {key: settings[key] for key in _TOKENIZER_SETTINGS if key in settings}
        (Path(clean) / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
        try:
            with no_panic():
                tokenizer = kind.from_pretrained(clean, local_files_only=True)
                limit = tokenizer.model_max_length
                if not isinstance(limit, int | float) or not limit >= 3:
                    raise UserError(f"model_max_length is {shown(limit)}, expected at least 3")
                tokenizer.model_max_length = int(min(limit, MAX_TOKENS))
                tokenizer.padding_side = tokenizer.truncation_side = "right"
                ids = tokenizer("a red é 1", padding=True, truncation=True)["input_ids"]
        except Exception as error:  # what the two libraries raise for damaged files has no common class
            raise UserError(
                f"the tokenizer in {folder} cannot be read ({reason(error)}): get its files again"
            ) from None
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    if len(ids) < 3 or [ids[0], ids[-1]] != ends or ends[1] in ids[1:-1]:
        raise UserError(
            f"the tokenizer in {folder} gives {shown(ids)} for a sentence, expected its start, pieces and its "
            "end: get its files again"
        )
    return tokenizer
