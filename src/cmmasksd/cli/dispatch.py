"""The parser of all commands, and `main`: parse, run, exit code.

Exit codes: 0 when the command did its work, 2 for a user's mistake or a disk that refuses (one line on standard error
says what is wrong and how to mend it), 130 when interrupted, 141 when the reader of its output went away, 143 when
training got SIGTERM. Programming errors keep their traceback. Heavy imports live inside the commands, so that `--help`
answers at once.
"""

import io
import os
import sys
from argparse import ArgumentError

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from cmmasksd import __version__
from cmmasksd.cli import (
    compare,
    completion,
    data,
    demo,
    evaluate,
    examples,
    explain,
    export,
    predict,
    pretrain,
    push,
    report,
    serve,
    train,
)
from cmmasksd.cli.messages import fail, refusal, usage_mistake
from cmmasksd.errors import UserError

COMMANDS = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "predict": predict,
    "export": export,
    "serve": serve,
    "explain": explain,
    "data": data,
    "examples": examples,
    "push": push,
    "report": report,
    "completion": completion,
}
"""Command -> its module: HELP (one line), DESCRIPTION, add_options(parser) and run(settings)."""
UNLISTED = {"pretrain": pretrain}
"""Commands that only maintainers need; `cmmasksd --help` and the completions leave them out."""


def build_parser(*, unlisted: bool = False) -> ArgumentParser:
    """The parser of all commands, with those of UNLISTED if asked for."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the notes in config.py
    # a file's name that is not UTF-8 is no YAML either, as which every value is tried first
    set_loader("yaml", get_loader("yaml"), (yaml.YAMLError, UnicodeEncodeError))
    parser = ArgumentParser(
        prog="cmmasksd",
        description="Type a sentence, get the mask of the object it names.",
        version=__version__,
        exit_on_error=False,  # main says it in one line
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command in (COMMANDS | UNLISTED if unlisted else COMMANDS).items():
        subparser = ArgumentParser(description=command.DESCRIPTION)
        commands.add_subcommand(name, subparser, help=command.HELP)
        command.add_options(subparser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need not be text that the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    command = (COMMANDS | UNLISTED).get(arguments[0]) if arguments else None
    name = "cmmasksd" if command is None else f"cmmasksd {arguments[0]}"
    try:
        parser = build_parser(unlisted=command in UNLISTED.values())
        settings = parser.instantiate(parser.parse_args(arguments))
        (COMMANDS | UNLISTED)[settings.command].run(settings[settings.command])
    except ArgumentError as error:
        return fail(f"{name}: {usage_mistake(error)} (see {name} --help)", 2)
    except UserError as error:
        return fail(f"{name}: {error}", 2)
    except KeyboardInterrupt:
        return fail(f"{name}: interrupted", 130)
    except SystemExit as left:
        if left.code != 143:  # argparse leaves so after --help
            raise
        return fail(f"{name}: terminated", 143)
    except BrokenPipeError:  # as `| head` does; without this, Python complains once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        if (line := refusal(error)) is None:
            raise
        return fail(f"{name}: {line}", 2)
    return 0
