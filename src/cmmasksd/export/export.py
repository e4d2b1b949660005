"""A trained model as four graphs that run without this package: image encoder, text encoder, decoder, and the way back
from logits to the image's own size.

The encoders run once per image and once per sentence, the decoder once per pair. The numbers of images, sentences,
tokens and patches are free in every graph. The patch grid travels as the shape of the features, (B, h, w, D), so that
no graph needs a size as a number.

The files are read back and compared with the torch model on images of several sizes, and numbers and lengths of
sentences; an export whose logits differ by more than PARITY is not written. Weights are stored as float16 where that
loses nothing (the shipped models are saved so), and computed in float32.

    image.onnx    pixel_values (B, 3, H, W) -> patches (B, h, w, D), pixels (B, h, w, P), P = 192 and finer features
    text.onnx     input_ids, attention_mask (K, L) -> words (K, L, D), sentence (K, D), embedded (K, L, E)
    decoder.onnx  patches, pixels, words, sentence, embedded, word_mask (K, L) bool -> logits (K, 4h, 4w)
    restore.onnx  logits (K, 4h, 4w), original (H, W), canvas (H, W), content (top, left, height, width)
                  -> restored logits, probability (K, H, W) at the original size

A CLIPSeg has patches, context (B, 1, D) and joint (B, h, w, D), which only the maps of words need, as features of an
image; words and sentence as those of a sentence; its decoder takes patches, context and sentence, and its logits are of
the canvas's size.

`--format pt2` writes programs of torch.export instead. `torch.export.load` unpickles: load only your own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from cmmasksd import __version__
from cmmasksd.assets import located
from cmmasksd.errors import UserError
from cmmasksd.export.checks import INT8_IOU, PARITY, agreement, difference, load, restore_difference
from cmmasksd.export.graphs import example, graphs
from cmmasksd.export.onnx import quantise, trace, write_onnx
from cmmasksd.inference.export_settings import EXPORT_FILE, FORMAT_VERSION, GRAPHS, TOKENIZER_FILE, ExportSettings
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.trained import TrainedModel, load_trained


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
        int8: quantise the weights of matrix products (ONNX only); the masks are then compared with float32's too.
        progress: called with a line before each step.

    Returns:
        The content of `export.json`; `parity` has the measured differences.

    Raises:
        UserError: a package is missing, `out` holds something else, or the graphs differ from torch; nothing is written
            then.
    """
    if int8 and format != "onnx":
        raise UserError("--int8 quantises ONNX graphs: use --format onnx")
    _require_packages(format)
    check_target(out)
    model, processor = load_trained(name)
    model.eval()
    grid = (processor.size[0] // processor.patch_size, processor.size[1] // processor.patch_size)
    if min(grid) < 2:
        raise UserError(
            f"a canvas of {processor.size[0]}x{processor.size[1]} pixels is one patch thin: use a larger one"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as parts:
        folder = Path(parts)
        _write_tokenizer(processor, folder)
        for key, graph in graphs(model).items():
            progress(f"tracing the {key} graph")
            program = trace(graph, example(key, model))
            if format == "pt2":
                torch.export.save(program, folder / f"{key}.pt2")
            else:
                write_onnx(program, graph, folder / f"{key}.onnx")
        progress("comparing with torch")
        written = load(folder, format)
        parity = {
            "logits": difference(model, written, grid),
            "restored logits": restore_difference(processor, written),
        }
        for key, value in parity.items():
            if not value <= PARITY:
                raise UserError(
                    f"the exported {key} of {name} differ from torch's by {value:.2g} (of the largest, if above 1), "
                    f"more than {PARITY:g}: nothing was written; please report it with the versions of torch and "
                    "onnxruntime"
                )
        settings = _settings(name, model, processor, format, int8, parity)
        if int8:
            progress("quantising")
            for key in ("image", "text", "decoder"):
                quantise(folder / f"{key}.onnx")
        (folder / EXPORT_FILE).write_text(settings.as_json(), encoding="utf-8")
        if int8:
            progress("comparing the masks with float32's")
            parity["int8 mean IoU"] = agreement(model, processor, folder)
            if not parity["int8 mean IoU"] >= INT8_IOU:
                raise UserError(
                    f"quantised, the masks of {name} agree with float32's to a mean IoU of"
                    f" {parity['int8 mean IoU']:.3f}, below {INT8_IOU}: nothing was written; export without --int8"
                )
            (folder / EXPORT_FILE).write_text(settings.as_json(), encoding="utf-8")
        _move(folder, out)
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
    """Check that a folder is free, or holds an earlier export.

    Args:
        out: the folder to be written.
        marker: the file in it that identifies an earlier export.

    Raises:
        UserError: `out` is a file, or a folder with other content.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / marker).is_file()):
        raise UserError(f"{out} exists and is not an export: choose another folder, or remove it first")


def _move(folder: Path, out: Path) -> None:
    """Move the files of a finished folder over those of an earlier export, `export.json` last; other files stay."""
    out.mkdir(parents=True, exist_ok=True)
    for key in GRAPHS:  # those of the other format go
        for file in (out / f"{key}.onnx", out / f"{key}.pt2"):
            if not (folder / file.name).exists():
                file.unlink(missing_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == EXPORT_FILE):
        os.replace(file, out / file.name)


def _settings(
    name: str | Path,
    model: TrainedModel,
    processor: CMMaskSDProcessor,
    format: Literal["onnx", "pt2"],
    int8: bool,
    parity: dict[str, float],
) -> ExportSettings:
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
        max_tokens=min(processor.max_tokens, model.config.encoder.max_tokens),
        start_token=None if model.config.encoder.start_token is None else tokenizer.bos_token_id,
        end_token=tokenizer.eos_token_id,
        pad_token=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        parity=parity,
        source=str(name) if not Path(located(name)).is_dir() else Path(name).name,  # no path of this machine
        package=__version__,
    )


def _write_tokenizer(processor: CMMaskSDProcessor, folder: Path) -> None:
    """Write `tokenizer.json` without the truncation and padding of its last use."""
    from tokenizers import Tokenizer

    tokenizer: Any = processor.tokenizer
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.save(str(folder / TOKENIZER_FILE))
