"""A trained model as three graphs that run without this package: image encoder, text encoder and decoder.

The encoders run once per picture and per sentence, the decoder once per pair; number of pictures, sentences, tokens and
patches are free in every graph. The patch grid travels as the shape of the features, (B, h, w, D), so that no graph
needs a size as a number.

What is written was checked: the files are read back and held to the torch model on pictures of several sizes, numbers
and lengths of sentences; a folder whose logits differ by more than PARITY does not come to be. Weights are stored as
float16 where that loses nothing (the models that ship are saved so), and computed in float32.

    image.onnx    pixel_values (B, 3, H, W) -> patches (B, h, w, D), pixels (B, h, w, 192)
    text.onnx     input_ids, attention_mask (K, L) -> words (K, L, D), sentence (K, D), embedded (K, L, E)
    decoder.onnx  patches, pixels, words, sentence, embedded, word_mask (K, L) bool -> logits (K, 4h, 4w)

`--format pt2` writes programs of torch.export instead. Know that `torch.export.load` unpickles: load your own only.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from cmmasksd import __version__
from cmmasksd.assets import located
from cmmasksd.errors import UserError
from cmmasksd.inference.onnx import (
    EXPORT_FILE,
    FORMAT_VERSION,
    GRAPHS,
    TOKENIZER_FILE,
    ExportSettings,
    OnnxSegmenter,
    open_sessions,
)
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.towers import clip as towers
from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens

if TYPE_CHECKING:
    from torch.export import ExportedProgram

PARITY = 1e-4
"""The most that a logit may differ from torch's, in float32."""
INT8_IOU = 0.9
"""The least mean IoU of the masks of quantised weights with those of float32, on generated scenes."""
OPSET = 20
_SCENES = 24


class ImageGraph(nn.Module):
    """The image encoder with its grid as a shape."""

    def __init__(self, model: CMMaskSDModel) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.clip.vision_model, model.clip.visual_projection

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        this: Any = self  # has the parts of CLIP that the tower asks for
        features = towers.encode_image(this, pixel_values)[0]
        assert features.pixels is not None
        return features.patches.unflatten(1, features.grid), features.pixels.unflatten(1, features.grid)


class TextGraph(nn.Module):
    """The text encoder; which tokens are words, the tokenizer tells."""

    def __init__(self, model: CMMaskSDModel) -> None:
        super().__init__()
        self.text_model, self.text_projection = model.clip.text_model, model.clip.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        this: Any = self
        features = towers.encode_text(this, Tokens(input_ids, attention_mask, input_ids, attention_mask[:, 0]))
        assert features.embedded is not None
        return features.words, features.sentence, features.embedded


class DecoderGraph(nn.Module):
    """Decoder and mask head, pair by pair."""

    def __init__(self, model: CMMaskSDModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, patches: Tensor, pixels: Tensor, words: Tensor, sentence: Tensor, embedded: Tensor, word_mask: Tensor
    ) -> Tensor:
        grid = (patches.shape[1], patches.shape[2])
        image = ImageFeatures(patches.flatten(1, 2), grid, pixels=pixels.flatten(1, 2))
        return self.decoder(image, TextFeatures(words, sentence, word_mask, embedded))


@dataclass(frozen=True)
class _Graph:
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[dict[int, Any], ...]  # which sizes of the inputs are free


def _graphs(model: CMMaskSDModel) -> dict[str, _Graph]:
    from torch.export import Dim

    patch, positions = model.config.clip_config.vision_config.patch_size, _positions(model)
    # A grid of one row or column would be another program: the tracer tells h from h * w by their not being equal.
    batch, h, w, tokens = Dim("batch", min=1), Dim("h", min=2), Dim("w", min=2), Dim("tokens", min=3, max=positions)
    per_token = {0: batch, 1: tokens}
    return {
        "image": _Graph(
            ImageGraph(model), ("pixel_values",), ("patches", "pixels"), ({0: batch, 2: patch * h, 3: patch * w},)
        ),
        "text": _Graph(
            TextGraph(model),
            ("input_ids", "attention_mask"),
            ("words", "sentence", "embedded"),
            (per_token, per_token),
        ),
        "decoder": _Graph(
            DecoderGraph(model),
            ("patches", "pixels", "words", "sentence", "embedded", "word_mask"),
            ("logits",),
            ({0: batch, 1: h, 2: w}, {0: batch, 1: h, 2: w}, per_token, {0: batch}, per_token, per_token),
        ),
    }


def _positions(model: CMMaskSDModel) -> int:
    return model.config.clip_config.text_config.max_position_embeddings


def export(
    name: str | Path,
    out: Path,
    *,
    format: Literal["onnx", "pt2"] = "onnx",
    int8: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> ExportSettings:
    """Write a trained model as graphs, checked against torch.

    Args:
        name: folder of a trained model, hub id, or a model that ships.
        out: the folder; an export in it is replaced.
        format: "onnx", or "pt2": programs of torch.export.
        int8: quantise the weights of the matrix products (ONNX only). Masks are then compared, not logits.
        progress: told what is being done.

    Returns:
        What was written to `export.json`; `parity` has the measured differences.

    Raises:
        UserError: a package is missing, `out` holds something else, or the graphs differ from torch; then nothing is
            left behind.
    """
    if int8 and format != "onnx":
        raise UserError("--int8 quantises ONNX graphs: use --format onnx")
    _require_packages(format)
    check_target(out)
    model, processor = CMMaskSDModel.from_pretrained(name).eval(), CMMaskSDProcessor.from_pretrained(name)
    grid = (processor.size[0] // processor.patch_size, processor.size[1] // processor.patch_size)
    if min(grid) < 2:
        raise UserError(f"a canvas of {processor.size[0]}x{processor.size[1]} pixels is one patch thin: use a larger")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_tokenizer(processor, folder)
        for key, graph in _graphs(model).items():
            progress(f"tracing the {key} graph")
            program = _trace(graph, _example(key, model))
            if format == "pt2":
                torch.export.save(program, folder / f"{key}.pt2")
            else:
                _write_onnx(program, graph, folder / f"{key}.onnx")
        progress("comparing with torch")
        parity = {"logits": _difference(model, _load(folder, format), grid)}
        if not parity["logits"] <= PARITY:
            raise UserError(
                f"the exported logits of {name} differ from torch's by {parity['logits']:.2g}, more than {PARITY:g}:"
                " nothing was written; please report it with the versions of torch and onnxruntime"
            )
        settings = _settings(name, model, processor, format, int8, parity)
        if int8:
            progress("quantising")
            for key in GRAPHS:
                _quantise(folder / f"{key}.onnx")
        (folder / EXPORT_FILE).write_text(settings.as_json(), encoding="utf-8")
        if int8:
            progress("comparing the masks with float32's")
            parity["int8 mean IoU"] = _agreement(model, processor, folder)
            if not parity["int8 mean IoU"] >= INT8_IOU:
                raise UserError(
                    f"quantised, the masks of {name} agree with float32's to a mean IoU of"
                    f" {parity['int8 mean IoU']:.3f}, below {INT8_IOU}: nothing was written; export without --int8"
                )
            (folder / EXPORT_FILE).write_text(settings.as_json(), encoding="utf-8")
        _move(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return settings


def _require_packages(format: str) -> None:
    if format == "pt2":
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"export needs {error.name}: pip install 'cmmasksd[export]'") from None


def check_target(out: Path, marker: str | Path = EXPORT_FILE) -> None:
    """Refuse to write over anything but an export.

    Args:
        out: the folder to be written.
        marker: the file in it by which an earlier export is known.

    Raises:
        UserError: `out` is a file, or a folder of something else.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / marker).is_file()):
        raise UserError(f"{out} exists and is not an export: choose another folder, or remove it first")


def _move(folder: Path, out: Path) -> None:
    """Move the files of a finished folder over those of an export, `export.json` last; what else is there stays."""
    out.mkdir(parents=True, exist_ok=True)
    for key in GRAPHS:  # of the other format
        for file in (out / f"{key}.onnx", out / f"{key}.pt2"):
            if not (folder / file.name).exists():
                file.unlink(missing_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == EXPORT_FILE):
        os.replace(file, out / file.name)


def _settings(
    name: str | Path,
    model: CMMaskSDModel,
    processor: CMMaskSDProcessor,
    format: Literal["onnx", "pt2"],
    int8: bool,
    parity: dict[str, float],
) -> ExportSettings:
    text = model.config.clip_config.text_config
    tokenizer: Any = processor.tokenizer
    mean, std = processor.mean, processor.std
    return ExportSettings(
        version=FORMAT_VERSION,
        format=format,
        int8=int8,
        size=processor.size,
        patch_size=processor.patch_size,
        stride=model.stride,
        resize=processor.resize,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        max_tokens=min(processor.max_tokens, _positions(model)),
        start_token=tokenizer.bos_token_id,
        end_token=tokenizer.eos_token_id,
        pad_token=text.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        parity=parity,
        source=str(name) if not Path(located(name)).is_dir() else Path(name).name,  # no path of this machine
        package=__version__,
    )


def _write_tokenizer(processor: CMMaskSDProcessor, folder: Path) -> None:
    """`tokenizer.json` as it is, without the state that its last use left in it."""
    from tokenizers import Tokenizer

    tokenizer: Any = processor.tokenizer
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.save(str(folder / TOKENIZER_FILE))


# ---------------------------------------------------------------------------------------------------------------------
# Tracing and writing


@torch.no_grad()
def _example(key: str, model: CMMaskSDModel) -> tuple[Tensor, ...]:
    """Inputs to trace with; all sizes differ from each other, so that none is taken for another."""
    pixels = torch.randn(2, 3, *(side * model.config.clip_config.vision_config.patch_size for side in (5, 7)))
    ids, attention, is_word = _sentences(model, 2, 9)
    if key == "image":
        return (pixels,)
    if key == "text":
        return ids, attention
    return (*ImageGraph(model)(pixels), *TextGraph(model)(ids, attention), is_word)


def _sentences(
    model: CMMaskSDModel, count: int, length: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random sentences of which the n-th is n tokens shorter: ids, attention mask (count, length), and what is a word.

    Random pieces: the end token may be any id, so it is kept out of the words."""
    text = model.config.clip_config.text_config
    ends = (length - 1 - torch.arange(count)).clamp(min=2)[:, None]
    at = torch.arange(length)
    ids = torch.randint(0, text.vocab_size, (count, length), generator=generator)
    ids = torch.where(ids == text.eos_token_id, (ids + 1) % text.vocab_size, ids)
    ids = torch.where(at < ends, ids, text.eos_token_id)
    ids[:, 0] = text.bos_token_id
    return ids, (at <= ends).long(), (at > 0) & (at < ends)


def _trace(graph: _Graph, example: tuple[Tensor, ...]) -> ExportedProgram:
    # CLIP's tower takes its positions as they are where the grid is that of its training, and interpolates them
    # elsewhere; "tracing" makes it interpolate always, which on that grid is the identity.
    always = mock.patch("torch.jit.is_tracing", return_value=True) if isinstance(graph.module, ImageGraph) else _quiet()
    with torch.no_grad(), _quiet(), always:
        return torch.export.export(graph.module.eval(), example, dynamic_shapes=graph.shapes)


@contextmanager
def _quiet() -> Any:
    """Without the exporter's remarks on packages that we do not use."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _write_onnx(program: ExportedProgram, graph: _Graph, file: Path) -> None:
    import onnx

    with _quiet():
        written = torch.onnx.export(
            program,
            input_names=graph.inputs,
            output_names=graph.outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert written is not None
    proto: Any = written.model_proto
    _halve(proto)
    onnx.save(proto, str(file))


def _halve(proto: Any) -> None:
    """Store weights as float16 where that loses nothing; a runtime casts them back once, when it loads the graph."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for stored in proto.graph.initializer:
        if stored.data_type != TensorProto.FLOAT or np.prod(stored.dims) < 1024:
            continue
        whole = numpy_helper.to_array(stored)
        with np.errstate(over="ignore"):
            half = whole.astype(np.float16)
        if np.array_equal(half.astype(np.float32), whole):
            name = stored.name
            stored.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _quantise(file: Path) -> None:
    """Weights of the matrix products to 8 bits, a scale per column; activations are quantised as they come."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = file.with_suffix(".float.onnx")
    options = onnxruntime.SessionOptions()  # casts of stored weights are carried out: the quantiser looks for constants
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = str(plain), 3
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)  # it logs to the root
    try:
        quantize_dynamic(plain, file, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    finally:
        root.setLevel(before)
        plain.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Checks of what was written


def _load(folder: Path, format: str) -> dict[str, Callable[[Sequence[Tensor]], list[Tensor]]]:
    """The graphs of a folder, as functions of tensors."""
    if format == "pt2":
        programs = {key: torch.export.load(folder / f"{key}.pt2").module() for key in GRAPHS}

        def call(module: Any, values: Sequence[Tensor]) -> list[Tensor]:
            found = module(*values)
            return [found] if isinstance(found, Tensor) else list(found)

        return {key: lambda values, module=module: call(module, values) for key, module in programs.items()}

    def run(session: Any, values: Sequence[Tensor]) -> list[Tensor]:
        names = [one.name for one in session.get_inputs()]
        feed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return {key: lambda values, session=session: run(session, values) for key, session in open_sessions(folder).items()}


@torch.no_grad()
def _difference(model: CMMaskSDModel, graphs: dict[str, Any], grid: tuple[int, int]) -> float:
    """The largest difference of a logit from torch's: pictures of several sizes, numbers and lengths of sentences."""
    generator = torch.Generator().manual_seed(0)
    vision = model.config.clip_config.vision_config
    native = vision.image_size // vision.patch_size
    longest = _positions(model)
    worst = 0.0
    for (h, w), count, length in (
        (grid, 1, 3),
        (grid, 3, longest),
        ((max(2, native), max(2, native)), 2, 6),
        ((grid[0] + 1, grid[1] + 3), 2, 7),
        ((2, 3), 1, longest),
    ):
        pixels = torch.randn(count, 3, h * vision.patch_size, w * vision.patch_size, generator=generator)
        ids, attention, is_word = _sentences(model, count, length, generator)
        tokens = Tokens(ids, attention, torch.where(is_word, 0, -1), is_word[:, 0])
        expected = model.decode(model.encode_image(pixels), model.encode_text(tokens))
        (found,) = graphs["decoder"]([*graphs["image"]([pixels]), *graphs["text"]([ids, attention]), is_word])
        if found.shape != expected.shape:
            return float("inf")
        worst = max(worst, float((found - expected).abs().max().nan_to_num(nan=float("inf"))))
    return worst


def _agreement(model: CMMaskSDModel, processor: CMMaskSDProcessor, folder: Path) -> float:
    """Mean IoU of the masks of a folder with torch's, over sentences about generated scenes that name something."""
    from cmmasksd.data.scenes import SceneDataset
    from cmmasksd.inference.predictor import Segmenter

    whole, other = Segmenter(model, processor, device="cpu"), OnnxSegmenter.from_pretrained(folder)
    data, scores = SceneDataset("scenes", "val", _SCENES), []
    for reference in data:
        image, texts = data.image(reference), [expression.text for expression in reference.expressions]
        for a, b in zip(whole.segment(image, texts), other.segment(image, texts), strict=True):
            if a.mask.any() or b.mask.any():
                scores.append((a.mask & b.mask).sum() / (a.mask | b.mask).sum())
    if not scores:
        raise UserError("the model finds nothing in generated scenes, so --int8 cannot be checked: export without it")
    return float(np.mean(scores))
