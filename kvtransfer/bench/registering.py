"""What making memory known to a transport costs, once, and how soon that is forgotten."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from kvtransfer.bench.figures import GIB, Registration
from kvtransfer.bench.peer import Peer
from kvtransfer.bench.serving import serve_transport, started
from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.transports.base import Read

SMALL = 2**20
REPEATS = 3


async def measure(name: str, nbytes: int, say: Callable[[str], None]) -> Registration:
    """Of one transport, from its start over `nbytes` and over next to nothing.

    Raises AbsentError, PeerError, TransportError.
    """
    say(f"registration for {name}")
    large, small = _touched(nbytes), _touched(SMALL)
    with Peer(nbytes) as peer:
        ticket = peer.start(serve_transport, name)
        small_starts: list[float] = []
        starts: list[float] = []
        connects: list[float] = []
        firsts: list[float] = []
        later: list[float] = []
        for _ in range(REPEATS):
            small_starts.append(await _start(name, small))
            async with AsyncExitStack() as stack:
                began = time.perf_counter()
                transport = await started(name, large, stack)
                starts.append(time.perf_counter() - began)
                began = time.perf_counter()
                reader = await transport.connect(ticket, "127.0.0.1:0", 10)
                connects.append(time.perf_counter() - began)
                for times in (firsts, later):
                    began = time.perf_counter()
                    await reader.read([Read(0, 0, nbytes)], 60)
                    times.append(time.perf_counter() - began)
                await reader.close()
    # Least times: what else the machine does only ever adds.
    fetch, fixed, connect = min(later), min(small_starts), min(connects)
    a_gib = max(0.0, min(starts) - fixed) * GIB / nbytes
    # Pages that are read for the first time through a new mapping count as registration.
    mapping = max(0.0, min(firsts) - fetch) * GIB / nbytes if name == "shm" else 0.0
    once = a_gib + mapping + connect
    return Registration(
        name,
        1e3 * (a_gib + mapping),
        1e3 * fixed,
        1e3 * connect,
        1e3 * fetch,
        nbytes / 2**20,
        math.ceil(once / (0.01 * fetch)),
    )


async def _start(name: str, segment: Segment) -> float:
    began = time.perf_counter()
    async with AsyncExitStack() as stack:
        await started(name, segment, stack)
        return time.perf_counter() - began


def _touched(nbytes: int) -> Segment:
    segment = Segment(nbytes, secrets.token_bytes(NONCE_BYTES))
    segment.data[:] = 1
    return segment
