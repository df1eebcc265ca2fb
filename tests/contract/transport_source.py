"""A process with one transport's source end and nothing else, for tests of transports.

A command is a line of JSON on stdin, and answered by one.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time

import numpy as np
import psutil
import uvloop

from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.offload import Offload
from kvtransfer.transports.build import make_transports


def filled(size: int) -> np.ndarray:
    """What every source's memory holds."""
    return np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)


class Source:
    """The commands."""

    def __init__(self, options: dict) -> None:
        self.segment = Segment(options["data_bytes"], secrets.token_bytes(NONCE_BYTES))
        self.segment.data[:] = filled(options["data_bytes"])
        (self.transport,) = make_transports(
            [options["transport"]], self.segment, Offload(), host="127.0.0.1", port=0
        )

    def ticket(self) -> dict:
        """What a sink would be given."""
        ticket = self.transport.ticket()
        return {"name": ticket.name, "attributes": dict(ticket.attributes)}

    def burdens(self) -> dict:
        """What it costs to have this process."""
        me = psutil.Process()
        return {
            "cpu": time.process_time(),
            "descriptors": me.num_fds(),
            "rss": me.memory_info().rss,
        }


async def main() -> None:
    source = Source(json.loads(sys.argv[1]))
    await source.transport.start()
    print(json.dumps({"address": "127.0.0.1:1"}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer = getattr(source, json.loads(line)["do"])()
        print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main())
