"""Which workers hold which KV blocks.

A block's key is a hash over all tokens up to its end, so a worker that holds key i of a prompt
holds keys 0..i-1 too: the chain rule. Workers keep it by evicting a prefix's last blocks first. How
deep the holders of a prefix reach is therefore found by bisection over the prompt's keys, for many
workers at once, instead of a walk along them. The rule holds for blocks in the pool, and for those
in the pool or in a tier under it; so the ones in the pool come first.

A worker that breaks the rule, if only because one of its messages is late, is taken to hold more or
less than it does: it holds the first two blocks of an answer and the last one, and what is between
was not looked at. It finds out for itself, since it looks the prompt up again. Where pools break
the rule, evicting a prefix's start first, it is mostly after a first block that all prompts share.

Sets of workers are integers with one bit a worker, and one more for a worker that has tiers: the
block is only there. Each distinct set has a number, and a block has the number of its holders. So a
worker is forgotten by taking its bits out of the distinct sets, however many blocks it held; blocks
that nobody holds any more are swept out later, little by little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from services.coordinator.core.sets import WorkerSets
from services.coordinator.core.table import KeyTable, tags_of

FEW = 8
"""Keys that are faster looked for one by one."""


@dataclass(slots=True)
class _Holder:
    """A worker of the index."""

    bit: int
    """In sets of those that hold a block."""
    lower: int = 0
    """In sets of those that hold it only in a tier; 0: it never told of one."""
    blocks: int = 0


class PrefixIndex:
    """Block key -> holders. Workers are added before anything is told of them.

    A worker's bit is its own from add() to forget(), and then at once free for another.
    """

    def __init__(self) -> None:
        self._table = KeyTable()
        self._sets = WorkerSets()
        self._workers: dict[str, _Holder] = {}
        self._names: list[str | None] = []
        """Of each bit."""
        self._swept = 0
        # A decision asks several times about the same prompt: its keys, and by position what was
        # found. Void once anything changes.
        self._asked: Sequence[bytes] = ()
        self._found: dict[int, int] = {}

    def __len__(self) -> int:
        """Distinct blocks held."""
        return self._sets.used - self._sets.dead_blocks

    def add(self, worker: str) -> int:
        """Makes room for a worker that holds nothing yet; its bit in sets of workers."""
        if worker not in self._workers:
            self._workers[worker] = _Holder(self._take_bit(worker))
        return self._workers[worker].bit

    def store(self, worker: str, keys: Collection[bytes]) -> None:
        """The worker has these in its pool now."""
        holder = self._workers[worker]
        self._change(holder, keys, take=holder.lower, give=holder.bit)

    def lower(self, worker: str, keys: Collection[bytes]) -> None:
        """The worker has these in a tier now, and not in its pool."""
        holder = self._workers[worker]
        if keys and not holder.lower:
            holder.lower = self._take_bit(worker)
        self._change(holder, keys, take=0, give=holder.bit | holder.lower)

    def remove(self, worker: str, keys: Collection[bytes]) -> None:
        """The worker no longer has these anywhere. Unknown ones are ignored."""
        holder = self._workers[worker]
        self._change(holder, keys, take=holder.bit | holder.lower, give=0)

    def replace(
        self, worker: str, stored: Collection[bytes], lower: Collection[bytes] = ()
    ) -> None:
        """These are all that the worker has: in its pool, and only in a tier."""
        holder = self._workers[worker]
        self._clear(holder)
        holder.blocks = 0
        self.lower(worker, lower)
        self.store(worker, stored)

    def forget(self, worker: str) -> None:
        """The worker is gone. Unknown: ignored."""
        holder = self._workers.pop(worker, None)
        if holder is None:
            return
        self._clear(holder)
        for bit in (holder.bit, holder.lower):
            if bit:
                self._names[bit.bit_length() - 1] = None

    def sweep(self, places: int) -> bool:
        """Drops blocks that nobody holds any more, among so many places; whether there are more.

        They are no worse than memory not yet free, and found again if they are stored again.
        """
        if not self._sets.dead:
            return False
        if self._swept >= len(self._table):
            self._swept = 0
        first, self._swept = self._swept, self._swept + places
        numbers = self._table.numbers[first : self._swept]
        gone = np.flatnonzero(self._sets.are_dead(numbers))
        for number, count in zip(*np.unique(numbers[gone], return_counts=True), strict=True):
            self._sets.count(int(number), -int(count))
        self._table.set(first + gone, 0)
        return bool(self._sets.dead)

    def known_blocks(self, worker: str) -> int:
        """Keys known to be held by the worker, in its pool or in a tier."""
        return self._workers[worker].blocks if worker in self._workers else 0

    def reach(self, keys: Sequence[bytes], workers: int) -> Iterator[tuple[int, int]]:
        """How many leading keys each worker of a set holds: (keys, set of workers), most first.

        Every worker of the set comes up once, those that hold none last. Costs about
        log2(len(keys)) lookups for each distinct answer that is asked for, or three if it is all.
        """
        # All of `some` hold the first `low` keys, none holds more than `high`.
        pending = [(0, len(keys), workers)]
        while pending:
            low, high, some = pending.pop()
            while low < high:
                # What most of a fleet shares is the first block or none; and many a prompt comes
                # again as a whole. So these are asked for first.
                if low < 2:
                    middle = low + 1
                else:
                    middle = high if high == len(keys) else (low + high + 1) // 2
                deeper = some & self._holders(keys, middle - 1)
                if not deeper:
                    high = middle - 1
                elif deeper == some:
                    low = middle
                else:
                    pending.append((low, middle - 1, some & ~deeper))
                    low, some = middle, deeper
            if some:
                yield low, some

    def in_pool(self, worker: str, keys: Sequence[bytes], held: int) -> int:
        """Of the first `held` keys, which the worker holds, how many are in its pool.

        The others, further on, are only in a tier. Costs nothing for a worker without tiers, else
        about log2(held) lookups.
        """
        lower = self._workers[worker].lower
        if not lower:
            return held
        low, high = 0, held
        while low < high:
            # Most are all in the pool.
            middle = (low + high + 1) // 2 if high < held else held
            if self._holders(keys, middle - 1) & lower:
                high = middle - 1
            else:
                low = middle
        return low

    def names(self, workers: int) -> Iterator[str]:
        """The workers of a set."""
        while workers:
            lowest = workers & -workers
            name = self._names[lowest.bit_length() - 1]
            if name is not None:
                yield name
            workers ^= lowest

    def check_integrity(self) -> None:
        """Proves that blocks, sets and workers tell the same; raises AssertionError."""
        self._table.check_integrity()
        self._sets.check_integrity(self._table.numbers)
        bits = 0
        for name, holder in self._workers.items():
            blocks = self._sets.holding(holder.bit)
            assert blocks == holder.blocks, f"{name} holds {blocks} blocks, not {holder.blocks}"
            for bit in filter(None, (holder.bit, holder.lower)):
                assert not bits & bit, f"{name} shares a bit"
                assert self._names[bit.bit_length() - 1] == name, f"{name} has another's bit"
                bits |= bit
        assert self._names.count(None) == len(self._names) - bits.bit_count(), "a bit is lost"

    def _holders(self, keys: Sequence[bytes], position: int) -> int:
        if keys is not self._asked:
            self._asked, self._found = keys, {}
        found = self._found.get(position)
        if found is None:
            found = self._found[position] = self._sets[self._table.get(keys[position])]
        return found

    def _change(self, holder: _Holder, keys: Collection[bytes], *, take: int, give: int) -> None:
        """Takes bits out of the sets of some keys, then puts bits in."""
        if not keys:
            return
        self._asked = ()
        if len(keys) <= FEW:
            for key in keys:
                self._change_one(holder, key, take, give)
            return
        tags, table = tags_of(keys), self._table
        if give:
            while (at := table.claim(tags)) is None:
                self._make_room()
        else:
            at = table.find(tags)
            if not len(at):
                return
        before = table.numbers[at]
        first = int(before[0])
        if (before == first).all():  # as in most messages
            table.set(at, self._move(holder, first, len(at), take, give))
            return
        numbers, counts = np.unique(before, return_counts=True)
        after = np.zeros(int(numbers[-1]) + 1, np.uint32)
        after[numbers] = [
            self._move(holder, number, count, take, give)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        ]
        table.set(at, after[before])

    def _change_one(self, holder: _Holder, key: bytes, take: int, give: int) -> None:
        table = self._table
        at = table.place(key)
        if at < 0:
            if not give:
                return
            while (at := table.claim_one(key)) < 0:
                self._make_room()
        before = table.numbers.item(at)
        after = self._move(holder, before, 1, take, give)
        if after != before:
            table.set_one(at, after)

    def _move(self, holder: _Holder, number: int, blocks: int, take: int, give: int) -> int:
        """The number of a set less some bits and with others, for so many blocks that had it."""
        before = self._sets[number]
        after = before & ~take | give
        holder.blocks += blocks * (bool(after & holder.bit) - bool(before & holder.bit))
        if after == before:
            return number
        return self._sets.move(number, after, blocks)

    def _clear(self, holder: _Holder) -> None:
        self._asked = ()
        self._sets.clear(holder.bit | holder.lower)

    def _make_room(self) -> None:
        if self._sets.dead:
            self._swept = 0
            self.sweep(len(self._table))
        else:
            self._table.grow()

    def _take_bit(self, worker: str) -> int:
        if None in self._names:
            ordinal = self._names.index(None)
            self._names[ordinal] = worker
        else:
            ordinal = len(self._names)
            self._names.append(worker)
        return 1 << ordinal
