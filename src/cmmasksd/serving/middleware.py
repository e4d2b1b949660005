"""What every request passes before its route: who may ask, how many at once, and the security headers."""

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
"""What is still read of a request that has its refusal: a connection closed before is reset, and the answer lost."""
HEALTH = "/v1/health"
PORT = re.compile(rb":\d+$")
log = logging.getLogger(__name__)


class Gate:
    """What every request passes first.

    It must name a host that the server answers to (else any web page could reach a server of this machine by a name of
    its own that leads here), must not be sent by another site's page, and must bring the key: as X-API-Key, as a bearer
    token, or as the password of HTTP Basic, which browsers ask for. Then it takes one of the `connections` places.
    /v1/health needs neither key nor place.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, key: str | None) -> None:
        self.app, self.requests, self.hosts = app, Shares(settings.connections), settings.answers_to
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope["method"], scope["path"], dict(scope["headers"]))
        except Refusal as error:
            await refusal_response(error.status, error.code, error.message, error.headers)(scope, receive, send)
            return
        if scope["path"] == HEALTH:
            await self.app(scope, receive, send)
            return
        address = address_of(scope)
        if not self.requests.take(address, 1):
            log.warning("refused a request: too many at once")
            refused = refusal_response(503, "too_many", "too many requests at once: try again", {"Retry-After": "1"})
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


class Headers:
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
