"""The parser of all commands, and `main`: parse, run, exit code.

Exit codes: 0 for success, 2 for a mistake of the user or an error of the operating system (one line on standard error
names the problem and its remedy), 130 after an interrupt, 141 when standard output is closed, 143 after SIGTERM. Bugs
keep their traceback. Heavy imports are inside the commands, so that `--help` is fast.
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
    convert,
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
    "convert": convert,
    "examples": examples,
    "push": push,
    "report": report,
    "completion": completion,
}
"""Command -> its module: HELP (one line), DESCRIPTION, add_options(parser) and run(settings)."""
UNLISTED = {"pretrain": pretrain}
"""Commands that only maintainers need; `cmmasksd --help` and the completions leave them out."""


def build_parser(*, unlisted: bool = False) -> ArgumentParser:
    """The parser of all commands.

    Args:
        unlisted: include the commands of UNLISTED.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the notes in config.py
    # every value is first read as YAML, which a file name that is not UTF-8 cannot be
    set_loader("yaml", get_loader("yaml"), (yaml.YAMLError, UnicodeEncodeError))
    parser = ArgumentParser(
        prog="cmmasksd",
        description="Referring image segmentation: type a sentence, get the mask of the object it names.",
        version=__version__,
        exit_on_error=False,  # main prints one line
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
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal may not be able to print every file name
        sys.stdout.reconfigure(errors="backslashreplace")
    command = (COMMANDS | UNLISTED).get(arguments[0]) if arguments else None
    name = "cmmasksd" if command is None else f"cmmasksd {arguments[0]}"
    try:
        parser = build_parser(unlisted=command in UNLISTED.values())
        settings = parser.instantiate(parser.parse_args(arguments))
        if settings.command == "completion":
            completion.run(settings.completion, parser)
        else:
            (COMMANDS | UNLISTED)[settings.command].run(settings[settings.command])
    except ArgumentError as error:
        return fail(f"{name}: {usage_mistake(error)} (see {name} --help)", 2)
    except UserError as error:
        return fail(f"{name}: {error}", 2)
    except KeyboardInterrupt:
        return fail(f"{name}: interrupted", 130)
    except SystemExit as exit_:
        if exit_.code != 143:  # argparse exits after --help
            raise
        return fail(f"{name}: terminated", 143)
    except BrokenPipeError:  # as by `| head`; without this, Python prints another error when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        if (line := refusal(error)) is None:
            raise
        return fail(f"{name}: {line}", 2)
    return 0
