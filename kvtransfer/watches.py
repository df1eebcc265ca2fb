"""What fetches wait for: each watch is one fetch's share of the news about a lease. Books only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvtransfer.errors import BlocksNotHeldError, KvError, LeaseLostError
from kvtransfer.pieces import Piece


class Watch:
    """One fetch: which keys it wants, and what became ready of them and was not taken yet."""

    __slots__ = (
        "armed",
        "blocks",
        "failure",
        "indices",
        "lease_id",
        "ready",
        "remaining",
        "tenant",
        "unbound",
        "wake",
    )

    def __init__(
        self,
        lease_id: str,
        keys: Sequence[bytes],
        pieces: int,
        wake: Callable[[], None],
        tenant: str = "",
    ) -> None:
        self.lease_id = lease_id
        self.tenant = tenant
        self.indices = {key: i for i, key in enumerate(keys)}
        self.unbound = set(keys)
        """Keys whose block the lease does not have yet."""
        self.blocks: list[int] = []
        """Blocks that had pieces to come when they were bound."""
        self.remaining = len(keys) * pieces
        """Pieces not taken yet."""
        self.ready: list[Piece] = []
        self.failure: KvError | None = None
        self.wake = wake
        self.armed = False
        """The fetch found nothing and wants to be woken, once."""


class WatchTable:
    """All watches of a source, by lease and by block. Not thread-safe; its owner serializes.

    Methods that bring news return the watches to wake, which their owner does when it has let
    its lock go.
    """

    def __init__(self) -> None:
        self._by_lease: dict[str, list[Watch]] = {}
        self._by_block: dict[int, list[tuple[Watch, int]]] = {}

    def __len__(self) -> int:
        """Watches there are."""
        return sum(map(len, self._by_lease.values()))

    def add(self, watch: Watch) -> None:
        """A fetch begins."""
        self._by_lease.setdefault(watch.lease_id, []).append(watch)

    def remove(self, watch: Watch) -> None:
        """A fetch ended. Idempotent."""
        of_lease = self._by_lease.get(watch.lease_id, [])
        if watch not in of_lease:
            return
        of_lease.remove(watch)
        if not of_lease:
            del self._by_lease[watch.lease_id]
        for block in watch.blocks:
            rest = [entry for entry in self._by_block.pop(block, ()) if entry[0] is not watch]
            if rest:
                self._by_block[block] = rest

    def of(self, lease_id: str) -> Sequence[Watch]:
        """The watches on a lease."""
        return self._by_lease.get(lease_id, ())

    def bind(
        self, watch: Watch, key: bytes, block: int, ready: Iterable[Piece], *, more: bool
    ) -> None:
        """The lease has the block of a key wanted; `more` if pieces of it are still to come."""
        watch.unbound.discard(key)
        watch.ready += ready
        if more:
            watch.blocks.append(block)
            self._by_block.setdefault(block, []).append((watch, watch.indices[key]))

    def piece(self, block: int, make: Callable[[int], Piece], *, more: bool) -> list[Watch]:
        """A piece of a block is ready; `make` builds it for an index of keys."""
        waiting = self._by_block.get(block, []) if more else self._by_block.pop(block, [])
        for watch, index in waiting:
            watch.ready.append(make(index))
        return [watch for watch, _ in waiting]

    def completed(self, lease_id: str) -> Sequence[Watch]:
        """The lease has all it will ever have: who wants more has waited in vain."""
        for watch in self.of(lease_id):
            if watch.unbound:
                watch.failure = BlocksNotHeldError(
                    f"lease {lease_id} is complete without {len(watch.unbound)} of the "
                    f"{len(watch.indices)} blocks asked for",
                    lease_id=lease_id,
                    missing=len(watch.unbound),
                )
        return self.of(lease_id)

    def ended(self, lease_id: str, why: str) -> Sequence[Watch]:
        """The lease is gone."""
        for watch in self.of(lease_id):
            watch.failure = lost(lease_id, why)
        return self.of(lease_id)


def lost(lease_id: str, why: str) -> LeaseLostError:
    """The error of a fetch whose lease ended."""
    return LeaseLostError(f"lease {lease_id} was {why}", lease_id=lease_id, why=why)
