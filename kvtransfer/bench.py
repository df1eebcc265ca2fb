"""How fast KV moves between two processes of this machine: `python -m kvtransfer.bench`.

For each transport and block size it fetches cached blocks from a source in another process into
fresh ones, whole path: gRPC, negotiation, reads, verification, commit. Rounds whose destination
memory is touched for the first time are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc
import numpy as np
import uvloop

from kvtransfer.endpoint import KvEndpoint
from kvtransfer.keys import block_keys, salt
from kvtransfer.layout import KvLayout, gqa_layout
from kvtransfer.store import KvStore
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

TRANSPORTS = ("shm", "tcp")
LAYERS = 32
LAYERS_PER_PIECE = 8
BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Seconds of wall time, but for `cpu`, the sink's CPU seconds."""

    transport: str
    block_bytes: int
    blocks: int
    median: float
    best: float
    cpu: float

    def __str__(self) -> str:
        total = self.block_bytes * self.blocks
        return (
            f"{self.transport:<10}{self.block_bytes / 2**10:>10.0f}{self.blocks:>8}"
            f"{1e3 * self.median:>12.2f}{total / self.median / 1e9:>12.2f}"
            f"{total / self.best / 1e9:>10.2f}{1e3 * self.cpu:>10.1f}"
        )


HEADER = (
    f"{'transport':<10}{'block KiB':>10}{'blocks':>8}{'median ms':>12}{'median GB/s':>12}"
    f"{'best':>10}{'CPU ms':>10}"
)


def layout_of(head_dim: int) -> KvLayout:
    """Grouped-query attention with 4 KV heads in FP8."""
    return gqa_layout(
        "bench",
        layers=LAYERS,
        kv_heads=4,
        head_dim=head_dim,
        dtype="fp8_e4m3",
        block_tokens=BLOCK_TOKENS,
    )


def keys_of(layout: KvLayout, blocks: int) -> list[bytes]:
    """The keys that source and sink agree on."""
    return block_keys(
        range(blocks * BLOCK_TOKENS), BLOCK_TOKENS, salt(layout.model, layout.fingerprint)
    )


async def serve(layout: KvLayout, blocks: int, transport: str, parent: Connection) -> None:
    """A source with every block cached, until the parent is done."""
    store = KvStore(layout, blocks, layers_per_piece=LAYERS_PER_PIECE)
    store.memory[:] = np.random.default_rng(0).integers(0, 256, store.memory.shape, np.uint8)
    held = store.allocate(blocks)
    for block, key in zip(held, keys_of(layout, blocks), strict=True):
        store.seal(block, key)
    store.release(held)
    endpoint = KvEndpoint(store, transports=[transport])
    await endpoint.start()
    server = grpc.aio.server()
    kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server(endpoint.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    parent.send(f"127.0.0.1:{port}")
    await asyncio.to_thread(parent.poll, None)
    await server.stop(0)
    await endpoint.close()


async def measure(layout: KvLayout, blocks: int, transport: str, address: str, rounds: int) -> Row:
    """Fetches all blocks `rounds` times, after one that does not count."""
    store = KvStore(layout, blocks, layers_per_piece=LAYERS_PER_PIECE)
    endpoint = KvEndpoint(store, transports=[transport])
    await endpoint.start()
    keys = keys_of(layout, blocks)
    wall, cpu = [], []
    for round_ in range(rounds + 1):
        # Whatever the last round cached is evicted by this.
        mine = store.allocate(blocks)
        began, began_cpu = time.perf_counter(), time.process_time()
        report = await endpoint.fetch(
            address, f"bench-{os.getpid()}-{round_}", keys, mine, partial_last=False
        )
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
        report.require_sound()
        store.release(mine)
    await endpoint.close()
    return Row(
        transport,
        layout.block_bytes,
        blocks,
        statistics.median(wall[1:]),
        min(wall[1:]),
        statistics.median(cpu[1:]),
    )


def compare(mebibytes: int, rounds: int, show: Callable[[Row], None]) -> None:
    """All rows, from one block to `mebibytes` of them."""
    for transport in TRANSPORTS:
        for head_dim in (64, 512):
            layout = layout_of(head_dim)
            most = max(1, mebibytes * 2**20 // layout.block_bytes)
            for blocks in (1, most):
                show(_pair(layout, blocks, transport, rounds if blocks > 1 else 10 * rounds))


def _pair(layout: KvLayout, blocks: int, transport: str, rounds: int) -> Row:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(layout, blocks, transport, there), daemon=True)
    child.start()
    there.close()
    try:
        return uvloop.run(measure(layout, blocks, transport, here.recv(), rounds))
    finally:
        here.close()
        child.join()


def _child(layout: KvLayout, blocks: int, transport: str, parent: Connection) -> None:
    uvloop.run(serve(layout, blocks, transport, parent))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m kvtransfer.bench", description=__doc__)
    parser.add_argument("--mib", type=int, default=128, help="KV moved in one fetch, MiB (128)")
    parser.add_argument("--rounds", type=int, default=10, help="fetches measured (10)")
    options = parser.parse_args()
    print(HEADER)
    compare(options.mib, options.rounds, lambda row: print(row, flush=True))


if __name__ == "__main__":
    main()
