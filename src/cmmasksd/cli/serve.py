"""`cmmasksd serve`: a model as a web page and an HTTP API."""

import contextlib
import os
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import DEVICE, MODEL, field_values
from cmmasksd.errors import UserError
from cmmasksd.serving.settings import KEY_VARIABLE, ServeSettings, checked_key

HELP = "serve a model as a web page and an HTTP API"
DESCRIPTION = "Serve a model as a web page and an HTTP API. If CMMASKSD_API_KEY is set, both ask for that key."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="photos", help=MODEL)
    parser.add_argument("--device", type=str | None, help=DEVICE)
    parser.add_class_arguments(ServeSettings, skip={"allowed_hosts"})
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        type=str,
        default=[],
        help="host names that clients may use, beside IP addresses and localhost (default: --host, or any name if "
        "that is the address of a network)",
    )


def run(settings: Namespace) -> None:
    from ipaddress import ip_address

    limits = ServeSettings(**field_values(ServeSettings, settings))
    key = checked_key(os.environ.get(KEY_VARIABLE))
    try:
        from cmmasksd.serving.app import create_app
        from cmmasksd.serving.server import make_server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'cmmasksd[serve]'") from None
    from cmmasksd.inference.predictor import Segmenter

    segmenter = Segmenter.from_pretrained(settings.model, device=settings.device)
    folder = Path(settings.model)
    name = folder.name if folder.is_dir() else settings.model  # no path of this machine for clients
    server, listening = make_server(create_app(segmenter, name, limits, key), limits)
    host, port = listening.getsockname()[:2]
    if key is None and not ip_address(host).is_loopback:
        print(f"warning: anyone who reaches {host}:{port} can use the model: set {KEY_VARIABLE}", file=sys.stderr)
    page = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    print(f"{settings.model} is served at {page} (Ctrl+C stops it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down cleanly by then
        server.run(sockets=[listening])
