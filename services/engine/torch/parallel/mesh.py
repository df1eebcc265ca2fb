"""Ranks that exchange tensors: torch.distributed's process group over gloo.

A group is made from its parts and not by init_process_group, which would listen on whatever address
this machine's name has: here every rank listens on the one that it was given.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

MEETING = timedelta(seconds=120)
"""For all ranks to find each other."""
PATIENCE = timedelta(days=1)
"""For one that does not come to an exchange: it is the leader that tells whether it will. One that
is gone is noticed at once."""

Int64s = npt.NDArray[np.int64]

# Stubs name only a part of what there is.
_c10d: Any = distributed


def open_store(host: str, ranks: int) -> tuple[Any, str]:
    """Where ranks find each other, of rank 0, listening on this host alone; and its host:port."""
    listener = socket.create_server((host, 0), family=_family(host))
    port = listener.getsockname()[1]
    store = _c10d.TCPStore(
        host,
        port,
        ranks,
        is_master=True,
        timeout=MEETING,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def find_store(address: str, ranks: int) -> Any:
    """That of rank 0, at host:port."""
    host, _, port = address.rpartition(":")
    return _c10d.TCPStore(host.strip("[]"), int(port), ranks, is_master=False, timeout=MEETING)


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


class Mesh:
    """One rank's end. All ranks make the same calls in the same order, each on one thread.

    Every call raises RuntimeError when a rank is gone.
    """

    def __init__(
        self, store: Any, rank: int, ranks: int, host: str, patience: timedelta = PATIENCE
    ) -> None:
        """Returns when all have come. `host`: the address to listen on for the others.

        Who does not come to a call for `patience` counts as gone.
        """
        options = _c10d.ProcessGroupGloo._Options()
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = patience
        self.rank = rank
        self.ranks = ranks
        self._store = store  # rank 0's is served for as long as it lives
        self._group = _c10d.ProcessGroupGloo(store, rank, ranks, options)

    def exchange(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_rows: Sequence[int] = (),
        sent_rows: Sequence[int] = (),
    ) -> None:
        """Rank i gets the i-th part of `sent`, and `received` has what each one sent, in order.

        Parts are so many rows of the first dimension; equal ones if that is not said.
        """
        options = _c10d.AllToAllOptions()
        self._group.alltoall_base(
            received, sent, list(received_rows), list(sent_rows), options
        ).wait()

    def spread(self, data: torch.Tensor) -> None:
        """What rank 0 has in `data` the others have in theirs, of the same size."""
        options = _c10d.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([data], options).wait()

    def gather(self, values: Sequence[int]) -> Int64s:
        """What every rank says: int64 [ranks, values]."""
        sent = torch.tensor([list(values)] * self.ranks, dtype=torch.int64)
        received = torch.empty_like(sent)
        self.exchange(received, sent)
        found: Int64s = received.numpy()
        return found
