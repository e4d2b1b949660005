"""OnnxSegmenter: a segmenter for models that `cmmasksd export` wrote. It needs onnxruntime, but neither torch nor
transformers.

Images are preprocessed as the processor does it, in numpy. torch's antialiased bicubic on bytes is integer arithmetic
with 16-bit weights; it is repeated here, so both give the same pixels to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cmmasksd.errors import UserError, reason, shown
from cmmasksd.inference.base import ENCODE_TOGETHER, BaseSegmenter, Encoded, slices
from cmmasksd.model.locating import TOKENIZER_BYTES, no_panic, read_json, small
from cmmasksd.model.placement import (
    MAX_SIDE,
    Placement,
    canvas_of,
    columns_first,
    mean_and_std,
    place,
    whole,
)

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

EXPORT_FILE, TOKENIZER_FILE = "export.json", "tokenizer.json"
GRAPHS = ("image", "text", "decoder", "restore")
FORMAT_VERSION = 2
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
    """Content of `export.json`: what a program in any language needs beside the graphs and `tokenizer.json`.

    Attributes:
        version: version of this layout.
        format: "onnx" or "pt2".
        int8: whether the weights are quantised.
        size: (height, width) of the canvas in pixels.
        patch_size: side of a patch in pixels; sides of any canvas are multiples of it.
        stride: pixels of the canvas per logit.
        resize: "warp" or "letterbox", see `place`; the filter is antialiased bicubic.
        mean, std: per channel, of pixel values in [0, 1].
        max_tokens: maximum number of tokens per sentence, start and end included.
        start_token, end_token, pad_token: ids of these tokens.
        parity: differences from the model, measured by the export.
        source: the exported model.
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
            UserError: it is missing, damaged, or of another version.
        """
        file = folder / EXPORT_FILE
        if not file.is_file():
            raise UserError(f"no {EXPORT_FILE} in {folder}: give a folder that `cmmasksd export` wrote")
        content = read_json(file)
        if (version := content.get("version")) is True or version != FORMAT_VERSION:
            raise UserError(f"{file} has version {shown(version)}, this package reads {FORMAT_VERSION}: export again")
        if wrong := content.keys() ^ {field.name for field in fields(cls)}:
            raise UserError(f"{file}: {shown(sorted(wrong)[0])} is missing or unknown: export again")
        try:
            content |= {key: whole(key, content[key], *bounds) for key, bounds in _BOUNDS.items()}
            content["size"] = canvas_of(content["size"], content["patch_size"])
            content["mean"], content["std"] = mean_and_std(content["mean"], content["std"])
        except UserError as error:
            raise UserError(f"{file}: {error}; export again") from None
        sound = {
            "format": content["format"] in ("onnx", "pt2"),
            "int8": isinstance(content["int8"], bool),
            "stride": isinstance(content["stride"], int | float) and 0 < content["stride"] <= MAX_SIDE,
            "resize": content["resize"] in ("warp", "letterbox"),
            "parity": isinstance(content["parity"], dict),
            "source": isinstance(content["source"], str),
            "package": isinstance(content["package"], str),
        }
        for key, good in sound.items():
            if not good:
                raise UserError(f"{file}: {key} is {shown(content[key])}, which no export writes: export again")
        return cls(**content)


class OnnxSegmenter(BaseSegmenter):
    """An exported model, ready to use; `segment` and `segment_batch` are those of `BaseSegmenter`.

    Args:
        settings: settings of the export.
        tokenizer: its tokenizer.
        sessions: the graphs by name, see GRAPHS.
        threshold: a pixel belongs to the mask when its probability is above it.

    Raises:
        UserError: the threshold is not between 0 and 1.
    """

    def __init__(
        self,
        settings: ExportSettings,
        tokenizer: Tokenizer,
        sessions: dict[str, InferenceSession],
        *,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(threshold)
        self.settings, self.tokenizer, self.sessions = settings, tokenizer, sessions
        tokenizer.enable_truncation(settings.max_tokens)
        tokenizer.enable_padding(pad_id=settings.pad_token)
        tokenizer.encode_special_tokens = True  # a user who types "<|endoftext|>" does not end the sentence

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | None = None, threshold: float = 0.5) -> OnnxSegmenter:
        """Load a folder that `cmmasksd export --format onnx` wrote.

        Raises:
            UserError: the folder is not such an export, a file is missing or damaged, or the device is not the CPU.
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
        segmenter = cls(settings, tokenizer, open_sessions(folder), threshold=threshold)
        ids = segmenter.tokens(["a"])["input_ids"][0].tolist()
        try:
            largest = max(tokenizer.get_vocab().values())
            probe = np.array([[settings.start_token, largest, settings.end_token, settings.pad_token]])
            segmenter.sessions["text"].run(None, {"input_ids": probe, "attention_mask": np.ones_like(probe)})
        except Exception as error:  # the library's exceptions have no common class
            raise UserError(f"{file} does not fit the text encoder beside it ({reason(error)}): export again") from None
        if len(ids) < 3 or [ids[0], ids[-1]] != [settings.start_token, settings.end_token]:
            raise UserError(f"{file} does not fit {EXPORT_FILE} beside it ('a' is {shown(ids)}): export again")
        return segmenter

    # -- the hooks of BaseSegmenter

    def canvas(self, image: np.ndarray) -> tuple[np.ndarray, Placement]:
        """One image on the canvas, (h, w, 3) uint8, and where it lies on it; equal to the processor's."""
        placement = place(image.shape[0], image.shape[1], self.settings.size, self.settings.resize)
        top, left, h, w = placement.content
        canvas = np.empty((*placement.canvas, 3), np.uint8)
        canvas[:] = [round(255 * mean) for mean in self.settings.mean]
        canvas[top : top + h, left : left + w] = resize_bicubic(image, h, w)
        return canvas, placement

    def encode_images(self, canvases: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of the image graph, by name."""
        return self._run("image", pixel_values=self.pixel_values(np.stack(canvases)))

    def encode_texts(self, texts: list[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Tokens and inputs of the decoder, by name; ENCODE_TOGETHER sentences at a time, all padded alike."""
        tokens = self.tokens(texts)
        parts = [
            self._run("text", **{name: tokens[name][part] for name in ("input_ids", "attention_mask")})
            for part in slices(len(texts), ENCODE_TOGETHER)
        ]
        features = {name: np.concatenate([outputs[name] for outputs in parts]) for name in parts[0]}
        return tokens, features | {"word_mask": tokens["word_mask"]}

    def restored(self, encoded: Encoded, part: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Logits and probabilities (H, W) of the sentences of a part."""
        owners = encoded.owner[part]
        images = {name: values[owners] for name, values in encoded.features.items()}
        sentences = {name: values[part] for name, values in encoded.sentences.items()}
        for owner, logits in zip(owners, self._run("decoder", **images, **sentences)["logits"], strict=True):
            placement = encoded.placements[owner]
            sides = {name: np.array(getattr(placement, name), np.int64) for name in ("original", "canvas", "content")}
            restored = self._run("restore", logits=logits[None], **sides)
            yield restored["restored"][0], restored["probability"][0]

    def _run(self, graph: str, **values: np.ndarray) -> dict[str, np.ndarray]:
        session = self.sessions[graph]
        outputs: Any = session.run(None, values)
        return dict(zip((output.name for output in session.get_outputs()), outputs, strict=True))

    # -- what the processor does, in numpy

    def pixel_values(self, images: np.ndarray) -> np.ndarray:
        """(B, h, w, 3) uint8 to normalised (B, 3, h, w) float32."""
        shift, scale = (np.float32(255) * np.array(x, np.float32) for x in (self.settings.mean, self.settings.std))
        return np.ascontiguousarray(((images - shift) / scale).transpose(0, 3, 1, 2))

    def tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Tokens of K sentences: input_ids and attention_mask (K, L) int64, and word_mask (K, L) bool.

        Raises:
            UserError: the tokenizer is damaged.
        """
        try:
            with no_panic():
                encodings = self.tokenizer.encode_batch(list(texts))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"the tokenizer of the model cannot read a sentence ({reason(error)}): export again"
            ) from None
        return {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
            "word_mask": np.array([[word is not None for word in encoding.word_ids] for encoding in encodings]),
        }


def open_sessions(folder: Path) -> dict[str, InferenceSession]:
    """The graphs of an exported folder, on the CPU.

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
        options.enable_cpu_mem_arena = name != "restore"  # the arena would keep maps as large as the image
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
