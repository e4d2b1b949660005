"""OnnxSegmenter: a Segmenter for models that `cmmasksd export` wrote. It needs onnxruntime, and neither torch nor
transformers.

What it does to pixels is what the processor does, in numpy: torch's antialiased bicubic on bytes is integer arithmetic
with weights of 16 bits, and done so here too, so that both see the same pixels to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cmmasksd.data.images import Picture, as_pixels
from cmmasksd.data.samples import is_blank
from cmmasksd.errors import UserError, reason, shown
from cmmasksd.inference.predictor import DECODE_TOGETHER, Segmentation, Segments
from cmmasksd.model.locating import TOKENIZER_BYTES, no_panic, read_json, small
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

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

EXPORT_FILE, TOKENIZER_FILE = "export.json", "tokenizer.json"
GRAPHS = ("image", "text", "decoder")
FORMAT_VERSION = 1
_TOKEN = (0, 1 << 20)
_BOUNDS = {
    "patch_size": (1, MAX_SIDE),
    "max_tokens": (3, 4096),
    "start_token": _TOKEN,
    "end_token": _TOKEN,
    "pad_token": _TOKEN,
}


@dataclass(frozen=True)
class ExportSettings:
    """What `export.json` holds: all that a program in any language needs beside the graphs and `tokenizer.json`.

    Attributes:
        version: of this layout.
        format: "onnx" or "pt2".
        int8: whether the weights are quantised.
        size: (height, width) of the canvas in pixels.
        patch_size: pixels a side of a patch; other canvases are multiples of it.
        stride: pixels of the canvas per logit.
        resize: how an image is laid on the canvas; the filter is antialiased bicubic.
        mean, std: of the pixel values in [0, 1].
        max_tokens: of a sentence, start and end included.
        start_token, end_token, pad_token: their ids.
        parity: what was measured when it was written.
        source: the model it was made from.
        package: version of cmmasksd.
    """

    version: int
    format: Literal["onnx", "pt2"]
    int8: bool
    size: tuple[int, int]
    patch_size: int
    stride: float
    resize: Literal["warp", "letterbox"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    max_tokens: int
    start_token: int
    end_token: int
    pad_token: int
    parity: dict[str, float]
    source: str
    package: str

    def as_json(self) -> str:
        """The content of `export.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> ExportSettings:
        """Read `export.json` of a folder.

        Raises:
            UserError: there is none, or it is not one of ours.
        """
        file = folder / EXPORT_FILE
        if not file.is_file():
            raise UserError(f"no {EXPORT_FILE} in {folder}: give a folder that `cmmasksd export` wrote")
        found = read_json(file)
        if (version := found.get("version")) is True or version != FORMAT_VERSION:
            raise UserError(f"{file} has version {shown(version)}, this package reads {FORMAT_VERSION}: export again")
        if wrong := found.keys() ^ {field.name for field in fields(cls)}:
            raise UserError(f"{file}: {shown(sorted(wrong)[0])} is missing or unknown: export again")
        try:
            found |= {key: whole(key, found[key], *bounds) for key, bounds in _BOUNDS.items()}
            found["size"] = canvas_of(found["size"], found["patch_size"])
            found["mean"], found["std"] = mean_and_std(found["mean"], found["std"])
        except UserError as error:
            raise UserError(f"{file}: {error}; export again") from None
        sound = {
            "format": found["format"] in ("onnx", "pt2"),
            "int8": isinstance(found["int8"], bool),
            "stride": isinstance(found["stride"], int | float) and 0 < found["stride"] <= MAX_SIDE,
            "resize": found["resize"] in ("warp", "letterbox"),
            "parity": isinstance(found["parity"], dict),
            "source": isinstance(found["source"], str),
            "package": isinstance(found["package"], str),
        }
        for key, good in sound.items():
            if not good:
                raise UserError(f"{file}: {key} is {shown(found[key])}, which no export writes: export again")
        return cls(**found)


@dataclass(frozen=True, slots=True)
class EncodedArrays:
    """B images and K sentences, ready to be decoded pair by pair; `Encoded` in numpy.

    Attributes:
        images: B times (H, W, 3) uint8.
        texts: the K sentences.
        owner: (K,) which image each sentence is about.
        placements: B, how each image was laid on the model's canvas.
        of_images: what the image graph gives, and of_texts: what the text graph gives, by the decoder's names.
    """

    images: list[np.ndarray]
    texts: list[str]
    owner: list[int]
    placements: list[Placement]
    of_images: dict[str, np.ndarray]
    of_texts: dict[str, np.ndarray]


class OnnxSegmenter(Segments):
    """An exported model, ready to use: `segment` and `segment_batch` are those of `Segments`.

    Args:
        settings: of the export.
        tokenizer: its tokenizer.
        sessions: the graphs by name, see GRAPHS.
        threshold: a pixel belongs to the mask when its probability is above it.

    Raises:
        UserError: for a threshold that is no probability.
    """

    def __init__(
        self,
        settings: ExportSettings,
        tokenizer: Tokenizer,
        sessions: dict[str, InferenceSession],
        *,
        threshold: float = 0.5,
    ) -> None:
        self._level = threshold_to_logit(threshold)
        self.settings, self.sessions, self.threshold = settings, sessions, threshold
        self.tokenizer = tokenizer
        tokenizer.enable_truncation(settings.max_tokens)
        tokenizer.enable_padding(pad_id=settings.pad_token)
        tokenizer.encode_special_tokens = True  # a user who types "<|endoftext|>" does not end the sentence

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | None = None, threshold: float = 0.5) -> OnnxSegmenter:
        """Load a folder that `cmmasksd export --format onnx` wrote.

        Raises:
            UserError: when it is none, a file of it is missing or damaged, or the device is not the CPU.
        """
        folder = Path(name)
        settings = ExportSettings.read(folder)
        if settings.format != "onnx":
            raise UserError(f"{folder} holds programs of torch.export, not ONNX: export with --format onnx")
        if device not in (None, "cpu"):
            raise UserError(f"an exported model runs on the CPU, not on {device!r}: leave the device out")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("exported models need tokenizers: pip install 'cmmasksd[export]'") from None
        file = small(folder / TOKENIZER_FILE, TOKENIZER_BYTES)
        try:
            with no_panic():
                tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{file} cannot be read ({reason(error)}): export again") from None
        found = cls(settings, tokenizer, open_sessions(folder), threshold=threshold)
        ids = found.tokens(["a"])[0][0].tolist()
        try:
            largest = max(tokenizer.get_vocab().values())
            probe = np.array([[settings.start_token, largest, settings.end_token, settings.pad_token]])
            found.sessions["text"].run(None, {"input_ids": probe, "attention_mask": np.ones_like(probe)})
        except Exception as error:  # the library's exceptions have no common class
            raise UserError(f"{file} does not fit the text encoder beside it ({reason(error)}): export again") from None
        if len(ids) < 3 or [ids[0], ids[-1]] != [settings.start_token, settings.end_token]:
            raise UserError(f"{file} does not fit {EXPORT_FILE} beside it ('a' is {shown(ids)}): export again")
        return found

    def encode(self, requests: Sequence[tuple[Picture, Sequence[str] | str]]) -> EncodedArrays:
        """See `Segments.encode`."""
        images, placements, canvases, texts, owner = [], [], [], [], []
        for nth, (image, said) in enumerate(requests):
            said = [said] if isinstance(said, str) else list(said)
            if not said:
                raise UserError("no sentence given: say what to look for")
            pixels = as_pixels(image)
            canvas, placement = self.canvas(pixels)
            images.append(pixels)
            placements.append(placement)
            canvases.append(canvas)
            texts += said
            owner += [nth] * len(said)
        ids, attention, is_word = self.tokens(texts)
        of_images = self._run("image", pixel_values=self.pixel_values(np.stack(canvases)))
        of_texts = self._run("text", input_ids=ids, attention_mask=attention)
        return EncodedArrays(images, texts, owner, placements, of_images, of_texts | {"word_mask": is_word})

    def decode(self, encoded: EncodedArrays, thresholds: Sequence[float] | None = None) -> Iterator[Segmentation]:
        """See `Segments.decode`."""
        above = [threshold_to_logit(one) for one in thresholds or [self.threshold] * len(encoded.images)]
        for start in range(0, len(encoded.texts), DECODE_TOGETHER):
            part = slice(start, start + DECODE_TOGETHER)
            of_images = {name: value[encoded.owner[part]] for name, value in encoded.of_images.items()}
            of_texts = {name: value[part] for name, value in encoded.of_texts.items()}
            logits = self._run("decoder", **of_images, **of_texts)["logits"]
            for text, owner, logit in zip(encoded.texts[part], encoded.owner[part], logits, strict=True):
                restored = restore(logit, encoded.placements[owner])
                mask, probability = restored > above[owner], _sigmoid(restored)
                score = float(probability[mask].mean()) if mask.any() else 0.0
                yield Segmentation(text, mask, score, encoded.images[owner], probability)

    def _run(self, graph: str, **values: np.ndarray) -> dict[str, np.ndarray]:
        session = self.sessions[graph]
        found: Any = session.run(None, values)
        return dict(zip((one.name for one in session.get_outputs()), found, strict=True))

    # -- what the processor does, in numpy

    def canvas(self, image: np.ndarray) -> tuple[np.ndarray, Placement]:
        """Lay one image, (H, W, 3) uint8 RGB, on the canvas: (h, w, 3) uint8, and how it was laid."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise UserError(f"an image must be (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}")
        placement = place(image.shape[0], image.shape[1], self.settings.size, self.settings.resize)
        top, left, h, w = placement.content
        canvas = np.empty((*placement.canvas, 3), np.uint8)
        canvas[:] = [round(255 * mean) for mean in self.settings.mean]
        canvas[top : top + h, left : left + w] = resize_bicubic(image, h, w)
        return canvas, placement

    def pixel_values(self, images: np.ndarray) -> np.ndarray:
        """(B, h, w, 3) uint8 to normalised (B, 3, h, w) float32."""
        shift, scale = (np.float32(255) * np.array(x, np.float32) for x in (self.settings.mean, self.settings.std))
        return np.ascontiguousarray(((images - shift) / scale).transpose(0, 3, 1, 2))

    def tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """K sentences to ids (K, L) int64, attention mask (K, L) int64, and which tokens are words (K, L) bool.

        Raises:
            UserError: for an empty sentence, or a tokenizer that is damaged.
        """
        if any(map(is_blank, texts)):
            raise UserError("an empty sentence names no object: give at least one word")
        try:
            with no_panic():
                read = self.tokenizer.encode_batch(list(texts))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"the tokenizer of the model cannot read a sentence ({reason(error)}): export again"
            ) from None
        ids, attention = (np.array([getattr(one, key) for one in read], np.int64) for key in ("ids", "attention_mask"))
        return ids, attention, np.array([[word is not None for word in one.word_ids] for one in read])


def open_sessions(folder: Path) -> dict[str, InferenceSession]:
    """The three graphs of an exported folder, on the CPU.

    Raises:
        UserError: onnxruntime is not installed, or a graph is missing or damaged.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("exported models need onnxruntime: pip install 'cmmasksd[export]'") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    sessions = {}
    for name in GRAPHS:
        file = folder / f"{name}.onnx"
        try:
            sessions[name] = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's exceptions have no common class
            raise UserError(f"{file} cannot be read ({reason(error)}): export again") from None
    return sessions


def resize_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3) uint8, equal to torch's antialiased bicubic on bytes."""
    steps = [(1, width), (0, height)]
    for axis, target in reversed(steps) if columns_first(image.shape[:2], (height, width)) else steps:
        source = image.shape[axis]
        if source == target:
            continue
        first, weights, precision = _bicubic_weights(source, target)
        lines = np.moveaxis(image, axis, 0)  # (source, …, 3)
        total = np.full((target, *lines.shape[1:]), 1 << (precision - 1), np.int32)
        for tap in range(weights.shape[1]):
            total += weights[:, tap, None, None] * lines[np.minimum(first + tap, source - 1)]
        image = np.moveaxis((total >> precision).clip(0, 255).astype(np.uint8), 0, axis)
    return image


def _bicubic_weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The first source line of each target line (target,), integer weights (target, taps), and their binary places."""
    scale = source / target
    shrink = max(scale, 1.0)
    centre = scale * (np.arange(target) + 0.5)
    first = np.maximum((centre - 2 * shrink + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + 2 * shrink + 0.5).astype(np.int64), source) - first
    tap = np.arange(count.max())
    x = np.abs((first[:, None] + tap - centre[:, None] + 0.5) / shrink)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((x - 5) * x + 8) * x * -0.5 + 2, 0.0))
    weights[tap >= count[:, None]] = 0
    weights /= weights.sum(1, keepdims=True)
    precision = 0
    while precision < 22 and int(0.5 + weights.max() * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    return first, np.trunc(weights * (1 << precision) + np.copysign(0.5, weights)).astype(np.int32), precision


def restore(logits: np.ndarray, placement: Placement) -> np.ndarray:
    """Undo `canvas`: (h, w) logits at any stride to logits (H, W) of every pixel of the original image."""
    top, left, h, w = placement.content
    if (h, w) != placement.canvas:  # padding must go before anything mixes it with the image
        rows, columns = (
            np.arange(cells).clip(*inside(cells, *along))
            for cells, *along in zip(logits.shape, placement.canvas, (top, left), (h, w), strict=True)
        )
        logits = resize_bilinear(logits[rows[:, None], columns], *placement.canvas)[top : top + h, left : left + w]
    return resize_bilinear(logits, *placement.original)


def resize_bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) float32 to (height, width) float32; cells are areas, as in torch without aligned corners."""
    for axis, target in ((0, height), (1, width)):
        source = values.shape[axis]
        at = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
        low = np.minimum(at.astype(np.int64), source - 1)
        high = np.minimum(low + 1, source - 1)
        share = (at - low).astype(np.float32)
        share = share[:, None] if axis == 0 else share
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (np.tanh(0.5 * values) + 1)
