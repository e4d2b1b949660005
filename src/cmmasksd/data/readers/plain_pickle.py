"""Plain values from an untrusted pickle: lists, dicts, tuples, text, bytes and numbers, nothing else.

A pickle is a program for a small stack machine. ``pickle.load`` calls any function that the program names, hashes
anything that it uses as a key (practically for ever, for nested tuples that share their parts), and can build ninety
times the size of the file.

``_PlainUnpickler`` is Python's unpickler written in Python, reduced to the instructions of plain values. It counts
them, accepts only text as keys, and calls no function but the three below, which read NumPy's numbers. The unpickler
in C is three times as fast but cannot be restricted like that: it reads the pickles without any instruction that can be
abused, such as RefCOCO's.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from cmmasksd.errors import UserError, shown

MAX_INSTRUCTIONS = 40_000_000
"""Limit of instructions; RefCOCO has 4 million."""

MAX_CONTAINERS = 4_000_000
"""Limit of lists, dicts and tuples, some 80 bytes each; RefCOCO has 400,000."""


def load_plain_pickle(data: bytes) -> object:
    """The value in a pickle. Text of Python 2, which is bytes, is decoded as UTF-8, else as Latin-1.

    Raises:
        UserError: the pickle is damaged, too large, or has a value that is not plain.
    """
    if _is_simple(data):
        with contextlib.suppress(Exception):  # damaged (which raises nearly anything), or Latin-1: see below
            return _NoNames(io.BytesIO(data), encoding="utf-8").load()
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except UserError:
        raise
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, struct.error):
        raise UserError("it is cut short or damaged") from None


# ------------------------------------------------------------------------------------------------ the unpickler in C

# Instructions of text and bytes: number of bytes (little-endian) of the length that follows
_COUNTED = {0x8C: 1, ord("X"): 4, 0x8D: 8, ord("U"): 1, ord("T"): 4, ord("C"): 1, ord("B"): 4, 0x8E: 8}

# Instructions of lists, dicts, text and numbers, by the size of their argument: no tuples and no integers beyond 60
# bits (their hashes can be made slow), no functions. Two are narrower than pickle's own: the index of a memo entry, up
# to which Python allocates, has 24 bits (r) or 7 digits (p) here.
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
    """A second lock, in case `_is_simple` ever reads an instruction differently from Python."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise UserError(f"it asks for {shown(f'{module_name}.{global_name}')}")


def _is_simple(data: bytes) -> bool:
    """Whether the unpickler in C reads a pickle safely, in bounded time and memory."""
    at = containers = 0
    while at < len(data):
        match = _SIMPLE.match(data, at)
        assert match is not None  # it also matches the empty string
        containers += len(match[0].translate(None, _NOT_CONTAINERS))  # an upper bound: text has such letters too
        at = match.end()
        if at < len(data):
            if data[at] not in _COUNTED or containers > MAX_CONTAINERS:
                return False
            start = at + 1 + _COUNTED[data[at]]
            at = start + int.from_bytes(data[at + 1 : start], "little")
    return containers <= MAX_CONTAINERS


# ------------------------------------------------------------------------------------------- the unpickler in Python


_UNPICKLER: Any = pickle._Unpickler  # typeshed lacks its attributes

_PLAIN = frozenset(b"(.012NIJKLMFGSTUVXBC)]}ldtaesugpqrhjcRb\x80\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x94\x95")
_CONTAINERS = frozenset(b"(])}\x85\x86\x87ldt")  # instructions that make containers; a mark precedes most of them


class _PlainUnpickler(_UNPICKLER):
    """Python's unpickler with only the instructions in `_PLAIN`, which it counts."""

    instructions = containers = 0

    def count(self, containers: int) -> None:
        self.instructions += 1
        self.containers += containers
        if self.instructions > MAX_INSTRUCTIONS or self.containers > MAX_CONTAINERS:
            raise UserError("it holds more values than any refs file needs")

    def find_class(self, module: str, name: str, /) -> Callable[..., object]:
        if (module, name) not in _FUNCTIONS:
            raise UserError(f"it asks for {shown(f'{module}.{name}')}, which could run any code and no refs file needs")
        return _FUNCTIONS[module, name]

    def _decode_string(self, value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.decode("latin-1")

    def check_keys(self, keys: list) -> None:
        if any(type(key) is not str for key in keys):  # the hash of anything else can be made slow
            raise UserError(f"it has the keys {shown(keys)}: expected text as keys")

    def load_setitem(self) -> None:
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.check_keys(self.stack[::2])  # since the mark
        super().load_setitems()

    def load_dict(self) -> None:
        self.check_keys(self.stack[::2])
        super().load_dict()

    def load_put(self) -> None:
        index = int(self.readline()[:-1])
        if not 0 <= index < 2**32:  # as in the other instructions; the hash of larger ones can be made slow
            raise ValueError
        self.memo[index] = self.stack[-1]

    def load_reduce(self) -> None:
        super().load_reduce()
        self.count(1 + sys.getsizeof(self.stack[-1]) // 64)

    def load_build(self) -> None:
        """NumPy's way to set the byte order of a type."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], np.dtype):
            raise UserError(f"unexpected instruction {pickle.BUILD!r}")
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|"):
            raise UserError(f"its numbers have the layout {shown(state)}, expected little-endian")


def _instruction(code: int) -> Callable[[_PlainUnpickler], None]:
    """The method of `_PlainUnpickler` that executes an opcode."""
    method = getattr(_PlainUnpickler, _UNPICKLER.dispatch[code].__name__) if code in _PLAIN else None

    def execute(self: _PlainUnpickler) -> None:
        self.count(code in _CONTAINERS)
        if method is None:
            raise UserError(f"unexpected instruction {bytes([code])!r}")
        method(self)

    return execute


_PlainUnpickler.dispatch = {code: _instruction(code) for code in range(256)}


# ------------------------------------------------------------------------------------------------------ NumPy's numbers


def _dtype(code: object = None, *_: object) -> np.dtype:
    """numpy.dtype of whole numbers, floats, booleans and text."""
    if not isinstance(code, str) or not re.fullmatch("[iu][1248]|f[248]|b1|U[1-9][0-9]{0,4}", code):
        raise UserError(f"it holds NumPy values of the type {shown(code)}, which no refs file needs")
    return np.dtype(f"<{code}")


def _scalar(dtype: object = None, content: object = None, *_: object) -> object:
    """numpy.core.multiarray.scalar; the value is Python's int, float, bool or str."""
    if not isinstance(dtype, np.dtype):
        raise ValueError
    if isinstance(content, str):  # of Python 2; only decoded Latin-1 has as many characters as bytes
        content = content.encode("latin-1" if len(content) == dtype.itemsize else "utf-8")
    if not isinstance(content, bytes) or len(content) != dtype.itemsize:
        raise ValueError
    if dtype.kind == "U":
        return content.decode("utf-32-le", "surrogatepass").rstrip("\0")
    return np.frombuffer(content, dtype)[0].item()


def _encode(text: object = None, encoding: object = None, *_: object) -> bytes:
    """_codecs.encode, which protocols 0 to 2 use for bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError
    return text.encode("latin-1")


_FUNCTIONS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
}
