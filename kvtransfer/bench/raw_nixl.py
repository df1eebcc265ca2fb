"""What NIXL can do here: a read asked for straight from its API, and polled without a pause."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence

import numpy as np

from kvtransfer.memory import Segment
from kvtransfer.transports.base import Offer, Read
from kvtransfer.transports.descriptors import Descriptors, unpacked
from kvtransfer.transports.nixl_agent import NixlAgent, load
from kvtransfer.transports.ucx_settings import loopback_only


class RawNixl:
    """An agent of the sink, reading from the agent that a ticket of the transport names."""

    def __init__(self, segment: Segment, ticket: Offer) -> None:
        name = f"bench-{secrets.token_hex(8)}"
        self._agent = NixlAgent(load()[0], name, serve=False, ucx=loopback_only("127.0.0.1"))
        self._agent.register(segment.regions)
        self._source = self._agent.load(base64.b64decode(ticket.attributes["agent"]))
        (remote,) = unpacked(ticket.attributes["regions"]).regions
        self._remote, self._local = remote.address, segment.data.ctypes.data

    async def read(self, reads: Sequence[Read]) -> None:
        """createXferReq, postXferReq, getXferStatus until it is done, releaseXferReq."""
        table = np.array([(r.remote, r.local, r.length) for r in reads], np.uint64)
        handle = self._agent.read(
            self._source,
            Descriptors(
                "DRAM",
                "DRAM",
                _described(self._remote + table[:, 0], table[:, 2]),
                _described(self._local + table[:, 1], table[:, 2]),
            ),
        )
        while not self._agent.ended(handle):
            pass
        self._agent.release(handle)

    def close(self) -> None:
        """Ends it."""
        self._agent.close()


def _described(addresses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.column_stack([addresses, lengths, np.zeros_like(lengths)])
