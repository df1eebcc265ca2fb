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
5. A sequence that is to compute a prompt whose start another worker holds may fetch that first;
   whether it should is for somebody else to judge. It is asked once, at admission.
6. Drafts are a way to use what is left. Their blocks are taken from free or evictable ones, after
   those of rule 1, and are the first to be given back when one is lacking; drafts without a block
   are left out. Their rows count in the token budget, and what decodes takes part even beyond it.
7. A draft layer takes the hidden state of the token before. Where that was not computed in the
   last step (its KV came from the cache, a tier, another worker), it is computed again: one row
   more, which writes nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.errors import OutOfBlocksError
from services.engine.api import KvPrefix, KvSource
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
    """Compute KV for tokens [start, start + count) of a sequence; `sample` the token after.

    And those after it, as long as they are the `drafts`.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool
    drafts: tuple[int, ...] = ()
    refresh: bool = False
    """Compute the token before `start` again, for its hidden state."""

    @property
    def end(self) -> int:
        """First position not computed, were it not for drafts."""
        return self.start + self.count

    @property
    def first(self) -> int:
        """Position of the first row."""
        return self.start - self.refresh

    @property
    def rows(self) -> int:
        """Positions in the step."""
        return self.refresh + self.count + len(self.drafts)


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fill `blocks` with `keys`, from this worker's tiers first and then from a source.

    No source: from the tiers alone. No keys: only release the source's lease.
    """

    sequence: Sequence
    source: KvSource | None
    keys: tuple[bytes, ...] = ()
    blocks: tuple[int, ...] = ()
    partial_last: bool = False
    """The last block is an incomplete one, which is nobody's prefix."""
    held_only: bool = False
    """Of a prefix that may be there or not: what does not come is computed. So are the tiers'."""
    timeout: float | None = None
    """Seconds that it may take; None: what holds for all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    work: tuple[Work, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    """Back to waiting. One in phase RETURNING gets there when its fetch, to be stopped, has."""


Judge = Callable[[Sequence, KvPrefix, int], float | None]
"""Whether a sequence should fetch so many tokens of a prefix: seconds to try, None to compute."""


class Scheduler:
    """Owns the queues and the phases of sequences; single-threaded."""

    def __init__(
        self,
        pool: BlockSource,
        *,
        block_tokens: int,
        chunk_tokens: int,
        max_running: int,
        judge: Judge,
        in_tiers: Callable[[Seq[bytes]], int] = lambda _keys: 0,
        draft_tokens: int | None = None,
    ) -> None:
        """`draft_tokens`: most that are drafted at once; None: there is no draft layer."""
        self._pool = pool
        self._judge = judge
        self._in_tiers = in_tiers
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._max_running = max_running
        self._draft_tokens = draft_tokens
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
        return sum(self.to_compute(s) for s in (*self._waiting, *self._admitted))

    def to_compute(self, sequence: Sequence) -> int:
        """Prompt tokens of a sequence to be computed here."""
        if sequence.source is not None or sequence.phase not in _COMPUTES:
            return 0
        return max(0, sequence.context - self._covered(sequence))

    def submit(self, sequence: Sequence) -> None:
        """Queues a new sequence, whose blocks fit into an empty pool."""
        bisect.insort(self._waiting, sequence, key=_serial)

    def plan(self) -> Plan:
        """What the next step does. Allocates, preempts and admits; `advance` must follow."""
        preempted: list[Sequence] = []
        starved = self._grow(preempted)
        if not starved:
            self._make_room_for_drafts()
        running = [s for s in self._admitted if s.phase is Phase.RUNNING and s not in starved]
        work = [self._work(s, 1) for s in running if s.remaining == 1]
        left = self._chunk_tokens - sum(w.rows for w in work)
        left = max(left, self._chunk_tokens // 4, 1)
        for sequence in running:
            if sequence.remaining > 1 and left > 0:
                work.append(self._work(sequence, left))
                left -= work[-1].rows
        returning = any(s.phase is Phase.RETURNING for s in self._admitted)
        admitted: list[Sequence] = []
        fetches: list[Fetch] = []
        while not (starved or preempted or returning) and self._may_admit(left):
            sequence = self._waiting[0]
            source, prefix = sequence.source, sequence.prefix
            if not self._admit(sequence):
                break
            admitted.append(sequence)
            if source is not None:
                fetches.append(self._fetch(sequence, source))
            elif sequence.phase is Phase.FETCHING:
                fetches.append(self._prefix_fetch(sequence, prefix))
            if sequence.phase is Phase.RUNNING and left > 0:
                work.append(self._work(sequence, left))
                left -= work[-1].rows
        if admitted:
            self._make_room_for_drafts()
        return Plan(tuple(work), tuple(admitted), tuple(fetches), tuple(preempted))

    def advance(self, plan: Plan) -> None:
        """The plan's work has been computed; whether drafts were right is not known yet."""
        for work in plan.work:
            work.sequence.drafts = ()
            work.sequence.computed = work.end
            self._park_if_done(work.sequence)

    def proceed(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """The first tokens came from prefill."""
        sequence.append(tokens)
        sequence.held_back = False
        sequence.move(Event.PROCEED)

    def fetch_stopped(self, sequence: Sequence, arrived: int, restored: int = 0) -> None:
        """Nothing writes into the blocks of a fetch any more; its first `arrived` ones are good.

        The first `restored` of them came from a tier, and count as cached.

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
        sequence.drafted = sequence.computed
        here = min((cached + restored) * self._block_tokens, sequence.computed)
        if not sequence.preemptions:
            sequence.cached_tokens = here
        sequence.fetched_tokens = sequence.computed - here
        if good < sequence.fetch_until:
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
            if self._give_back_spare():
                continue
            returning = [s for s in self._admitted if s.phase is Phase.RETURNING]
            victim = self._victim(sequence)
            if victim is None or free + sum(len(s.blocks) for s in returning) >= lacking:
                return False
            self._preempt(victim)
            preempted.append(victim)
        return self._allocate(sequence, lacking)

    def _make_room_for_drafts(self) -> None:
        if self._draft_tokens is None:
            return
        for sequence in self._admitted:
            if sequence.phase is Phase.RUNNING and sequence.role is Role.DECODE:
                # The token to be sampled has a place in the draft layer at once, the next drafts
                # after it too.
                ahead = len(sequence.drafts) + max(1, self._draft_tokens)
                lacking = self._blocks_for(len(sequence.tokens) + ahead) - len(sequence.blocks)
                lacking = min(lacking, self._pool.available())
                if lacking > 0:
                    self._allocate(sequence, lacking)

    def _spare(self, sequence: Sequence) -> int:
        """Blocks that it has for drafts alone."""
        if sequence.phase is not Phase.RUNNING:
            return 0
        return max(0, len(sequence.blocks) - self._blocks_for(len(sequence.tokens)))

    def _give_back_spare(self) -> bool:
        """Gives all blocks back that are for drafts alone; whether there were any."""
        found = [s for s in self._admitted if self._spare(s)]
        for sequence in found:
            needed = len(sequence.blocks) - self._spare(sequence)
            self._pool.release(sequence.blocks[needed:])
            del sequence.blocks[needed:]
        return bool(found)

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
        reserve = sum(s.role is Role.DECODE and not self._spare(s) for s in self._admitted)
        sequence.blocks = list(cached)
        if not (self._pool.available() >= lacking + reserve and self._allocate(sequence, lacking)):
            self._pool.release(cached)
            sequence.blocks = []
            return False
        del self._waiting[0]
        bisect.insort(self._admitted, sequence, key=_serial)
        sequence.computed = sequence.drafted = len(cached) * self._block_tokens
        if not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
        sequence.fetch_until = self._fetch_until(sequence, usable)
        fetching = sequence.fetch_until > len(cached)
        sequence.move(Event.ADMIT_FETCH if fetching else Event.ADMIT)
        self._park_if_done(sequence)
        # Either is asked once: a source's lease ends with the fetch, a prefix may be gone.
        sequence.source = sequence.prefix = None
        return True

    def _fetch_until(self, sequence: Sequence, usable: int) -> int:
        """Blocks from the start that there will be once a fetch is over."""
        cached = sequence.computed // self._block_tokens
        if sequence.source is not None:
            return len(sequence.context_keys)
        tiered = sequence.chain.keys[cached : min(usable, sequence.context) // self._block_tokens]
        here = cached + self._in_tiers(tiered)
        if sequence.prefix is None:
            return here
        held = min(sequence.prefix.tokens, usable) // self._block_tokens
        if held <= here:
            return here
        tokens = (held - here) * self._block_tokens
        sequence.fetch_timeout = self._judge(sequence, sequence.prefix, tokens)
        return here if sequence.fetch_timeout is None else held

    def _covered(self, sequence: Sequence) -> int:
        """Tokens whose KV is here or on its way."""
        if sequence.phase is Phase.FETCHING:
            return sequence.fetch_until * self._block_tokens
        return sequence.computed

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

    def _prefix_fetch(self, sequence: Sequence, prefix: KvPrefix | None) -> Fetch:
        cached = sequence.computed // self._block_tokens
        source = None
        if prefix is not None and sequence.fetch_timeout is not None:  # judged worth it
            # Attempts have names of their own, and sequences numbers: no lease is asked for twice.
            lease = f"{sequence.request.request_id}/prefix-{sequence.serial}"
            source = KvSource(prefix.worker_id, prefix.address, lease)
        return Fetch(
            sequence,
            source,
            keys=tuple(sequence.chain.keys[cached : sequence.fetch_until]),
            blocks=tuple(sequence.blocks[cached : sequence.fetch_until]),
            held_only=True,
            timeout=sequence.fetch_timeout,
        )

    def _work(self, sequence: Sequence, budget: int) -> Work:
        refresh = self._draft_tokens is not None and 0 < sequence.computed >= sequence.drafted
        count = min(sequence.remaining, max(1, budget - refresh))
        complete = count == sequence.remaining and not sequence.held_back
        room = len(sequence.blocks) * self._block_tokens - len(sequence.tokens)
        drafts = sequence.drafts[:room] if complete else ()
        return Work(sequence, sequence.computed, count, complete, drafts, refresh)

    def _park_if_done(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.RUNNING and sequence.held_back and not sequence.remaining:
            sequence.move(Event.PARK)

    def _drop(self, sequence: Sequence) -> None:
        """Takes a sequence out of the batch, and its blocks from it."""
        if sequence.blocks:
            self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.drafted = 0
        sequence.drafts = ()
        if sequence in self._admitted:
            self._admitted.remove(sequence)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)


_COMPUTES = frozenset({Phase.WAITING, Phase.RUNNING, Phase.FETCHING})
_PREEMPTIBLE = frozenset({Phase.RUNNING, Phase.PARKED, Phase.FETCHING})


def _serial(sequence: Sequence) -> int:
    return sequence.serial
