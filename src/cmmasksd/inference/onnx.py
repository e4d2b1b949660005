"""OnnxSegmenter: a segmenter for models that `cmmasksd export` wrote. It needs onnxruntime, but neither torch nor
transformers.

Images are preprocessed as the processor does it, in numpy, and give the same pixels to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmmasksd.errors import UserError, reason, shown
from cmmasksd.inference.base import ENCODE_TOGETHER, BaseSegmenter, Encoded, slices
from cmmasksd.inference.bicubic import resize_bicubic
from cmmasksd.inference.export_settings import EXPORT_FILE, GRAPHS, TOKENIZER_FILE, ExportSettings
from cmmasksd.model.locating import TOKENIZER_BYTES, no_panic, small
from cmmasksd.model.placement import Placement, place
from cmmasksd.model.presence import MIN_SCORE, presence_numpy

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer


class OnnxSegmenter(BaseSegmenter):
    """An exported model, ready to use; `segment` and `segment_batch` are those of `BaseSegmenter`.

    Args:
        settings: content of `export.json`.
        tokenizer: its tokenizer.
        sessions: the graphs by name, see GRAPHS.
        threshold, min_score: see `BaseSegmenter`.

    Raises:
        UserError: the threshold or `min_score` is not between 0 and 1.
    """

    def __init__(
        self,
        settings: ExportSettings,
        tokenizer: Tokenizer,
        sessions: dict[str, InferenceSession],
        *,
        threshold: float = 0.5,
        min_score: float = MIN_SCORE,
    ) -> None:
        super().__init__(threshold, min_score)
        self.settings, self.tokenizer, self.sessions = settings, tokenizer, sessions
        tokenizer.enable_truncation(settings.max_tokens)
        tokenizer.enable_padding(pad_id=settings.pad_token)
        tokenizer.encode_special_tokens = True  # a user who types "<|endoftext|>" does not end the sentence

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | None = None, threshold: float = 0.5, min_score: float = MIN_SCORE
    ) -> OnnxSegmenter:
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
        segmenter = cls(settings, tokenizer, open_sessions(folder), threshold=threshold, min_score=min_score)
        start = [] if settings.start_token is None else [settings.start_token]
        ids = segmenter.tokens(["a"])["input_ids"][0].tolist()
        try:
            largest = max(tokenizer.get_vocab().values())
            probe = np.array([[*start, largest, settings.end_token, settings.pad_token]])
            segmenter.sessions["text"].run(None, {"input_ids": probe, "attention_mask": np.ones_like(probe)})
        except Exception as error:  # the library's exceptions have no common class
            raise UserError(f"{file} does not fit the text encoder beside it ({reason(error)}): export again") from None
        if len(ids) < 2 + len(start) or [*ids[: len(start)], ids[-1]] != [*start, settings.end_token]:
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

    def restored(self, encoded: Encoded, part: slice) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        """Logits and probabilities (H, W) of the sentences of a part, and their presence."""
        owners = encoded.owner[part]
        images = {name: values[owners] for name, values in encoded.features.items()}
        sentences = {name: values[part] for name, values in encoded.sentences.items()}
        all_logits = self._run("decoder", **images, **sentences)["logits"]
        for owner, logits, present in zip(owners, all_logits, presence_numpy(all_logits).tolist(), strict=True):
            placement = encoded.placements[owner]
            sides = {name: np.array(getattr(placement, name), np.int64) for name in ("original", "canvas", "content")}
            restored = self._run("restore", logits=logits[None], **sides)
            yield restored["restored"][0], restored["probability"][0], present

    def _run(self, graph: str, **values: np.ndarray) -> dict[str, np.ndarray]:
        session = self.sessions[graph]
        feed = {node.name: values[node.name] for node in session.get_inputs()}
        outputs: Any = session.run(None, feed)
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
