"""Errors as one line for the user."""

import re
import sys
from argparse import ArgumentError

from cmmasksd.errors import UserError, shown


def fail(line: str, code: int) -> int:
    """Print one line below any progress bar, and return the exit code."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
    print(line, file=sys.stderr)
    return code


def usage_mistake(error: ArgumentError) -> str:
    """The parser's message as one line without class names, with options as they are typed."""
    line = " ".join(str(error).split()).removesuffix(".")
    line = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", line)
    line = re.sub(r"<class '([\w.]+)'>", r"\1", line)
    optional = r" - Expected a NoneType Given value type: .*? Given value: "
    line = re.sub(rf"Does not validate .*? Errors: - (.*?)(?:\. Got value: .*?)?{optional}", r"\1. Got value: ", line)
    line = re.sub(r'Parser key "([\w.]+)"', r"--\1", line)
    if group := re.match(r"(--\w+): Unable to load config", line):  # such as `--data photos`
        keys = {"--data": ["name"], "--model": ["backbone", "weights"]}.get(group[1], ["KEY"])
        named = " or ".join(f"{group[1]}.{key}" for key in keys)
        line = f"{group[1]} stands for a group of settings: name one of them, {named}"
    if line.startswith("the following arguments are required: "):
        line = re.sub(r"(?:\w+\.)+(\w+)", r"--\1", line)
    if "training.accumulate" in line:  # a setting of earlier versions
        line += "; it follows from training.batch, the references per update over all processes"
    line = str(UserError(line))  # without control characters
    return line if len(line) < 700 else f"{line[:400]} … {line[-200:]}"


def refusal(error: Exception) -> str | None:
    """One line for an error of the operating system; None for any other, which is a bug."""
    if isinstance(error, OSError):
        reason = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[-1]
        where = "" if error.filename is None else str(error.filename)
        where = f"{where if len(where) < 300 else shown(where, 100)}: " if where else ""
    elif "inline_container" in str(error) or "(os error " in str(error):  # write errors of torch and safetensors
        reason, where = " ".join(str(error).split()), "a file could not be written: "
    else:
        return None
    return str(UserError(f"{where}{reason}; check the path, its permissions and the free space"))
