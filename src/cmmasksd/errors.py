"""UserError, which the command line prints as one line before it exits with 2, and helpers for its messages."""

import math
import reprlib
from itertools import islice


class UserError(ValueError):
    """Wrong input of the user: a path, a name, the content of a file.

    The message names the offending value (see ``shown``), what was expected, and the remedy. It is one line without
    control characters, safe for logs and terminals. Bugs raise other exceptions and keep their traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_printable(" ".join(message.split())))


def shown(value: object, limit: int = 60) -> str:
    """A value from a file or a user for a message: at most `limit` characters on one line, escaped."""
    text = _printable(_Short(limit).repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def require_between(name: str, value: float, least: float, most: float = math.inf, *, exclusive: bool = False) -> None:
    """Refuse a number outside its bounds.

    Args:
        name: name of the setting or option.
        value: its value; infinity and NaN are refused.
        least, most: the bounds, which are allowed values unless `exclusive`.

    Raises:
        UserError: the value is refused.
    """
    if (least < value < most if exclusive else least <= value <= most) and value != math.inf:
        return
    if most == math.inf:
        bounds = f"{'above' if exclusive else 'at least'} {least}"
    else:
        bounds = f"between {least} and {most}{' (exclusive)' if exclusive else ''}"
    raise UserError(f"{name} must be {bounds}, got {shown(value)}")


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


class _Short(reprlib.Repr):
    """repr() in bounded time and memory, for values that are huge, deep or share parts."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, limit, limit

    def repr_str(self, x: str | bytes, level: int) -> str:
        return repr(x[: self.maxstring])

    repr_bytes = repr_str

    def repr_int(self, x: int, level: int) -> str:  # Python refuses to print huge ones
        return repr(x) if x.bit_length() <= 256 else f"<a number of {x.bit_length()} bits>"

    def repr_dict(self, x: dict, level: int) -> str:  # reprlib sorts all keys
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


def reason(error: BaseException, limit: int = 200) -> str:
    """The message of another library's exception, as part of ours: at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
