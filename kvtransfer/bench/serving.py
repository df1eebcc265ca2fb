"""What the other process serves: transports over its segment, or a store with everything in it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc
import numpy as np

from kvtransfer.endpoint import KvEndpoint
from kvtransfer.keys import block_keys, salt
from kvtransfer.layout import KvLayout, gqa_layout
from kvtransfer.memory import Segment
from kvtransfer.offload import Offload
from kvtransfer.store import KvStore
from kvtransfer.transports.base import Offer, Transport
from kvtransfer.transports.build import make_transports
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

LOOPBACK = "127.0.0.1"
LAYERS_PER_PIECE = 8


@dataclass(frozen=True, slots=True)
class Served:
    """A store over there."""

    address: str
    """host:port of its gRPC server."""
    ticket: Offer
    """Of a transport over its segment, to read past gRPC."""


class AbsentError(Exception):
    """A transport that can't be used here. In words."""


def layout() -> KvLayout:
    """Grouped-query attention of 32 layers and 4 KV heads in FP8: blocks of 1.03 MiB."""
    return gqa_layout(
        "bench", layers=32, kv_heads=4, head_dim=128, dtype="fp8_e4m3", block_tokens=32
    )


def keys(blocks: int) -> list[bytes]:
    """What source and sink agree on."""
    tokens = layout().block_tokens
    return block_keys(range(blocks * tokens), tokens, salt("bench", layout().fingerprint))


async def started(name: str, segment: Segment, stack: AsyncExitStack) -> Transport:
    """A transport over a segment, closed with the stack. Raises AbsentError, TransportError."""
    offload = Offload()
    (transport,) = make_transports([name], segment, offload, host=LOOPBACK, port=0)
    if transport.why_not():
        raise AbsentError(transport.why_not())
    await transport.start()
    stack.callback(offload.close)
    stack.push_async_callback(transport.close)
    return transport


async def serve_transport(segment: Segment, name: str, stack: AsyncExitStack) -> Offer:
    """Its ticket."""
    return (await started(name, segment, stack)).ticket()


async def serve_store(segment: Segment, asked: tuple[str, int], stack: AsyncExitStack) -> Served:
    """A source by transport `asked[0]` with `asked[1]` blocks cached."""
    name, blocks = asked
    store = KvStore(layout(), blocks, layers_per_piece=LAYERS_PER_PIECE)
    store.memory[:] = np.random.default_rng(0).integers(0, 256, store.memory.shape, np.uint8)
    held = store.allocate(blocks)
    for block, key in zip(held, keys(blocks), strict=True):
        store.seal(block, key)
    store.release(held)
    endpoint = KvEndpoint(store, transports=[name])
    await endpoint.start()
    stack.push_async_callback(endpoint.close)
    server = grpc.aio.server()
    kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server(endpoint.servicer, server)
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    beside = await started(name, store.segment, stack)
    return Served(f"{LOOPBACK}:{port}", beside.ticket())
