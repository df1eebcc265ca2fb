"""Ports for processes that must know one before anybody listens there."""

from __future__ import annotations

import contextlib
import random
import socket

BELOW_WHAT_IS_GIVEN_OUT = range(12_000, 32_000)
"""No connection gets one of these by chance, from Linux, or to itself while nobody listens."""


def free_ports(count: int = 1) -> int:
    """The first of so many in a row that are free now."""
    while True:
        first = random.SystemRandom().choice(BELOW_WHAT_IS_GIVEN_OUT)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
