"""A KV sink in a process of its own that fetches the same blocks often, and says what that left.

    kv_often.py '{"transport": ..., "address": ..., "keys": [...], "first": 300, "then": 3000}'

It prints a line of JSON: what it had more after the `then` fetches than before them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys

import psutil
import uvloop

from kvtransfer.endpoint import KvEndpoint
from kvtransfer.store import KvStore
from tests.contract.kv_source import layout

AT_ONCE = 10


async def main() -> None:
    asked = json.loads(sys.argv[1])
    keys = [bytes.fromhex(key) for key in asked["keys"]]
    store = KvStore(layout(), 64, layers_per_piece=2)
    endpoint = KvEndpoint(store, transports=[asked["transport"]])
    await endpoint.start()
    me = psutil.Process()

    async def one(index: int) -> None:
        blocks = store.allocate(len(keys))
        report = await endpoint.fetch(asked["address"], f"often-{index}", keys, blocks)
        assert all(report.complete)
        store.release(blocks)

    async def some(first: int, count: int) -> tuple[int, int]:
        for start in range(first, first + count, AT_ONCE):
            await asyncio.gather(*(one(i) for i in range(start, start + AT_ONCE)))
        await asyncio.gather(*endpoint._releasing)
        gc.collect()
        return me.num_fds(), me.memory_info().rss

    descriptors, memory = await some(0, asked["first"])
    now, grown = await some(asked["first"], asked["then"])
    assert store.stats().held == 0
    store.check_integrity()
    left = {
        "descriptors": now - descriptors,
        "bytes": grown - memory,
        "tasks": len(asyncio.all_tasks()),
    }
    print(json.dumps(left), flush=True)
    await endpoint.close()


if __name__ == "__main__":
    uvloop.run(main())
