"""What a server is told: where it listens and what it refuses. Light: the command line reads it for `--help`."""

from __future__ import annotations

from dataclasses import dataclass

from cmmasksd.errors import UserError

KEY_VARIABLE = "CMMASKSD_API_KEY"
"""Environment variable of the key; an option would show it to everybody who lists processes."""


@dataclass(frozen=True)
class ServeSettings:
    """Where to listen, and the limits that keep one client from hurting the others.

    Attributes:
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: to listen on; 0 takes a free one.
        max_bytes: of a request; reading stops there.
        max_held: bytes of all requests that are held at once; further ones are told to come again (429).
        max_pixels: of an image, judged before it is decoded.
        max_sentences: of a request.
        max_characters: of a sentence.
        max_batch: requests that are computed together.
        max_wait: seconds to wait for others to fill a batch.
        queue: requests that may wait; the next one is told to come again (429).
        timeout: seconds that a request may wait and be computed, then it is dropped (504).
        body_timeout: seconds in which a client must have sent its request (408).
        connections: requests under way at once, and idle connections, at most. One address gets half of these, and of
            `max_held`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_bytes: int = 10_000_000
    max_held: int = 200_000_000
    max_pixels: int = 24_000_000
    max_sentences: int = 32
    max_characters: int = 300
    max_batch: int = 8
    max_wait: float = 0.005
    queue: int = 32
    timeout: float = 30.0
    body_timeout: float = 20.0
    connections: int = 100

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_sentences", "max_characters", "max_batch", "queue", "connections"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        if self.max_held < 2 * self.max_bytes:
            raise UserError(f"--max_held is {self.max_held}: give at least twice --max_bytes, {2 * self.max_bytes}")
        for name in ("timeout", "body_timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} is {getattr(self, name)}: give seconds above 0")
        if not 0 <= self.max_wait <= 1:
            raise UserError(f"--max_wait is {self.max_wait}: give seconds from 0 to 1")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port is {self.port}: give a number below 65536; 0 takes a free one")
