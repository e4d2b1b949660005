"""Plain values from a pickle that a stranger wrote: lists, dicts, tuples, text, bytes and numbers, nothing else.

A pickle is a program for a small stack machine. Python's own machine calls whatever function the program names, hashes
whatever it uses as a key (for nested tuples that share their parts: practically for ever), and can build ninety times
the size of the file. This one follows the instructions that plain values need, those of protocols 0 to 5 and of Python
2, and no others. It bounds the number of values. It calls no function but the three below, which read NumPy's numbers.

Python's machine is five times as fast. It gets the pickles that hold no instruction by which it can be abused.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import pickle
import re
import struct
import sys
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from cmmasksd.errors import UserError, shown

MAX_INSTRUCTIONS = 40_000_000
"""Pickles with more are refused; RefCOCO has 4 million."""

MAX_CONTAINERS = 4_000_000
"""Pickles with more lists, dicts and tuples are refused; RefCOCO has 400,000. Each takes some 80 bytes."""

_TOO_LARGE = "it holds more values than any refs file needs"

# Instructions that say in so many bytes (little-endian) how many bytes follow
_TEXT = {0x8C: 1, ord("X"): 4, 0x8D: 8}
_PYTHON_2_TEXT = {ord("U"): 1, ord("T"): 4}
_BYTES = {ord("C"): 1, ord("B"): 4, 0x8E: 8}
_LONG = {0x8A: 1, 0x8B: 4}
_COUNTED = _TEXT | _PYTHON_2_TEXT | _BYTES | _LONG
_NUMBERS = {ord(code): struct.Struct(layout) for code, layout in (("K", "B"), ("M", "<H"), ("J", "<i"), ("G", ">d"))}
_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}


def load_plain_pickle(data: bytes) -> object:
    """The value in a pickle. Python 2's text, which holds bytes, is read as UTF-8, else as Latin-1.

    Raises:
        UserError: the pickle is damaged, too large, or holds anything but plain values.
    """
    if _is_simple(data):
        with contextlib.suppress(Exception):  # damaged (which raises nearly anything), or Latin-1: see below
            return _NoNames(io.BytesIO(data), encoding="utf-8").load()
    try:
        return _run(data)
    except UserError:
        raise
    except (LookupError, ValueError, struct.error):  # past the end, below the stack, a number without digits, …
        raise UserError("it is cut short or damaged") from None


# -------------------------------------------------------------------------------------------------- Python's machine

# The instructions that make lists, dicts, text and numbers, by the size of their argument: no tuples and no integers
# beyond 60 bits (their hashes can be made slow), no functions. Two are narrower than pickle's own: r and p give the
# index of a memo entry, up to which Python allocates, and have 24 bits or 7 digits here.
_SIMPLE = re.compile(
    rb"""(?:
        [(.012Nldaesu\]}\x88\x89\x94]   # no argument: marks, containers, None, True, False, STOP
        | [Kqh]. | \x80[\x00-\x05] | M.. | [Jj].... | r...\x00 | [G\x95].{8}
        | [FSVg][^\n]*\n | [IL]-?[0-9]{1,18}L?\n | p[0-9]{1,7}\n
    )*+""",
    re.VERBOSE | re.DOTALL,
)
_NOT_CONTAINERS = bytes(set(range(256)) - set(b"(]}"))


class _NoNames(pickle.Unpickler):
    """The second lock, should `_is_simple` ever read an instruction in another way than Python does."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise UserError(f"it asks for {shown(f'{module_name}.{global_name}')}")


def _is_simple(data: bytes) -> bool:
    """Whether Python's machine follows a pickle safely, within bounded time and memory."""
    at = containers = 0
    while at < len(data):
        match = _SIMPLE.match(data, at)
        assert match is not None  # it also matches nothing
        containers += len(match[0].translate(None, _NOT_CONTAINERS))  # or more, where text holds such letters
        at = match.end()
        if at < len(data):
            if data[at] not in _COUNTED or data[at] in _LONG or containers > MAX_CONTAINERS:
                return False
            start = at + 1 + _COUNTED[data[at]]
            at = start + int.from_bytes(data[at + 1 : start], "little")
    return containers <= MAX_CONTAINERS


# ------------------------------------------------------------------------------------------------------- our machine


def _run(data: bytes) -> object:
    stack: list = []
    marks: list[int] = []
    memo: dict[int, object] = {}
    at = containers = 0
    for _ in range(MAX_INSTRUCTIONS):
        code = data[at]
        at += 1
        if code in _COUNTED:
            start = at + _COUNTED[code]
            at = start + int.from_bytes(data[at:start], "little")
            content = data[start:at]
            if code in _TEXT:
                stack.append(content.decode("utf-8", "surrogatepass"))
            elif code in _PYTHON_2_TEXT:
                stack.append(_python_2_text(content))
            else:
                stack.append(content if code in _BYTES else int.from_bytes(content, "little", signed=True))
        elif code == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif code == ord("q"):
            memo[data[at]] = stack[-1]
            at += 1
        elif code == ord("r"):
            memo[int.from_bytes(data[at : at + 4], "little")] = stack[-1]
            at += 4
        elif code == ord("h"):
            stack.append(memo[data[at]])
            at += 1
        elif code == ord("j"):
            stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
            at += 4
        elif code in _NUMBERS:
            stack.append(_NUMBERS[code].unpack_from(data, at)[0])
            at += _NUMBERS[code].size
        elif code in b"(])}\x85\x86\x87ldt":  # what makes containers; a mark precedes most of them
            containers += 1
            if containers > MAX_CONTAINERS:
                raise UserError(_TOO_LARGE)
            if code == ord("("):
                marks.append(len(stack))
            elif code == ord("]"):
                stack.append([])
            elif code == ord("}"):
                stack.append({})
            elif code == ord(")"):
                stack.append(())
            else:
                items = _pop(stack, marks.pop() if code in b"ldt" else len(stack) - (code - 0x84))
                if code == ord("d"):
                    stack.append({})
                    _set_items(stack, items)
                else:
                    stack.append(items if code == ord("l") else tuple(items))
        elif code == ord("u"):
            _set_items(stack, _pop(stack, marks.pop()))
        elif code == ord("s"):
            _set_items(stack, _pop(stack, len(stack) - 2))
        elif code == ord("e"):
            _append(stack, _pop(stack, marks.pop()))
        elif code == ord("a"):
            _append(stack, _pop(stack, len(stack) - 1))
        elif code in b"gpISFLVci":  # followed by a line
            end = data.index(b"\n", at)
            line = data[at:end]
            at = end + 1
            if code == ord("p"):
                memo[int(line)] = stack[-1]
            elif code == ord("g"):
                stack.append(memo[int(line)])
            elif code in b"ci":
                end = data.index(b"\n", at)
                stack.append(_function(line.decode(), data[at:end].decode()))
                at = end + 1
            else:
                stack.append(_line_value(code, line))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == ord("."):
            return stack.pop()
        elif code == 0x80:  # PROTO
            at += 1
        elif code == 0x95:  # FRAME
            at += 8
        elif code == ord("0"):
            stack.pop()
        elif code == ord("1"):
            _pop(stack, marks.pop())
        elif code == ord("2"):
            stack.append(stack[-1])
        elif code == 0x93:  # STACK_GLOBAL
            module, name = _pop(stack, len(stack) - 2)
            stack.append(_function(module, name))
        elif code == ord("R"):
            function, arguments = _pop(stack, len(stack) - 2)
            if function not in _FUNCTIONS.values() or not isinstance(arguments, tuple):
                raise UserError(f"it calls {shown(function)}")
            stack.append(function(*arguments))
            containers += 1 + sys.getsizeof(stack[-1]) // 64
        elif code == ord("b") and isinstance(stack[-2], np.dtype):  # sets the byte order and what follows from it
            state = stack.pop()
            if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|"):
                raise UserError(f"its numbers have the layout {shown(state)}, expected little-endian")
        else:
            raise UserError(f"unexpected instruction {data[at - 1 : at]!r} at byte {at - 1}")
    raise UserError(_TOO_LARGE)


def _pop(stack: list, start: int) -> list:
    """Take the values from `start` on off the stack."""
    if not 0 <= start <= len(stack):
        raise IndexError
    items = stack[start:]
    del stack[start:]
    return items


def _append(stack: list, items: list) -> None:
    if type(stack[-1]) is not list:
        raise UserError(f"it appends to {shown(stack[-1])}, which is no list")
    stack[-1] += items


def _set_items(stack: list, items: list) -> None:
    keys = items[::2]
    if type(stack[-1]) is not dict or len(items) % 2 or any(type(key) is not str for key in keys):
        raise UserError(f"it sets the keys {shown(keys)} of {shown(stack[-1])}: expected text as keys, of a dict")
    stack[-1].update(zip(keys, items[1::2], strict=True))


def _line_value(code: int, line: bytes) -> object:
    """The value of an instruction of protocol 0."""
    if code == ord("S"):
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise ValueError
        return _python_2_text(codecs.escape_decode(line[1:-1])[0])
    if code == ord("V"):
        return line.decode("raw-unicode-escape")
    if code == ord("F"):
        return float(line)
    if code == ord("I") and line in (b"00", b"01"):
        return line == b"01"
    return int(line.removesuffix(b"L"))


def _python_2_text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


# ------------------------------------------------------------------------------------------------------ NumPy's numbers


def _dtype(code: object = None, *_: object) -> np.dtype:
    """numpy.dtype, of whole numbers, floats, booleans and text."""
    if not isinstance(code, str) or not re.fullmatch("[iu][1248]|f[248]|b1|U[1-9][0-9]{0,4}", code):
        raise UserError(f"it holds NumPy values of the type {shown(code)}, which no refs file needs")
    return np.dtype(f"<{code}")


def _scalar(dtype: object = None, content: object = None, *_: object) -> object:
    """numpy.core.multiarray.scalar; the value is Python's int, float, bool or str."""
    if not isinstance(dtype, np.dtype):
        raise ValueError
    if isinstance(content, str):  # from Python 2; only Latin-1 has as many characters as bytes
        content = content.encode("latin-1" if len(content) == dtype.itemsize else "utf-8")
    if not isinstance(content, bytes) or len(content) != dtype.itemsize:
        raise ValueError
    if dtype.kind == "U":
        return content.decode("utf-32-le", "surrogatepass").rstrip("\0")
    return np.frombuffer(content, dtype)[0].item()


def _encode(text: object = None, encoding: object = None, *_: object) -> bytes:
    """_codecs.encode, by which protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError
    return text.encode("latin-1")


_FUNCTIONS: dict[tuple[object, object], Callable[..., object]] = {
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
}


def _function(module: object, name: object) -> Callable[..., object]:
    """What is meant by the name of a function."""
    if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in _FUNCTIONS:
        asked = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else name
        raise UserError(f"it asks for {shown(asked)}, which could run any code and no refs file needs")
    return _FUNCTIONS[module, name]
