"""The HTTP API and the page, as one FastAPI application; `run` puts it behind uvicorn.

    POST /v1/segment    an image and sentences -> masks, scores, boxes (multipart/form-data or application/json)
    GET  /v1/health     is it ready, which model, which limits
    GET  /metrics       for Prometheus
    GET  /openapi.json  all of this for machines
    GET  /page/         the web page

Unusual here: the body is read by hand, not by FastAPI, because it must stop at a limit of bytes and of seconds. Every
refusal has one shape, `{"error": {"code", "message"}}`. Neither images nor sentences are logged or kept.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import re
import socket
import time
from asyncio import AbstractEventLoop, TimerHandle
from collections import Counter as Tally
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import h11
import uvicorn
from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from cmmasksd import __version__
from cmmasksd.data.images import ImageTooLarge
from cmmasksd.data.samples import is_blank
from cmmasksd.errors import UserError
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.serving.engine import Busy, Engine, Job, Stopped
from cmmasksd.serving.settings import ServeSettings, checked_key

PAGE = Path(__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HEAD_SECONDS = 10
"""In which a client must have sent the head of a request."""
DRAIN_BYTES, DRAIN_SECONDS = 50_000_000, 10
"""What is still read of a request that has its refusal: a connection closed before is reset, and the answer lost."""
HEALTH = "/v1/health"
NOT_BLANK = (
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
"""What OpenAPI says of `is_blank`: a character that is neither white space nor invisible."""
PORT = re.compile(rb":\d+$")
log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# What goes in and out


class RLE(BaseModel):
    """A mask as COCO's compressed run lengths; pycocotools reads it."""

    size: Annotated[list[int], Field(min_length=2, max_length=2, description="[height, width] in pixels")]
    counts: str


class Map(BaseModel):
    """Values over the whole image, 0 to 255, row by row."""

    width: int
    height: int
    data: Annotated[str, Field(description="base64 of width * height bytes")]


class Word(BaseModel):
    """A word of the sentence and where it correlates with the image."""

    text: str
    start: Annotated[int, Field(description="index of its first character in the sentence")]
    end: Annotated[int, Field(description="index behind its last character")]
    map: Map | None


class Found(BaseModel):
    """What one sentence names."""

    text: str
    score: Annotated[float, Field(ge=0, le=1, description="mean probability over the mask; 0 where it is empty")]
    area: Annotated[int, Field(ge=0, description="pixels of the mask")]
    box: Annotated[
        list[int] | None,
        Field(
            min_length=4,
            max_length=4,
            description="[x0, y0, x1, y1] in pixels: the mask lies in columns x0 to x1 - 1 and rows y0 to y1 - 1;"
            " null where it is empty",
        ),
    ]
    truncated: Annotated[bool, Field(description="the sentence was too long for the model and lost its last words")]
    rle: RLE | None = None
    png: Annotated[str | None, Field(description="base64 of a PNG of the image's size, white on black")] = None
    probability: Annotated[Map | None, Field(description="at most 512 pixels on the longer side")] = None
    words: list[Word] | None = None


class Answer(BaseModel):
    """Of /v1/segment: one result per sentence, in order. What was not wanted is left out."""

    width: int
    height: int
    threshold: float
    results: list[Found]


class Health(BaseModel):
    """Of /v1/health."""

    status: Literal["ok"]
    model: str
    version: str
    waiting: Annotated[int, Field(description="requests in the queue")]
    limits: dict[str, float]


class Problem(BaseModel):
    """What is wrong, for programs and for people."""

    code: str
    message: str


class Refused(BaseModel):
    """The body of every refusal."""

    error: Problem


class Refusal(Exception):
    """A refusal on its way out."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


REFUSALS = {
    400: "the body is broken: no JSON, no form, no base64, or it ended too early",
    401: "the key is missing or wrong",
    403: "the server does not answer to this host name, or a page of another site sent the request",
    408: "the request was sent too slowly",
    413: "too many bytes, or an image of too many pixels",
    415: "neither JSON nor a form, or a file that is no image",
    422: "a field is missing or outside its limits",
    429: "too many requests wait; see Retry-After",
    500: "a mistake in the server",
    503: "the server is shutting down or has too many connections",
    504: "the request was not done in time and was dropped",
}


def _documented(*codes: int) -> dict[int | str, dict[str, Any]]:
    shown: dict[int | str, dict[str, Any]] = {code: {"model": Refused, "description": REFUSALS[code]} for code in codes}
    if 429 in shown:
        shown[429]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return shown


def _with_words(sentence: str) -> str:
    if is_blank(sentence):
        raise PydanticCustomError("blank", "the sentence is blank: give at least one word")
    return sentence


def _input(settings: ServeSettings) -> type[BaseModel]:
    """The request's fields with the limits of this server."""
    sentence = Annotated[
        str,
        StringConstraints(min_length=1, max_length=settings.max_characters, strict=True),
        AfterValidator(_with_words),
        Field(json_schema_extra={"pattern": NOT_BLANK}),
    ]

    class SegmentRequest(BaseModel):
        model_config = ConfigDict(extra="forbid")
        image: Annotated[
            str,
            Field(
                description="base64 of a JPEG, PNG, WebP, BMP, GIF or TIFF file",
                json_schema_extra={"format": "byte", "contentEncoding": "base64"},
            ),
        ]
        sentences: Annotated[list[sentence], Field(min_length=1, max_length=settings.max_sentences)]  # pyright: ignore (made from the settings)
        threshold: Annotated[float, Field(gt=0, lt=1, description="a pixel above this probability is in the mask")] = (
            0.5
        )
        want: Annotated[
            list[Literal["rle", "png", "probability", "words"]],
            Field(max_length=4, description="what the results hold beside text, score, area and box"),
        ] = ["rle"]

    return SegmentRequest


def _request_body(model: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's description of both kinds of body; FastAPI does not read them, so it cannot write it."""
    schema = model.model_json_schema()
    form = json.loads(json.dumps(schema))
    form["properties"]["image"] = {
        "type": "string",
        "format": "binary",
        "contentMediaType": "application/octet-stream",
        "description": "a JPEG, PNG, WebP, BMP, GIF or TIFF file",
    }
    return {
        "required": True,
        "content": {"multipart/form-data": {"schema": form}, "application/json": {"schema": schema}},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading a request


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


async def _read(request: Request, settings: ServeSettings, model: type[BaseModel], hold: Callable[[int], None]) -> Job:
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


# ---------------------------------------------------------------------------------------------------------------------
# The application


def create_app(
    segmenter: Segmenter, name: str, settings: ServeSettings | None = None, key: str | None = None
) -> FastAPI:
    """The application.

    Args:
        segmenter: the model; used by one thread of the application alone from now on.
        name: of the model, to show.
        settings: limits.
        key: which clients must send, see `_Gate`; None lets everybody in.

    Raises:
        UserError: for a key that no client can send.
    """
    settings, key = settings or ServeSettings(), checked_key(key)
    registry = CollectorRegistry()
    answered = Counter("cmmasksd_requests", "Requests to /v1/segment by status", ["status"], registry=registry)
    taken = Histogram("cmmasksd_request_seconds", "From the request's head to its answer", registry=registry)
    together = Histogram(
        "cmmasksd_batch_requests", "Requests computed together", buckets=[1, 2, 4, 8, 16, 32], registry=registry
    )
    computing = Histogram("cmmasksd_batch_seconds", "Time of a batch", registry=registry)
    sentences = Counter("cmmasksd_sentences", "Sentences computed", registry=registry)

    def observe(requests: int, said: int, seconds: float) -> None:
        together.observe(requests)
        sentences.inc(said)
        computing.observe(seconds)

    engine = Engine(segmenter, settings, observe)
    Gauge("cmmasksd_waiting", "Requests in the queue", registry=registry).set_function(lambda: engine.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="CM-MaskSD",
        version=__version__,
        description="Type a sentence, get the mask of the object it names.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.engine = engine
    model = _input(settings)

    bodies = _Shares(settings.max_held)
    app.add_middleware(_Gate, settings=settings, key=key)
    app.add_middleware(_Headers)

    @app.exception_handler(Refusal)
    async def refusal(_: Request, error: Refusal) -> JSONResponse:
        return _refused(error.status, error.code, error.message, error.headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        return _refused(error.status_code, code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def mistake(_: Request, error: Exception) -> JSONResponse:
        return _refused(500, "internal", "the server made a mistake; it is in its log", HEADERS)

    async def segment(request: Request) -> JSONResponse:
        address, held = _address(request.scope), 0

        def hold(size: int) -> None:
            nonlocal held
            if not bodies.take(address, size):
                raise Busy
            held += size

        try:
            engine.check()
            job = await _read(request, settings, model, hold)
            return JSONResponse(await _answer(request, engine.submit(job), settings.timeout))
        except Busy:
            raise Refusal(429, "busy", "too many requests wait: try again", **{"Retry-After": "1"}) from None
        except Stopped:
            raise Refusal(503, "stopping", "the server is shutting down", **{"Retry-After": "10"}) from None
        except ImageTooLarge as error:
            raise Refusal(413, "too_many_pixels", str(error)) from None
        except UserError as error:
            raise Refusal(415, "no_image", str(error)) from None
        except ClientDisconnect:
            raise Refusal(400, "truncated", "the request ended too early") from None
        finally:
            bodies.give_back(address, held)

    # for OpenAPI only: _Gate reads the key
    schemes = (APIKeyHeader(name="X-API-Key", auto_error=False), HTTPBearer(auto_error=False))
    keys, asked = ([Security(one) for one in schemes], [401]) if key else ([], [])

    @app.post(
        "/v1/segment",
        response_model=Answer,
        dependencies=keys,
        responses=_documented(*asked, 400, 403, 408, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={"requestBody": _request_body(model)},
        summary="Find what sentences name in an image",
    )
    async def counted(request: Request) -> Any:
        started, status = time.monotonic(), 500
        try:
            answer = await segment(request)
            status = answer.status_code
            return answer
        except Refusal as error:
            status = error.status
            raise
        finally:
            answered.labels(str(status)).inc()
            taken.observe(time.monotonic() - started)

    @app.get(HEALTH, response_model=Health, responses=_documented(403, 503), summary="Is it ready, and what may I ask")
    async def health() -> Any:
        try:
            engine.check()
        except Busy:
            pass
        except Stopped:
            raise Refusal(503, "stopping", "the server is shutting down") from None
        limits = {
            limit: getattr(settings, limit)
            for limit in ("max_bytes", "max_pixels", "max_sentences", "max_characters", "timeout")
        }
        return {"status": "ok", "model": name, "version": __version__, "waiting": engine.waiting, "limits": limits}

    @app.get(
        "/metrics",
        response_class=Response,
        dependencies=keys,
        responses={200: {"content": {"text/plain": {}}}, **_documented(*asked, 403, 503)},
        summary="Metrics",
    )
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("page/")

    app.mount("/page", StaticFiles(directory=PAGE, html=True))
    return app


async def _answer(request: Request, future: Future[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Wait for the engine; a cancelled future is work that it drops."""
    waiting = asyncio.wrap_future(future)
    # the body has been read, so what comes is the end of the connection
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({waiting, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if gone.done():
            raise ClientDisconnect
        raise Refusal(504, "too_late", f"not done in {seconds:g} s, so it was dropped")
    except (UserError, Stopped, ClientDisconnect, Refusal):
        raise
    except Exception:  # the engine's log says where; its message may hold a sentence
        raise Refusal(500, "internal", "the server made a mistake; it is in its log") from None
    finally:
        waiting.cancel()
        gone.cancel()


def _address(scope: Scope) -> str:
    """Where a request comes from: an IPv4 address, or the 64 bits of an IPv6 address that one client may vary."""
    host = (scope.get("client") or ("",))[0]
    return str(ipaddress.ip_network((host, 64), strict=False)) if ":" in host else host


class _Shares:
    """What each address holds of something at the moment. None may hold more than half of the total."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, Tally[str]()

    def take(self, address: str, amount: int) -> bool:
        """Hold more, if there is room."""
        if self.held.total() + amount > self.total or self.held[address] + amount > _half(self.total):
            return False
        self.held[address] += amount
        return True

    def give_back(self, address: str, amount: int) -> None:
        """Hold less."""
        self.held[address] -= amount
        if not self.held[address]:
            del self.held[address]


def _half(total: int) -> int:
    return (total + 1) // 2


class _Gate:
    """What every request passes first.

    It must name a host that the server answers to (else any web page could reach a server of this machine by a name of
    its own that leads here), must not be sent by another site's page, and must bring the key: as X-API-Key, as a bearer
    token, or as the password of HTTP Basic, which browsers ask for. Then it takes one of the `connections` places.
    /v1/health needs neither key nor place.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, key: str | None) -> None:
        self.app, self.requests, self.hosts = app, _Shares(settings.connections), settings.answers_to
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope["method"], scope["path"], dict(scope["headers"]))
        except Refusal as error:
            await _refused(error.status, error.code, error.message, error.headers)(scope, receive, send)
            return
        if scope["path"] == HEALTH:
            await self.app(scope, receive, send)
            return
        address = _address(scope)
        if not self.requests.take(address, 1):
            log.warning("refused a request: too many at once")
            refused = _refused(503, "too_many", "too many requests at once: try again", {"Retry-After": "1"})
            await refused(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self.requests.give_back(address, 1)

    def _check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").lower()  # HTTP/1.0 knows none, and browsers do not speak it
        name = host.decode("latin-1").rpartition(":")[0] if PORT.search(host) else host.decode("latin-1")
        if self.hosts is not None and name and name not in self.hosts and not _is_ip(name):
            raise Refusal(403, "unknown_host", "not a host name of this server: start it with --allowed_hosts NAME")
        if method not in ("GET", "HEAD", "OPTIONS"):
            site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")  # browsers send these
            ours = site in (b"same-origin", b"none") if site else not origin or origin.partition(b"://")[2] == host
            if not ours:
                raise Refusal(403, "cross_site", "a page of another site may not send requests to this server")
        if self.key is None or path in (HEALTH, "/openapi.json"):
            return
        if not any(hmac.compare_digest(given, self.key) for given in _keys(headers)):
            raise Refusal(
                401,
                "no_key",
                "send the key of this server: as X-API-Key, as a bearer token, or as a password",
                **{"WWW-Authenticate": 'Basic realm="CM-MaskSD: the key is the password", charset="UTF-8"'},
            )


def _is_ip(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False


def _keys(headers: dict[bytes, bytes]) -> list[bytes]:
    """What a request brings as the key."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    found = [headers.get(b"x-api-key", b"")]
    if scheme.lower() == b"bearer":
        found.append(token.strip())
    if scheme.lower() == b"basic":
        with suppress(binascii.Error):
            found.append(base64.b64decode(token).partition(b":")[2])
    return found


class _Headers:
    """Puts the security headers on every answer. Where a body was refused before its end, it reads on for a while, so
    that the client hears why, and ends the connection: uvicorn would read on for ever."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", ()))
        unread = b"transfer-encoding" in given or given.get(b"content-length", b"0") != b"0"
        coming = b"expect" not in given  # else the client sends the body only when it is read

        async def watched() -> Message:
            nonlocal unread, coming
            coming = True
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if unread:
                    headers["Connection"] = "close"
                headers.setdefault("Cache-Control", "no-cache" if scope["path"].startswith("/page") else "no-store")
            elif unread and coming and not message.get("more_body"):
                await send({**message, "more_body": True})
                await _drain(receive)
                message = {"type": message["type"]}
            await send(message)

        await self.app(scope, watched, with_headers)


async def _drain(receive: Receive) -> None:
    """Read what still comes of a request and drop it, within limits of bytes and seconds."""
    left = DRAIN_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):  # all has come, or the client is gone
                    return


def _refused(status: int, code: str, message: str, headers: dict[str, str]) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


# ---------------------------------------------------------------------------------------------------------------------
# The server


class _Connection(H11Protocol):
    """uvicorn waits for ever for the head of a request, on any number of connections; this one hangs up.

    Connections with no request under way (silent ones, too) are bounded as requests are: of too many, the one that has
    been so for longest is closed. So a new one always has the time to ask for the server's health.
    """

    _timer: TimerHandle | None = None
    loop: AbstractEventLoop
    cycle: Any
    connections: set[Any]

    def __init__(self, most: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._most, self._since = most, time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether no request is under way, or only the rest of one that has been answered."""
        return self.cycle is None or self.cycle.response_started

    def _make_room(self) -> None:
        address = _address({"client": self.client})
        everyone = [one for one in self.connections if not one.transport.is_closing()]
        own = [one for one in everyone if _address({"client": one.client}) == address]
        for crowd, most in ((own, _half(self._most)), (everyone, self._most)):
            idle = [one for one in crowd if one.idle]
            if len(idle) > most:
                min(idle, key=lambda one: one._since).transport.close()
            elif len(crowd) > 2 * most:
                self.transport.abort()

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """In the shape of all refusals."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun
            answer = _refused(400, "bad_http", "this is no HTTP request: check what was sent", HEADERS)
            headers = [*answer.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._make_room()
        self._timer = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self.conn.their_state is h11.IDLE and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()


class _OnceAMinute(logging.Filter):
    """Of a warning that repeats, one line a minute with the number of those that were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        now = time.monotonic()
        last, left_out = self._said.get(record.msg, (now - 60, 0))
        if now - last < 60:
            self._said[record.msg] = last, left_out + 1
            return False
        self._said[record.msg] = now, 0
        if left_out:
            record.msg = f"{record.msg} ({left_out} times more since the last line)"
        return True


_once_a_minute = _OnceAMinute()


def make_server(app: FastAPI, settings: ServeSettings) -> tuple[uvicorn.Server, socket.socket]:
    """A server and the socket it is to `run` on; the socket already listens.

    Raises:
        UserError: when the address is not to be had.
    """
    try:
        listening = socket.create_server(
            (settings.host, settings.port), family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        )
    except OSError as error:
        raise UserError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}): choose another --port"
        ) from None
    config = uvicorn.Config(
        app,
        http=partial(_Connection, settings.connections),  # pyright: ignore (called like a class)
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(settings.timeout) + 5,
        h11_max_incomplete_event_size=16_384,
    )
    for one in (log, logging.getLogger("uvicorn.error")):
        one.addFilter(_once_a_minute)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted sockets inherit it
        # ends connections of clients that do not read their answer
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
    return uvicorn.Server(config), listening
