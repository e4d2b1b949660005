"""uvicorn around the application: the listening socket, and limits on connections that uvicorn does not have."""

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
from cmmasksd.serving.refusals import refusal_response
from cmmasksd.serving.settings import ServeSettings
from cmmasksd.serving.shares import address_of, half

HEAD_SECONDS = 10
"""In which a client must have sent the head of a request."""


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
        address = address_of({"client": self.client})
        everyone = [one for one in self.connections if not one.transport.is_closing()]
        own = [one for one in everyone if address_of({"client": one.client}) == address]
        for crowd, most in ((own, half(self._most)), (everyone, self._most)):
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
            answer = refusal_response(400, "bad_http", "this is no HTTP request: check what was sent", HEADERS)
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
    for one in (middleware.log, logging.getLogger("uvicorn.error")):
        one.addFilter(_once_a_minute)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted sockets inherit it
        # ends connections of clients that do not read their answer
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
    return uvicorn.Server(config), listening
