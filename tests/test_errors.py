"""Messages: one printable line, whatever the values in them."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cmmasksd.errors import UserError, require_between, shown


def shared(depth: int) -> list:
    """A list whose repr() would have 2**depth parts."""
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def itself() -> list:
    value: list = [1]
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        shared(100),
        deep(300_000),
        itself(),
        {"a": shared(100), "b": {"c": deep(300_000)}},
        ("x" * 10**7, ["y" * 10**7] * 50),
        {str(key): key for key in range(100_000)},
        b"\x00" * 10**7,
        1 << 10**7,
        "\x1b[2J\n\r\x07\u2028\u202e\ud800" * 100,
        Path("a\nb\udcff" * 100),
        np.zeros((1000, 1000)),
    ],
    ids=["shared", "deep", "itself", "dict", "long", "many", "bytes", "huge", "control", "path", "array"],
)
def test_a_shown_value_is_short_and_printable(value: object):
    tracemalloc.start()
    for limit in (20, 60, 200):
        text = shown(value, limit)
        assert 2 <= len(text) <= limit
        assert text.isprintable()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    "value", ["it's é 日本", "", 5, -(2**70), 1.5, float("nan"), None, True, [1, "a"], {"a": [()]}, b"\0"]
)
def test_a_short_value_is_shown_as_it_is_written(value: object):
    assert shown(value) == repr(value)


def test_what_was_cut_is_marked():
    assert shown("abc" * 100) == "'" + ("abc" * 100)[:56] + "..."
    assert shown(list(range(100))) == "[0, 1, 2, 3, 4, 5, ...]"


def test_a_message_is_one_printable_line():
    error = UserError("image a\n\x1b[31m\udcff.png\r\n is \t not é")
    assert str(error) == "image a \\x1b[31m\\udcff.png is not é"


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"least": 1}, "x must be at least 1, got 0"),
        (2, {"least": 0, "most": 1}, "x must be between 0 and 1, got 2"),
        (0.0, {"least": 0, "exclusive": True}, "x must be above 0, got 0.0"),
        (1.0, {"least": 0, "most": 1, "exclusive": True}, r"x must be between 0 and 1 \(exclusive\), got 1.0"),
        (float("inf"), {"least": 0}, "x must be at least 0, got inf"),
        (float("nan"), {"least": 0, "most": 1}, "x must be between 0 and 1, got nan"),
        (10**400, {"least": 0, "most": 9}, "x must be between 0 and 9, got <a number of 1329 bits>"),
    ],
)
def test_a_number_out_of_bounds_is_refused(value: float, bounds: dict, message: str):
    with pytest.raises(UserError, match=f"^{message}$"):
        require_between("x", value, **bounds)


def test_bounds_are_allowed_values():
    require_between("x", 0, 0, 1)
    require_between("x", 1.0, 0, 1)
    require_between("x", 10**400, 0)
