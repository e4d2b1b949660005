"""Middleware: access checks, a limit of concurrent requests, and security headers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import re
from contextlib import suppress

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmmasksd.serving.refusals import Refusal, refusal_response
from cmmasksd.serving.settings import ServeSettings
from cmmasksd.serving.shares import Shares, address_of

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
DRAIN_BYTES, DRAIN_SECONDS = 50_000_000, 10
"""Limits on reading the rest of a refused request. Closing the connection earlier resets it and loses the refusal."""
HEALTH = "/v1/health"
PORT = re.compile(rb":\d+$")
log = logging.getLogger(__name__)


class Gate:
    """Checks host name, origin and key of every request, and limits the number of concurrent requests.

    The host must be one of the server's (DNS rebinding: a web page may point its own name to this machine), the request
    must not come from a page of another site, and it must have the key: as X-API-Key, as a bearer token, or as the
    password of HTTP Basic, which browsers ask for. /v1/health needs no key and is not counted.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, key: str | None) -> None:
        self.app, self.requests, self.host_names = app, Shares(settings.connections), settings.host_names
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope["method"], scope["path"], dict(scope["headers"]))
        except Refusal as error:
            await refusal_response(error)(scope, receive, send)
            return
        if scope["path"] == HEALTH:
            await self.app(scope, receive, send)
            return
        address = address_of(scope)
        if not self.requests.take(address, 1):
            log.warning("refused a request: too many at once")
            refusal = Refusal(503, "too_many", "too many requests at once: try again", **{"Retry-After": "1"})
            await refusal_response(refusal)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self.requests.release(address, 1)

    def _check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").lower()  # optional in HTTP/1.0, which browsers do not speak
        name = host.decode("latin-1").rpartition(":")[0] if PORT.search(host) else host.decode("latin-1")
        if self.host_names is not None and name and name not in self.host_names and not _is_ip(name):
            raise Refusal(403, "unknown_host", "unknown host name: start the server with --allowed_hosts NAME")
        if method not in ("GET", "HEAD", "OPTIONS"):
            site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")  # browsers send these
            same = site in (b"same-origin", b"none") if site else not origin or origin.partition(b"://")[2] == host
            if not same:
                raise Refusal(403, "cross_site", "a page of another site may not send requests to this server")
        if self.key is None or path in (HEALTH, "/openapi.json"):
            return
        if not any(hmac.compare_digest(candidate, self.key) for candidate in _keys(headers)):
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
    """Values of the headers that may hold the key."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    keys = [headers.get(b"x-api-key", b"")]
    if scheme.lower() == b"bearer":
        keys.append(token.strip())
    if scheme.lower() == b"basic":
        with suppress(binascii.Error):
            keys.append(base64.b64decode(token).partition(b":")[2])
    return keys


class Headers:
    """Adds the security headers to every response.

    If a request is answered before its body ends, the rest of the body is read within limits, so that the client gets
    the response, and the connection is closed. uvicorn alone would read without end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_headers = dict(scope.get("headers", ()))
        unread = b"transfer-encoding" in request_headers or request_headers.get(b"content-length", b"0") != b"0"
        coming = b"expect" not in request_headers  # else the client waits until the body is read

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
    """Read the rest of a request and drop it, within limits of bytes and seconds."""
    left = DRAIN_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):  # complete, or the client has left
                    return
