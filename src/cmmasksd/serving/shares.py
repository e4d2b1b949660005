"""Limits on what one client address may hold of a shared resource, such as bytes or connections."""

from __future__ import annotations

import ipaddress
from collections import Counter

from starlette.types import Scope


def address_of(scope: Scope) -> str:
    """The client of a request: an IPv4 address, or the /64 network of an IPv6 address."""
    host = (scope.get("client") or ("",))[0]
    return str(ipaddress.ip_network((host, 64), strict=False)) if ":" in host else host


class Shares:
    """Amounts that the addresses hold at the moment. No address may hold more than half of the total."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, Counter[str]()

    def take(self, address: str, amount: int) -> bool:
        """Hold more. Returns whether there was room."""
        if self.held.total() + amount > self.total or self.held[address] + amount > half(self.total):
            return False
        self.held[address] += amount
        return True

    def release(self, address: str, amount: int) -> None:
        """Hold less."""
        self.held[address] -= amount
        if not self.held[address]:
            del self.held[address]


def half(total: int) -> int:
    return (total + 1) // 2
