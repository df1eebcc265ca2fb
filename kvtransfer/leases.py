"""Leases: what keeps a source's blocks in place until their sink has them. The books only.

A lease maps block keys to blocks. Its life is this table; every event that is not in a row changes
nothing, which is what makes messages that come late, twice or never harmless:

    state      event      -> state      what happens
    -------------------------------------------------------------------------------------------
    unknown    open       -> open       the producer (a prompt being computed) is in charge
    unknown    adopt      -> complete   a fetch of blocks that are all in the cache already
    unknown    end        -> ended      released before it was opened: nothing will be held
    open       add        -> open       blocks join; they may be still being computed
    open       complete   -> complete   every block is in and final; from here on it can expire
    open       touch      -> open
    open       end        -> ended      released by the sink, or cancelled by the producer
    complete   open       -> open       adopted, and only then did the producer come to it
    complete   touch      -> complete   expiry counts from here again
    complete   end        -> ended
    complete   (time)     -> ended      not touched for its duration
    ended      everything -> ended

An open lease does not expire: its producer lives in the same process, and ends it. A lease that
ended is remembered for a while (the last `remember` of them), so that a late open does not bring it
back and a late fetch is told why at once instead of waiting for it.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


class LeaseState(enum.Enum):
    """Where a lease is in its life."""

    UNKNOWN = "unknown"
    OPEN = "open"
    COMPLETE = "complete"
    ENDED = "ended"


@dataclass(slots=True)
class Lease:
    """A live lease. `blocks` maps keys to blocks, in the order they were added."""

    seconds: float
    touched: float
    complete: bool = False
    tenant: str = ""
    blocks: dict[bytes, int] = field(default_factory=dict)

    @property
    def expires(self) -> float:
        """Time of expiry; infinity while it is open."""
        return self.touched + self.seconds if self.complete else float("inf")


class LeaseTable:
    """All leases of a source. Not thread-safe; its owner serializes and counts references."""

    def __init__(self, remember: int = 8192) -> None:
        self._live: dict[str, Lease] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._remember = remember

    def __len__(self) -> int:
        """Live leases."""
        return len(self._live)

    def state(self, lease_id: str) -> LeaseState:
        """See the table above."""
        lease = self._live.get(lease_id)
        if lease is not None:
            return LeaseState.COMPLETE if lease.complete else LeaseState.OPEN
        return LeaseState.ENDED if lease_id in self._ended else LeaseState.UNKNOWN

    def live(self, lease_id: str) -> Lease | None:
        """The lease if it is live."""
        return self._live.get(lease_id)

    def why_ended(self, lease_id: str) -> str | None:
        """In a word or two, if it ended and that is still remembered."""
        return self._ended.get(lease_id)

    def held(self) -> dict[int, int]:
        """References that live leases have on blocks, by block."""
        counts: dict[int, int] = {}
        for lease in self._live.values():
            for block in lease.blocks.values():
                counts[block] = counts.get(block, 0) + 1
        return counts

    def open(self, lease_id: str, seconds: float, now: float, tenant: str = "") -> bool:
        """A producer takes charge of a lease. False if it ended already."""
        if lease_id in self._ended:
            return False
        lease = self._live.get(lease_id)
        if lease is None:
            self._live[lease_id] = Lease(seconds, now, tenant=tenant)
        else:
            lease.seconds, lease.touched, lease.complete = seconds, now, False
            lease.tenant = tenant
        return True

    def adopt(
        self,
        lease_id: str,
        seconds: float,
        blocks: Sequence[int],
        keys: Sequence[bytes],
        now: float,
        tenant: str = "",
    ) -> bool:
        """A complete lease on finished blocks, for a fetch that found none. False if there was."""
        if self.state(lease_id) is not LeaseState.UNKNOWN:
            return False
        self._live[lease_id] = Lease(
            seconds, now, True, tenant, dict(zip(keys, blocks, strict=True))
        )
        return True

    def add(
        self, lease_id: str, blocks: Sequence[int], keys: Sequence[bytes], now: float
    ) -> list[int]:
        """Adds blocks to an open lease; returns those it did not have the keys of.

        The caller owes one reference for each block returned.
        """
        lease = self._live.get(lease_id)
        if lease is None or lease.complete:
            return []
        new = []
        for block, key in zip(blocks, keys, strict=True):
            if key not in lease.blocks:
                lease.blocks[key] = block
                new.append(block)
        lease.touched = now
        return new

    def complete(self, lease_id: str, now: float) -> bool:
        """Every block is in; expiry runs. False if it is not open."""
        lease = self._live.get(lease_id)
        if lease is None or lease.complete:
            return False
        lease.complete, lease.touched = True, now
        return True

    def touch(self, lease_id: str, now: float) -> bool:
        """The sink was heard of. False if the lease is not live."""
        lease = self._live.get(lease_id)
        if lease is None:
            return False
        lease.touched = max(lease.touched, now)
        return True

    def end(self, lease_id: str, why: str) -> list[int] | None:
        """Ends a lease; returns its blocks, one reference of each to be given back.

        None if it was not live, which is then no matter: an unknown one counts as ended from here.
        """
        lease = self._live.pop(lease_id, None)
        if lease is None and lease_id in self._ended:
            return None
        self._ended[lease_id] = why
        while len(self._ended) > self._remember:
            self._ended.popitem(last=False)
        return None if lease is None else list(lease.blocks.values())

    def due(self, now: float) -> list[str]:
        """Leases whose time has run out; the caller ends them."""
        return [i for i, lease in self._live.items() if lease.expires <= now]
