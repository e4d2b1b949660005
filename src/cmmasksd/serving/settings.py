"""What a server is told: where it listens and what it refuses. Light: the command line reads it for `--help`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from cmmasksd.errors import UserError

KEY_VARIABLE = "CMMASKSD_API_KEY"
"""Environment variable of the key; an option would show it to everybody who lists processes."""


def checked_key(key: str | None) -> str | None:
    """The key, if clients can send it in a header; None stays None: nobody is asked for one.

    Raises:
        UserError: it is empty, or has control characters or white space at its ends.
    """
    if key is not None and (not key or key != key.strip() or not key.isprintable()):
        what = "is empty" if not key.strip() else "has characters that no client can send, or spaces at its ends"
        raise UserError(f"{KEY_VARIABLE} {what}: set it to the key, or unset it to let everybody in")
    return key


@dataclass(frozen=True)
class ServeSettings:
    """Where to listen, and the limits that keep one client from hurting the others.

    Attributes:
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: to listen on; 0 takes a free one.
        allowed_hosts: names in the addresses that clients use, such as masks.example.com. IP addresses and localhost
            always are. None given: any name where `host` is the address of a network, else `host`.
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
    allowed_hosts: Sequence[str] = ()
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

    @property
    def answers_to(self) -> frozenset[str] | None:
        """Host names beside IP addresses that a request may name, in lower case; None: any."""
        if not self.allowed_hosts:
            try:
                if not ip_address(self.host).is_loopback:
                    return None
            except ValueError:
                pass
        return frozenset(name.lower() for name in ("localhost", *(self.allowed_hosts or [self.host])))

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_sentences", "max_characters", "max_batch", "queue", "connections"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        for name in self.allowed_hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name):
                raise UserError(
                    f"--allowed_hosts {name[:60]!r}: give names without scheme, port or path, such as masks.example.com"
                )
        if self.max_held < 2 * self.max_bytes:
            raise UserError(f"--max_held is {self.max_held}: give at least twice --max_bytes, {2 * self.max_bytes}")
        for name in ("timeout", "body_timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} is {getattr(self, name)}: give seconds above 0")
        if not 0 <= self.max_wait <= 1:
            raise UserError(f"--max_wait is {self.max_wait}: give seconds from 0 to 1")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port is {self.port}: give a number below 65536; 0 takes a free one")
