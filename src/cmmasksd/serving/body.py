"""Reading a request's body, by hand and not by FastAPI: it must stop at a limit of bytes and of seconds."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from cmmasksd.serving.engine import Job
from cmmasksd.serving.refusals import Refusal
from cmmasksd.serving.settings import ServeSettings


async def _bounded(
    request: Request, settings: ServeSettings, hold: Callable[[int], None]
) -> AsyncGenerator[bytes, None]:
    """The body's pieces, until it is too long; each is announced to `hold` first."""
    too_long = Refusal(413, "too_many_bytes", f"the request is longer than {settings.max_bytes} bytes: send less")
    if int(request.headers.get("content-length") or 0) > settings.max_bytes:
        raise too_long
    read = 0
    async for piece in request.stream():
        read += len(piece)
        if read > settings.max_bytes:
            raise too_long
        hold(len(piece))
        yield piece


async def read_job(
    request: Request, settings: ServeSettings, model: type[BaseModel], hold: Callable[[int], None]
) -> Job:
    """The request as a job; see `_bounded`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(settings.body_timeout):
            pieces = _bounded(request, settings, hold)
            if kind == "application/json":
                body = bytearray()
                async for piece in pieces:
                    body += piece
                given = json.loads(body)
            elif kind == "multipart/form-data":
                given = await _read_form(request, settings, pieces)
            else:
                raise Refusal(
                    415, "unsupported_media_type", "send multipart/form-data or application/json, and say which"
                )
    except TimeoutError:
        raise Refusal(408, "too_slow", f"the request did not arrive in {settings.body_timeout:g} s") from None
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Refusal(400, "unreadable", "the body cannot be read as what it says it is: check it") from None
    image = given.pop("image", None) if isinstance(given, dict) else None
    file = isinstance(image, bytes)
    if isinstance(given, dict) and image is not None:
        given["image"] = "" if file else image
    try:
        fields: Any = model.model_validate(given, strict=not file)  # a form knows nothing but strings
    except ValidationError as error:
        raise Refusal(422, "invalid", _in_words(error)) from None
    if not file:
        try:
            image = base64.b64decode(fields.image, validate=True)
        except (binascii.Error, ValueError):
            raise Refusal(400, "bad_base64", "image is not base64: encode the file's bytes") from None
    return Job(image, fields.sentences, fields.threshold, frozenset(fields.want))


async def _read_form(request: Request, settings: ServeSettings, pieces: AsyncGenerator[bytes, None]) -> dict[str, Any]:
    parser = MultiPartParser(
        request.headers,
        pieces,
        max_files=1,
        max_fields=settings.max_sentences + 16,
        max_part_size=settings.max_bytes,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no boundary is given
        reason = getattr(error, "message", "it has no boundary")
        raise Refusal(400, "bad_form", f"the form cannot be read: {reason}") from None
    try:
        given: dict[str, Any] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) != (name == "image"):
                raise Refusal(422, "invalid", f"{name[:40]}: {'is no file' if name != 'image' else 'must be a file'}")
            if name in ("sentences", "want"):
                given.setdefault(name, []).append(value)
            elif name in given:
                raise Refusal(422, "invalid", f"{name[:40]} is given twice: give it once")
            else:
                given[name] = await value.read() if isinstance(value, UploadFile) else value
        return given
    finally:
        await form.close()


def _in_words(error: ValidationError) -> str:
    """The first thing that is wrong, in one line, without repeating what was sent."""
    first = error.errors(include_input=False, include_context=False, include_url=False)[0]
    where = ".".join(str(part)[:40] for part in first["loc"]) or "the body"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}"
