"""Settings of a server: its address and its limits. The command line reads them for `--help`, so imports are light."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from cmmasksd.errors import UserError, require_between
from cmmasksd.model.presence import MIN_SCORE

KEY_VARIABLE = "CMMASKSD_API_KEY"
"""Environment variable of the key; an option would show it to everybody who lists processes."""


def checked_key(key: str | None) -> str | None:
    """The key, if clients can send it in a header. None stays None: no key is required.

    Raises:
        UserError: it is empty, or has control characters, or white space at its ends.
    """
    if key is not None and (not key or key != key.strip() or not key.isprintable()):
        problem = "has characters that no client can send, or spaces at its ends" if key.strip() else "is empty"
        raise UserError(f"{KEY_VARIABLE} {problem}: set it to the key, or unset it to let everybody in")
    return key


@dataclass(frozen=True)
class ServeSettings:
    """Address of a server, and limits that keep one client from hurting the others."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 lets other machines in"""
    port: int = 8000
    """port to listen on; 0 takes a free one"""
    allowed_hosts: Sequence[str] = ()
    """host names in the addresses that clients use, such as masks.example.com. IP addresses and localhost are always
    allowed. Empty: any name if `host` is a network address, else `host`"""
    max_bytes: int = 10_000_000
    """maximum size of a request in bytes (413)"""
    max_held: int = 200_000_000
    """maximum size of all requests held at once, in bytes (429)"""
    max_pixels: int = 24_000_000
    """maximum number of pixels of an image, checked before it is decoded (413)"""
    max_sentences: int = 32
    """maximum number of sentences per request (422)"""
    max_characters: int = 300
    """maximum length of a sentence (422)"""
    max_batch: int = 8
    """maximum number of requests per batch"""
    max_wait: float = 0.005
    """seconds to wait for a batch to fill"""
    queue: int = 32
    """maximum number of waiting requests (429)"""
    timeout: float = 30.0
    """seconds until a request that is not answered is dropped (504)"""
    body_timeout: float = 20.0
    """seconds in which a client must send its request (408)"""
    min_score: float = MIN_SCORE
    """presence, from 0 to 1, below which the mask of a sentence is empty, unless the request says otherwise"""
    connections: int = 100
    """maximum number of requests under way (503), and of idle connections. One client address gets half of these, and
    of `max_held`"""

    @property
    def host_names(self) -> frozenset[str] | None:
        """Host names that a request may use beside IP addresses, in lower case; None: any."""
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
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in self.allowed_hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name):
                raise UserError(
                    f"--allowed_hosts must be names without scheme, port or path, such as masks.example.com,"
                    f" got {name[:60]!r}"
                )
        if self.max_held < 2 * self.max_bytes:
            raise UserError(f"--max_held must be at least twice --max_bytes, {2 * self.max_bytes}, got {self.max_held}")
        for name in ("timeout", "body_timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} must be above 0 seconds, got {getattr(self, name)}")
        require_between("min_score", self.min_score, 0, 1)
        if not 0 <= self.max_wait <= 1:
            raise UserError(f"--max_wait must be between 0 and 1 second, got {self.max_wait}")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port must be between 0 (any free port) and 65535, got {self.port}")
