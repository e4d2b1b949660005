"""The application on uvicorn: the listening socket, and limits on connections that uvicorn lacks."""

from __future__ import annotations

import logging
import socket
import time
from asyncio import AbstractEventLoop, TimerHandle
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from cmmasksd.errors import UserError
from cmmasksd.serving import middleware
from cmmasksd.serving.middleware import HEADERS
from cmmasksd.serving.refusals import Refusal, refusal_response
from cmmasksd.serving.settings import ServeSettings
from cmmasksd.serving.shares import address_of, half

HEAD_SECONDS = 10
"""Time in which a client must send the head of a request."""


class _Connection(H11Protocol):
    """An HTTP connection with limits; uvicorn waits for request heads without end, on any number of connections.

    Idle connections, silent ones included, have the same limit as requests: beyond it, the one that has been idle for
    longest is closed. So the health of the server can always be asked.
    """

    _timer: TimerHandle | None = None
    loop: AbstractEventLoop
    cycle: Any
    connections: set[Any]

    def __init__(self, limit: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._limit, self._idle_since = limit, time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether no request is under way, or only the rest of an answered one."""
        return self.cycle is None or self.cycle.response_started

    def _make_room(self) -> None:
        address = address_of({"client": self.client})
        connections = [other for other in self.connections if not other.transport.is_closing()]
        same_address = [other for other in connections if address_of({"client": other.client}) == address]
        for group, limit in ((same_address, half(self._limit)), (connections, self._limit)):
            idle = [other for other in group if other.idle]
            if len(idle) > limit:
                min(idle, key=lambda other: other._idle_since).transport.close()
            elif len(group) > 2 * limit:
                self.transport.abort()

    def on_response_complete(self) -> None:
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Send the refusal in the shape of all others."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else a response has begun
            response = refusal_response(Refusal(400, "bad_http", "not a valid HTTP request", **HEADERS))
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
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
    """Limits a repeated warning to one line per minute, which counts the suppressed ones."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        now = time.monotonic()
        last, suppressed = self._last.get(record.msg, (now - 60, 0))
        if now - last < 60:
            self._last[record.msg] = last, suppressed + 1
            return False
        self._last[record.msg] = now, 0
        if suppressed:
            record.msg = f"{record.msg} ({suppressed} more since the last line)"
        return True


_once_a_minute = _OnceAMinute()


def make_server(app: FastAPI, settings: ServeSettings) -> tuple[uvicorn.Server, socket.socket]:
    """A server, and the listening socket to `run` it on.

    Raises:
        UserError: the address is not available.
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
        http=partial(_Connection, settings.connections),  # pyright: ignore (uvicorn only calls it)
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(settings.timeout) + 5,
        h11_max_incomplete_event_size=16_384,
    )
    for logger in (middleware.log, logging.getLogger("uvicorn.error")):
        logger.addFilter(_once_a_minute)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; inherited by accepted sockets
        # closes connections of clients that do not read their response
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
    return uvicorn.Server(config), listening
