"""`cmmasksd completion`: tab completion for a shell."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.errors import UserError

HELP = "print a script for tab completion in a shell"
DESCRIPTION = "Print a script for tab completion of commands and options in a shell."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="shell to print the script for")


def run(settings: Namespace, commands: ArgumentParser) -> None:
    """Print the script for the parser of all commands, which imports this file."""
    from importlib.util import find_spec

    if find_spec("shtab") is None:
        raise UserError("tab completion needs the package shtab: pip install 'cmmasksd[completion]'")
    print(commands.get_completion_script(f"shtab-{settings.shell}"))
