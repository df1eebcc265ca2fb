"""Sets of workers, each distinct one with a number, and how many blocks have it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class WorkerSets:
    """Number -> set of workers; number 0 is the empty set, of blocks that are not there.

    A set is an integer of bits. A number that no block has any more is used again for another set.
    When workers are taken out of all sets, numbers may come to mean equal sets, which does no harm,
    or the empty set: these are dead, and their blocks are to be dropped.
    """

    def __init__(self) -> None:
        self._sets = [0]
        self._blocks = [0]
        """That have each number."""
        self._numbers = {0: 0}
        self._free: list[int] = []
        self.used = 0
        """Blocks that have a number, other than 0."""
        self.dead: set[int] = set()
        """Numbers of blocks that nobody holds any more."""

    def __getitem__(self, number: int) -> int:
        return self._sets[number]

    @property
    def dead_blocks(self) -> int:
        """Blocks that nobody holds any more."""
        return sum(self._blocks[number] for number in self.dead)

    def move(self, number: int, workers: int, blocks: int) -> int:
        """So many blocks go from a number to another set; its number. 0 is where none are kept."""
        now = self._numbers.get(workers)
        if now is None:
            now = self._new(workers)
        self.count(now, blocks)
        self.count(number, -blocks)
        return now

    def count(self, number: int, blocks: int) -> None:
        """So many more blocks have a number, or fewer."""
        if not number:
            return
        self.used += blocks
        self._blocks[number] += blocks
        if not self._blocks[number]:
            self._drop(number)

    def clear(self, bits: int) -> None:
        """Takes bits out of all sets."""
        for number, workers in enumerate(self._sets):
            if workers & bits:
                self._unname(number)
                self._sets[number] = rest = workers & ~bits
                if rest:
                    self._numbers.setdefault(rest, number)
                else:
                    self.dead.add(number)

    def are_dead(self, numbers: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which of the numbers are."""
        dead = np.zeros(len(self._sets), np.bool_)
        dead[list(self.dead)] = True
        found: NDArray[np.bool_] = dead[numbers]
        return found

    def holding(self, bit: int) -> int:
        """Blocks whose sets have a bit."""
        pairs: Iterable[tuple[int, int]] = zip(self._sets, self._blocks, strict=True)
        return sum(blocks for workers, blocks in pairs if workers & bit)

    def check_integrity(self, numbers: NDArray[np.uint32]) -> None:
        """Proves the counts right of the numbers of all blocks. Raises AssertionError."""
        counts = np.bincount(numbers, minlength=len(self._sets)).tolist()
        assert counts[1:] == self._blocks[1:], "blocks are miscounted"
        assert self.used == sum(self._blocks), "blocks are miscounted in all"
        idle = {number for number, blocks in enumerate(self._blocks) if number and not blocks}
        assert idle == set(self._free), "a number without blocks is not free"
        for number, workers in enumerate(self._sets):
            if number and number not in idle:
                assert (workers == 0) == (number in self.dead), f"is set {number} dead?"
        for workers, number in self._numbers.items():
            assert self._sets[number] == workers, f"set {number} is found as another"

    def _new(self, workers: int) -> int:
        if self._free:
            number = self._free.pop()
            self._sets[number] = workers
        else:
            number = len(self._sets)
            self._sets.append(workers)
            self._blocks.append(0)
        self._numbers[workers] = number
        return number

    def _drop(self, number: int) -> None:
        self._unname(number)
        self.dead.discard(number)
        self._sets[number] = 0
        self._free.append(number)

    def _unname(self, number: int) -> None:
        if self._numbers.get(self._sets[number]) == number:
            del self._numbers[self._sets[number]]
