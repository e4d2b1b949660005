"""What one client address may hold of a bounded whole."""

from __future__ import annotations

import ipaddress
from collections import Counter

from starlette.types import Scope


def address_of(scope: Scope) -> str:
    """Where a request comes from: an IPv4 address, or the 64 bits of an IPv6 address that one client may vary."""
    host = (scope.get("client") or ("",))[0]
    return str(ipaddress.ip_network((host, 64), strict=False)) if ":" in host else host


class Shares:
    """What each address holds of something at the moment. None may hold more than half of the total."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, Counter[str]()

    def take(self, address: str, amount: int) -> bool:
        """Hold more, if there is room."""
        if self.held.total() + amount > self.total or self.held[address] + amount > half(self.total):
            return False
        self.held[address] += amount
        return True

    def give_back(self, address: str, amount: int) -> None:
        """Hold less."""
        self.held[address] -= amount
        if not self.held[address]:
            del self.held[address]


def half(total: int) -> int:
    return (total + 1) // 2
