"""Continuous batching, purely: which sequences run, what each computes in the next step.

Rules, in the order they apply to every step:

1. A sequence's blocks cover all its known tokens. One that lacks a block takes it from free or
   evictable blocks, else by preempting a sequence that decodes and came later, latest first.
   If there is none it sits this step out. So the oldest is never preempted and always goes on.
   Prefill sequences are never preempted: their blocks are promised to a sink.
2. Sequences with one token to compute (that decode) all take part.
3. Prompts share what they leave of the token budget, but at least a quarter of it, oldest first.
4. What then remains of the budget admits waiting sequences, strictly in order of arrival, while
   the pool has their blocks and one more for each sequence that decodes. Nothing is admitted in
   a step in which a sequence lacked a block.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.errors import OutOfBlocksError
from services.engine.api import KvSource
from services.engine.stepped.phases import Event, Phase
from services.engine.stepped.sequence import Role, Sequence


class BlockSource(Protocol):
    """What the scheduler asks of a KvStore. Blocks come with one reference each."""

    def match(self, keys: Seq[bytes]) -> list[int]:
        """The longest cached prefix."""

    def allocate(self, n: int) -> list[int]:
        """All or nothing. Raises OutOfBlocksError."""

    def release(self, blocks: Seq[int]) -> None:
        """Gives references back."""

    def available(self) -> int:
        """How many blocks could be allocated."""


@dataclass(frozen=True, slots=True)
class Work:
    """Compute KV for tokens [start, start + count) of a sequence; `sample` the token after."""

    sequence: Sequence
    start: int
    count: int
    sample: bool

    @property
    def end(self) -> int:
        """First position not computed."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fill `blocks` with `keys` from a source. No keys: only release the source's lease."""

    sequence: Sequence
    source: KvSource
    keys: tuple[bytes, ...] = ()
    blocks: tuple[int, ...] = ()
    partial_last: bool = False
    """The last block is an incomplete one, which is nobody's prefix."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    work: tuple[Work, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    """Back to waiting. One in phase RETURNING gets there when its fetch, to be stopped, has."""


class Scheduler:
    """Owns the queues and the phases of sequences; single-threaded."""

    def __init__(
        self, pool: BlockSource, *, block_tokens: int, chunk_tokens: int, max_running: int
    ) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._max_running = max_running
        # Both by serial, ascending: the order of arrival.
        self._waiting: list[Sequence] = []
        self._admitted: list[Sequence] = []

    @property
    def waiting(self) -> Seq[Sequence]:
        """In the queue, oldest first."""
        return self._waiting

    @property
    def admitted(self) -> Seq[Sequence]:
        """Holding blocks, oldest first."""
        return self._admitted

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens to be computed here."""
        here = [s for s in self._waiting if s.source is None]
        here += [s for s in self._admitted if s.phase is Phase.RUNNING]
        return sum(max(0, s.context - s.computed) for s in here)

    def submit(self, sequence: Sequence) -> None:
        """Queues a new sequence, whose blocks fit into an empty pool."""
        bisect.insort(self._waiting, sequence, key=_serial)

    def plan(self) -> Plan:
        """What the next step does. Allocates, preempts and admits; `advance` must follow."""
        preempted: list[Sequence] = []
        starved = self._grow(preempted)
        running = [s for s in self._admitted if s.phase is Phase.RUNNING and s not in starved]
        work = [self._work(s, 1) for s in running if s.remaining == 1]
        left = max(self._chunk_tokens - len(work), self._chunk_tokens // 4, 1)
        for sequence in running:
            if sequence.remaining > 1 and left > 0:
                work.append(self._work(sequence, left))
                left -= work[-1].count
        returning = any(s.phase is Phase.RETURNING for s in self._admitted)
        admitted: list[Sequence] = []
        fetches: list[Fetch] = []
        while not (starved or preempted or returning) and self._may_admit(left):
            sequence = self._waiting[0]
            source = sequence.source
            if not self._admit(sequence):
                break
            admitted.append(sequence)
            if source is not None:
                fetches.append(self._fetch(sequence, source))
            if sequence.phase is Phase.RUNNING:
                work.append(self._work(sequence, left))
                left -= work[-1].count
        return Plan(tuple(work), tuple(admitted), tuple(fetches), tuple(preempted))

    def advance(self, plan: Plan) -> None:
        """The plan's work has been computed."""
        for work in plan.work:
            work.sequence.computed = work.end
            self._park_if_done(work.sequence)

    def proceed(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """The first tokens came from prefill."""
        sequence.append(tokens)
        sequence.held_back = False
        sequence.move(Event.PROCEED)

    def fetch_stopped(self, sequence: Sequence, arrived: int) -> None:
        """Nothing writes into the blocks of a fetch any more; its first `arrived` ones are good.

        The rest are given back, not computed in place: a good block after a bad one may be in
        the prefix cache by now, and a cached block is never written.
        """
        sequence.move(Event.FETCH_STOPPED)
        if sequence.phase is not Phase.RUNNING:
            self._drop(sequence)
            if sequence.phase is Phase.WAITING:
                bisect.insort(self._waiting, sequence, key=_serial)
            return
        cached = sequence.computed // self._block_tokens
        good = cached + arrived
        sequence.computed = min(good * self._block_tokens, sequence.context)
        sequence.fetched_tokens = sequence.computed - sequence.cached_tokens
        if good < len(sequence.context_keys):
            self._pool.release(sequence.blocks[good:])
            del sequence.blocks[good:]
        self._park_if_done(sequence)

    def end(self, sequence: Sequence) -> None:
        """The sequence is over. If its phase is LEAVING then, its fetch has to be stopped."""
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        sequence.move(Event.END)
        if sequence.phase is Phase.ENDED:
            self._drop(sequence)

    def _grow(self, preempted: list[Sequence]) -> set[Sequence]:
        """Gives every running sequence the blocks it lacks; returns those that got none."""
        starved = set()
        for sequence in list(self._admitted):
            if sequence.phase is not Phase.RUNNING:
                continue
            lacking = self._blocks_for(len(sequence.tokens)) - len(sequence.blocks)
            if lacking > 0 and not self._take(sequence, lacking, preempted):
                starved.add(sequence)
        return starved

    def _take(self, sequence: Sequence, lacking: int, preempted: list[Sequence]) -> bool:
        while (free := self._pool.available()) < lacking:
            returning = [s for s in self._admitted if s.phase is Phase.RETURNING]
            victim = self._victim(sequence)
            if victim is None or free + sum(len(s.blocks) for s in returning) >= lacking:
                return False
            self._preempt(victim)
            preempted.append(victim)
        return self._allocate(sequence, lacking)

    def _allocate(self, sequence: Sequence, lacking: int) -> bool:
        try:
            sequence.blocks += self._pool.allocate(lacking)
        except OutOfBlocksError:  # a lease has taken them since they were counted
            return False
        return True

    def _victim(self, sequence: Sequence) -> Sequence | None:
        for other in reversed(self._admitted):
            if other.serial <= sequence.serial:
                return None
            if other.role is Role.DECODE and other.phase in _PREEMPTIBLE:
                return other
        return None

    def _preempt(self, victim: Sequence) -> None:
        victim.preemptions += 1
        victim.move(Event.PREEMPT)
        if victim.phase is Phase.WAITING:
            self._drop(victim)
            bisect.insort(self._waiting, victim, key=_serial)

    def _may_admit(self, left: int) -> bool:
        if not self._waiting or len(self._admitted) >= self._max_running:
            return False
        # One that will be fetched needs no share of the budget.
        return left > 0 or self._waiting[0].source is not None

    def _admit(self, sequence: Sequence) -> bool:
        """Gives the first in the queue its blocks, cached ones first, or says that it can't."""
        if sequence.source is not None:
            usable = sequence.context
        else:
            usable = len(sequence.tokens) - (0 if sequence.held_back else 1)
        cached = self._pool.match(sequence.chain.keys[: usable // self._block_tokens])
        lacking = self._blocks_for(len(sequence.tokens)) - len(cached)
        reserve = sum(s.role is Role.DECODE for s in self._admitted)
        sequence.blocks = list(cached)
        if not (self._pool.available() >= lacking + reserve and self._allocate(sequence, lacking)):
            self._pool.release(cached)
            sequence.blocks = []
            return False
        del self._waiting[0]
        bisect.insort(self._admitted, sequence, key=_serial)
        sequence.computed = len(cached) * self._block_tokens
        if not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
        missing = sequence.source is not None and len(cached) < len(sequence.context_keys)
        sequence.move(Event.ADMIT_FETCH if missing else Event.ADMIT)
        self._park_if_done(sequence)
        # A source is asked once: its lease ends with the fetch.
        sequence.source = None
        return True

    def _fetch(self, sequence: Sequence, source: KvSource) -> Fetch:
        if sequence.phase is not Phase.FETCHING:
            return Fetch(sequence, source)
        cached, wanted = sequence.computed // self._block_tokens, len(sequence.context_keys)
        return Fetch(
            sequence,
            source,
            keys=sequence.context_keys[cached:],
            blocks=tuple(sequence.blocks[cached:wanted]),
            partial_last=sequence.context % self._block_tokens != 0,
        )

    def _work(self, sequence: Sequence, budget: int) -> Work:
        count = min(sequence.remaining, budget)
        complete = count == sequence.remaining and not sequence.held_back
        return Work(sequence, sequence.computed, count, sample=complete)

    def _park_if_done(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.RUNNING and sequence.held_back and not sequence.remaining:
            sequence.move(Event.PARK)

    def _drop(self, sequence: Sequence) -> None:
        """Takes a sequence out of the batch, and its blocks from it."""
        if sequence.blocks:
            self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        if sequence in self._admitted:
            self._admitted.remove(sequence)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)


_PREEMPTIBLE = frozenset({Phase.RUNNING, Phase.PARKED, Phase.FETCHING})


def _serial(sequence: Sequence) -> int:
    return sequence.serial
