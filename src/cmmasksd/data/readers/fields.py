"""JSON and typed fields of files that others wrote; a UserError names what is wrong."""

from __future__ import annotations

import json
from typing import Any

from cmmasksd.errors import UserError, shown


def parse_json(content: str | bytes, what: str, remedy: str) -> Any:
    """The value in JSON.

    Args:
        content: the JSON.
        what: its name in the message.
        remedy: what to do when it is damaged.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON ({error}): {remedy}") from None


def whole_number(record: dict[str, Any], key: str, where: str) -> int:
    """An int of at most 63 bits."""
    value = record.get(key)
    if type(value) is not int or value.bit_length() > 63:
        raise UserError(f"{where} has {key!r} {shown_field(value)}: expected a whole number of at most 63 bits")
    return value


def text(record: dict[str, Any], key: str, where: str) -> str:
    """A str."""
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where} has {key!r} {shown_field(value)}: expected text")
    return value


def shown_field(value: object) -> str:
    """A field's value as it appears in an error."""
    return "missing" if value is None else shown(value)
