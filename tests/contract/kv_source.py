"""A KV source in a process of its own, for tests. It does what it is told on stdin.

A command is a line of JSON, and answered by one. Blocks hold bytes that follow from their key,
so both sides know what is right.
"""

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np
import uvloop

from kvtransfer.endpoint import KvEndpoint
from kvtransfer.layout import KvLayout, gqa_layout
from kvtransfer.store import KvStore
from services.runtime.server import Server
from services.runtime.settings import ServerSettings
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

SERVICE = "tandem.kvtransfer.v1.KvTransferService"


def layout(model: str = "m", layers: int = 6, head_dim: int = 32) -> KvLayout:
    return gqa_layout(
        model, layers=layers, kv_heads=2, head_dim=head_dim, dtype="fp8_e4m3", block_tokens=8
    )


def content(key: bytes, size: int) -> np.ndarray:
    """The bytes of the block of a key."""
    seed = int.from_bytes(key[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


class Source:
    """The commands."""

    def __init__(self, options: dict) -> None:
        self.store = KvStore(
            self.layout(options),
            options.get("blocks", 64),
            layers_per_piece=options.get("layers_per_piece", 2),
        )
        self.endpoint = KvEndpoint(
            self.store,
            transports=options["transports"],
            host_id=options.get("host_id"),
            lease_seconds=options.get("lease_seconds", 30.0),
        )
        self.blocks: dict[bytes, int] = {}
        self.filled = False
        self.changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.store.on_change(lambda: loop.call_soon_threadsafe(self.changed.set))

    @staticmethod
    def layout(options: dict) -> KvLayout:
        return layout(**options.get("layout", {}))

    async def open(self, lease: str, seconds: float = 30.0) -> dict:
        return {"live": self.store.open_lease(lease, seconds)}

    async def add(self, lease: str, keys: list[str], gaps: int = 0) -> dict:
        """Allocates blocks, not neighbours if `gaps`, and puts them under the lease."""
        raw = [bytes.fromhex(k) for k in keys]
        blocks = self.store.allocate(len(raw) * (1 + gaps))
        used, spare = blocks[:: 1 + gaps], [b for i, b in enumerate(blocks) if i % (1 + gaps)]
        self.store.release(spare)
        self.blocks.update(zip(raw, used, strict=True))
        self.store.lease_add(lease, used, raw)
        return {"blocks": used}

    async def write(self, keys: list[str], first: int, layers: int) -> dict:
        """Makes a layer range of some blocks final."""
        size = self.store.layer_bytes
        for key in map(bytes.fromhex, keys):
            block = self.blocks[key]
            if first == 0:
                self.store.begin(block, key)
            span = slice(first * size, (first + layers) * size)
            self.store.memory[block][span] = content(key, self.store.block_bytes)[span]
            self.store.piece_done(block, first, layers)
        return {}

    async def complete(self, lease: str, keys: list[str], commit: bool = False) -> dict:
        """The lease has everything; the engine's own references go."""
        self.store.lease_complete(lease)
        await self.forget(keys, commit)
        return {}

    async def forget(self, keys: list[str], commit: bool = False) -> dict:
        blocks = [self.blocks.pop(bytes.fromhex(k)) for k in keys]
        for block in blocks if commit else ():
            self.store.commit(block)
        self.store.release(blocks)
        return {}

    async def offer(
        self, lease: str, keys: list[str], seconds: float = 30.0, gaps: int = 0
    ) -> dict:
        """All at once: a finished prompt."""
        await self.open(lease, seconds)
        await self.add(lease, keys, gaps)
        await self.write(keys, 0, self.store.layout.layers)
        return await self.complete(lease, keys)

    async def cache(self, keys: list[str]) -> dict:
        """Blocks in the prefix cache, under no lease."""
        raw = [bytes.fromhex(k) for k in keys]
        self.blocks.update(zip(raw, self.store.allocate(len(raw)), strict=True))
        await self.write(keys, 0, self.store.layout.layers)
        return await self.forget(keys, commit=True)

    async def corrupt(self, block: int, byte: int) -> dict:
        """Flips a bit of a block's memory, as a fault would."""
        self.store.memory[block][byte] ^= 4
        return {}

    async def end(self, lease: str, why: str) -> dict:
        return {"was_live": self.store.release_lease(lease, why)}

    async def drop_cache(self) -> dict:
        """Evicts everything that can be."""
        self.store.release(self.store.allocate(self.store.available()))
        return {}

    async def ticket(self) -> dict:
        """What a sink would be given, for tests of transports alone; memory gets known bytes."""
        size = self.store.segment.data_bytes
        if not self.filled:
            self.store.segment.data[:] = content(b"whole---", size)
            self.filled = True
        (transport,) = self.endpoint._transports
        ticket = transport.ticket()
        return {"name": ticket.name, "attributes": dict(ticket.attributes), "bytes": size}

    async def close_segment(self) -> dict:
        self.store.segment.close()
        return {}

    async def stats(self) -> dict:
        self.store.check_integrity()
        stats = self.store.stats()
        counters = self.endpoint.counters
        return {
            "held": stats.held,
            "leases": stats.leases,
            "watches": stats.watches,
            "expired": stats.expired,
            "refused": counters.refused,
        }

    async def settle(self, **wanted: int) -> dict:
        """Answers once the stats are as wanted."""
        while True:
            self.changed.clear()
            stats = await self.stats()
            if all(stats[name] == value for name, value in wanted.items()):
                return stats
            await self.changed.wait()


async def main(kind: type[Source] = Source) -> None:
    source = kind(json.loads(sys.argv[1]))
    await source.endpoint.start()
    server = Server(ServerSettings(), "source")
    add = kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server
    server.add(add, source.endpoint.servicer, SERVICE)
    address = await server.start()
    print(json.dumps({"address": address}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        answer = await getattr(source, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)
    await server.stop(0)
    await source.endpoint.close()


if __name__ == "__main__":
    uvloop.run(main())
