"""The one exception that means "the user's input is wrong"; the command line prints it as one line and exits with 2."""

import math
import reprlib
from itertools import islice


class UserError(ValueError):
    """A mistake in what the user gave (a path, a name, a file's content), said in one line with its remedy.

    The message names the offending value (see ``shown``), what was expected, and how to mend it. It never wraps over
    lines and holds no control characters, so that it survives logs and does nothing to a terminal. Programming errors
    raise other exceptions and keep their traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_printable(" ".join(message.split())))


def shown(value: object, limit: int = 60) -> str:
    """A value from a file or a user as it appears in an error: at most `limit` characters, on one line, escaped."""
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
    """repr() in little time and memory for any plain value: huge, deep, or made of parts that it shares."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, limit, limit

    def repr_str(self, x: str | bytes, level: int) -> str:
        return repr(x[: self.maxstring])

    repr_bytes = repr_str

    def repr_int(self, x: int, level: int) -> str:  # Python refuses to write out a huge one
        return repr(x) if x.bit_length() <= 256 else f"<a number of {x.bit_length()} bits>"

    def repr_dict(self, x: dict, level: int) -> str:  # reprlib's own sorts all of the keys
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


def reason(error: BaseException, limit: int = 200) -> str:
    """What another library's exception says, as a part of our line: at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
