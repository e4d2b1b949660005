"""`export.json`: the settings beside the graphs of an export, written by the export and read by `OnnxSegmenter`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from cmmasksd.errors import UserError, shown
from cmmasksd.model.locating import read_json
from cmmasksd.model.placement import MAX_SIDE, canvas_of, mean_and_std, whole

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
        start_token, end_token, pad_token: ids of these tokens; `start_token` is null if sentences have none.
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
    start_token: int | None
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
        bounds_of = {k: b for k, b in _BOUNDS.items() if not (k == "start_token" and content[k] is None)}
        try:
            content |= {key: whole(key, content[key], *bounds) for key, bounds in bounds_of.items()}
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
