"""`cmmasksd export`: a model for onnxruntime, torch.export or the browser."""

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import MODEL
from cmmasksd.errors import UserError

HELP = "export a model for onnxruntime, torch.export or the browser"
DESCRIPTION = "Export a model as graphs that run without this package: two encoders and a decoder."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="photos", help=MODEL)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; replaces an export in it")
    parser.add_argument(
        "--format",
        type=Literal["onnx", "pt2", "web"],
        default="onnx",
        help="format: onnx, for onnxruntime and `predict --model FOLDER`; pt2, programs of torch.export; web, a static "
        "page that runs the model in the browser",
    )
    parser.add_argument("--int8", action="store_true", help="8-bit weights (onnx and web only)")
    parser.add_argument(
        "--ort", type=Path | None, help="folder node_modules/onnxruntime-web/dist of `npm install` (web only)"
    )


def run(settings: Namespace) -> None:
    if settings.ort is not None and settings.format != "web":
        raise UserError("--ort goes with --format web: leave it out")

    def say(line: str) -> None:
        print(f"{line} …", file=sys.stderr)

    if settings.format == "web":
        from cmmasksd.export.site import write_site

        exported = write_site(settings.model, settings.out, ort=settings.ort, int8=settings.int8, progress=say)
        size = sum(file.stat().st_size for file in settings.out.rglob("*") if file.is_file())
        hint = f"try it: python -m http.server --directory {settings.out}"
    else:
        from cmmasksd.export.export import export

        exported = export(settings.model, settings.out, format=settings.format, int8=settings.int8, progress=say)
        size = sum(file.stat().st_size for file in settings.out.iterdir())
        command = f"cmmasksd predict --model {settings.out} …"
        hint = f"try it: {command}" if settings.format == "onnx" else "torch.export.load"
    parity = ", ".join(f"{name} {value:.2g}" for name, value in exported.parity.items())
    print(f"{settings.out}: {size / 1e6:.1f} MB; compared with torch: {parity}; {hint}")
