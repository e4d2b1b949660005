"""`cmmasksd completion`: tab completion for a shell."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.errors import UserError

HELP = "tab completion for a shell"
DESCRIPTION = "Print a script that makes a shell complete cmmasksd's commands and options."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="for which shell")


def run(settings: Namespace) -> None:
    from importlib.util import find_spec

    if find_spec("shtab") is None:
        raise UserError("completions are written by the package shtab: pip install 'cmmasksd[completion]'")
    from cmmasksd.cli.dispatch import build_parser

    print(build_parser().get_completion_script(f"shtab-{settings.shell}"))
