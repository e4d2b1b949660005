"""The tensors of a TorchScript archive, such as those of OpenAI's CLIPs, without running any of its code.

`torch.jit.load` compiles and runs the code in the archive, and `torch.load(weights_only=True)` refuses such files. The
tensors are described by a pickle, data.pkl, and stored as raw bytes. `_values` interprets only the instructions that
TorchScript writes and calls nothing: modules become `_Module`, and the two functions that make tensors are our own.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmmasksd.errors import UserError, reason, shown

MAX_PICKLE = 4 << 20
"""Limit of data.pkl in bytes; those of OpenAI's CLIPs have some 0.2 MB."""
MAX_VALUES = 100_000
"""Limit of attributes of all modules; a module that is used twice counts twice."""
MAX_DIMENSIONS = 8

_STORAGES = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
}


class _Global(NamedTuple):
    name: str


class _Module:
    state: Any = None


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive by name, and any other tensor that is an attribute.

    Raises:
        UserError: the archive is damaged, or holds what TorchScript does not write.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1 or archive.getinfo(pickles[0]).file_size > MAX_PICKLE:
                raise ValueError(f"expected one data.pkl of at most {MAX_PICKLE} bytes")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and _content(archive, f"{root}byteorder") != b"little":
                raise ValueError("its numbers are not little-endian")
            tensors = _by_name(_values(_content(archive, pickles[0])))
            return _read(archive, f"{root}data/", tensors, file.stat().st_size)
    except Exception as error:  # what zipfile and torch raise for a damaged file has no common class
        raise UserError(
            f"cannot read the TorchScript archive {file} ({reason(error)}): get it again, or in safetensors format"
        ) from None


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{shown(name)} is compressed")
    return archive.read(name)


def _read(archive: zipfile.ZipFile, folder: str, tensors: dict[str, _Tensor], limit: int) -> dict[str, Tensor]:
    """The tensors themselves. Each storage is read once, and all of them have at most `limit` bytes."""
    storages: dict[_Storage, Tensor] = {}
    weights = {}
    for name, (storage, offset, size, stride) in tensors.items():
        if storage not in storages:
            limit -= archive.getinfo(folder + storage.key).file_size
            if limit < 0:
                raise ValueError("its storages overlap")
            storages[storage] = torch.frombuffer(
                bytearray(_content(archive, folder + storage.key)), dtype=storage.dtype
            )
        if max((len(size), len(stride))) > MAX_DIMENSIONS:
            raise ValueError(f"{shown(name)} has {len(size)} dimensions")
        if math.prod(size) > len(storages[storage]):  # a tensor that repeats its numbers
            raise ValueError(f"{shown(name)} is larger than its storage")
        weights[name] = storages[storage].as_strided(size, stride, offset)  # torch refuses to leave the storage
    return weights


def _by_name(root: object) -> dict[str, _Tensor]:
    """The tensors among the attributes of nested modules."""
    tensors: dict[str, _Tensor] = {}
    waiting, seen = [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        if not isinstance(module, _Module) or not isinstance(module.state, dict):
            raise ValueError("it holds no module")
        seen += len(module.state)
        if seen > MAX_VALUES or len(prefix) > 1000:
            raise ValueError("it holds more modules than any CLIP has")
        for key, value in module.state.items():
            if isinstance(value, _Tensor):
                tensors[prefix + key] = value
            elif isinstance(value, _Module):
                waiting.append((f"{prefix}{key}.", value))
    return tensors


def _values(data: bytes) -> object:
    """The value in data.pkl. Every instruction takes constant time, or time in proportion to what it takes away."""
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    for code, argument, _ in pickletools.genops(data):
        match code.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marked.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]  # type: ignore[index]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])  # type: ignore[index]
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(code.name == "NEWTRUE")
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_Global(str(argument)))
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(code.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack, items = marked.pop(), stack
                stack.append(tuple(items))
            case "APPEND":
                value = stack.pop()
                _of(list, stack[-1]).append(value)
            case "APPENDS":
                stack, items = marked.pop(), stack
                _of(list, stack[-1]).extend(items)
            case "SETITEM":
                key, value = stack.pop(-2), stack.pop()
                _of(dict, stack[-1])[_of(str, key)] = value
            case "SETITEMS":
                stack, items = marked.pop(), stack
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _of(dict, stack[-1])[_of(str, key)] = value
            case "NEWOBJ":
                stack.pop()
                if not _of(_Global, stack.pop()).name.startswith("__torch__"):
                    raise ValueError("it asks for objects that are not modules")
                stack.append(_Module())
            case "BUILD":
                state = stack.pop()
                _of(_Module, stack[-1]).state = state
            case "BINPERSID":
                kind, dtype, key, *_ = _of(tuple, stack.pop())
                if kind != "storage" or _of(_Global, dtype).name not in _STORAGES:
                    raise ValueError(f"it holds {shown(dtype)}")
                stack.append(_Storage(_STORAGES[dtype.name], _of(str, key)))
            case "REDUCE":
                arguments = _of(tuple, stack.pop())
                stack.append(_called(_of(_Global, stack.pop()).name, arguments))
            case _:
                raise ValueError(f"unexpected instruction {code.name}")
    raise ValueError("data.pkl is cut short")


def _called(function: str, arguments: tuple[Any, ...]) -> object:
    """What stands for the result of a function that TorchScript names in data.pkl."""
    if function == "torch._utils _rebuild_tensor_v2":
        storage, offset, size, stride, *_ = arguments
        return _Tensor(_of(_Storage, storage), _of(int, offset), _of(tuple, size), _of(tuple, stride))
    if function == "collections OrderedDict":
        return {}
    if function.startswith("torch.jit._pickle "):  # typed lists and dicts, which hold no weights
        return arguments[0]
    raise ValueError(f"it asks for {shown(function.replace(' ', '.'))}, which could run any code")


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it holds a {type(value).__name__}, expected a {kind.__name__}")
    return value
