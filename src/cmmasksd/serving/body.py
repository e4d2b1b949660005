"""Reads the body of a request, not FastAPI: reading must stop at a limit of bytes and of seconds."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.types import Message

from cmmasksd.serving.engine import Job
from cmmasksd.serving.refusals import Refusal
from cmmasksd.serving.settings import ServeSettings


async def read_job(
    request: Request, settings: ServeSettings, model: type[BaseModel], hold: Callable[[int], None]
) -> Job:
    """Read and validate a request.

    Args:
        request: the request, its body unread.
        settings: the limits.
        model: see `request_model`.
        hold: called with the number of bytes of each chunk.

    Raises:
        Refusal: the body exceeds a limit, cannot be read, or has invalid fields.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in ("application/json", "multipart/form-data"):
        raise Refusal(415, "unsupported_media_type", "send multipart/form-data or application/json, and say which")
    bounded = _bounded(request, settings.max_bytes, hold)
    try:
        async with asyncio.timeout(settings.body_timeout):
            json = content_type == "application/json"
            fields = await bounded.json() if json else await _read_form(bounded, settings)
    except TimeoutError:
        raise Refusal(408, "too_slow", f"the request did not arrive in {settings.body_timeout:g} s") from None
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Refusal(400, "unreadable", f"the body is not valid {content_type}") from None
    image = fields.get("image") if isinstance(fields, dict) else None
    is_file = isinstance(image, bytes)
    try:  # the values of a form are strings
        valid: Any = model.model_validate(fields | {"image": ""} if is_file else fields, strict=not is_file)
    except ValidationError as error:
        raise Refusal(422, "invalid", _first_problem(error)) from None
    if not is_file:
        try:
            image = base64.b64decode(valid.image, validate=True)
        except (binascii.Error, ValueError):
            raise Refusal(400, "bad_base64", "image is not base64: encode the bytes of the file") from None
    return Job(image, valid.sentences, valid.threshold, valid.min_score, frozenset(valid.want))


def _bounded(request: Request, max_bytes: int, hold: Callable[[int], None]) -> Request:
    """The request, which refuses to be read beyond `max_bytes`; `hold` is called with the size of each chunk."""
    too_long = Refusal(413, "too_many_bytes", f"the request is longer than {max_bytes} bytes")
    if int(request.headers.get("content-length") or 0) > max_bytes:
        raise too_long
    total = 0

    async def receive() -> Message:
        nonlocal total
        message = await request.receive()
        size = len(message.get("body", b""))
        total += size
        if total > max_bytes:
            raise too_long
        hold(size)
        return message

    # without "app", starlette raises MultiPartException rather than an HTTPException of its own
    return Request({"type": "http", "headers": request.scope["headers"]}, receive)


async def _read_form(request: Request, settings: ServeSettings) -> dict[str, Any]:
    max_fields = settings.max_sentences + 16
    try:
        async with request.form(max_files=1, max_fields=max_fields, max_part_size=settings.max_bytes) as form:
            fields: dict[str, Any] = {}
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) != (name == "image"):
                    problem = "must be a file" if name == "image" else "must not be a file"
                    raise Refusal(422, "invalid", f"{name[:40]}: {problem}")
                if name in ("sentences", "want"):
                    fields.setdefault(name, []).append(value)
                elif name in fields:
                    raise Refusal(422, "invalid", f"{name[:40]}: given more than once")
                else:
                    fields[name] = await value.read() if isinstance(value, UploadFile) else value
            return fields
    except (MultiPartException, ValueError) as error:  # ValueError: older versions of starlette
        reason = getattr(error, "message", "it is malformed")
        raise Refusal(400, "bad_form", f"the form cannot be read: {reason}") from None


def _first_problem(error: ValidationError) -> str:
    """The first invalid field and why, in one line, without repeating what was sent."""
    first = error.errors(include_input=False, include_context=False, include_url=False)[0]
    field = ".".join(str(part)[:40] for part in first["loc"]) or "the body"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field}: {first['msg']}{more}"
