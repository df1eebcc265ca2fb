"""Which workers hold which KV blocks.

A block's key is a hash over all tokens up to its end, so a worker that holds key i of a prompt
holds keys 0..i-1 too (workers evict a prefix's last blocks first). How deep the holders of a prefix
reach is therefore found by bisection over the prompt's keys, for many workers at once, instead of a
walk along them. A worker that breaks the rule is at worst taken to hold more than it does; it finds
out for itself, since it looks the prompt up again.

Sets of workers are integers with one bit a worker. Equal sets of several workers are one object,
so a block costs one dict entry here and one set entry for each holder (docs/coordinator.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

# Distinct worker sets kept for sharing; beyond, sharing starts over, which costs memory only.
_SHARED_SETS = 1 << 16


class PrefixIndex:
    """Block key -> holders. Workers are added before anything is told of them."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._held: dict[str, set[bytes]] = {}
        self._bits: dict[str, int] = {}
        self._names: list[str | None] = []
        self._shared: dict[int, int] = {}

    def __len__(self) -> int:
        """Distinct blocks known."""
        return len(self._holders)

    def add(self, worker: str) -> int:
        """Makes room for a worker that holds nothing yet; its bit in sets of workers."""
        if worker in self._bits:
            return self._bits[worker]
        if None in self._names:
            ordinal = self._names.index(None)
            self._names[ordinal] = worker
        else:
            ordinal = len(self._names)
            self._names.append(worker)
        self._bits[worker] = 1 << ordinal
        self._held[worker] = set()
        return self._bits[worker]

    def store(self, worker: str, keys: Iterable[bytes]) -> None:
        """The worker holds these now. Known ones are ignored."""
        bit, held, holders = self._bits[worker], self._held[worker], self._holders
        for key in keys:
            if key in held:
                continue
            held.add(key)
            others = holders.get(key)
            holders[key] = bit if others is None else self._share(others | bit)

    def remove(self, worker: str, keys: Iterable[bytes]) -> None:
        """The worker no longer holds these. Unknown ones are ignored."""
        held = self._held[worker]
        for key in keys:
            if key in held:
                held.remove(key)
                self._unhold(key, self._bits[worker])

    def replace(self, worker: str, keys: Iterable[bytes]) -> None:
        """These are all that the worker holds."""
        now = set(keys)
        self.remove(worker, self._held[worker] - now)
        self.store(worker, now)

    def forget(self, worker: str) -> None:
        """The worker is gone. Unknown: ignored."""
        if worker not in self._bits:
            return
        bit = self._bits.pop(worker)
        for key in self._held.pop(worker):
            self._unhold(key, bit)
        self._names[bit.bit_length() - 1] = None

    def known_blocks(self, worker: str) -> int:
        """Keys known to be held by the worker."""
        return len(self._held.get(worker, ()))

    def reach(self, keys: Sequence[bytes], workers: int) -> Iterator[tuple[int, int]]:
        """How many leading keys each worker of a set holds: (keys, set of workers), most first.

        Every worker of the set comes up once, those that hold none last. Costs about
        log2(len(keys)) dict lookups for each distinct answer that is asked for.
        """
        # All of `some` hold the first `low` keys, none holds more than `high`.
        pending = [(0, len(keys), workers)]
        while pending:
            low, high, some = pending.pop()
            while low < high:
                # The first key decides for most of a fleet, so it is asked first.
                middle = (low + high + 1) // 2 if low else 1
                deeper = some & self._holders.get(keys[middle - 1], 0)
                if not deeper:
                    high = middle - 1
                elif deeper == some:
                    low = middle
                else:
                    pending.append((low, middle - 1, some & ~deeper))
                    low, some = middle, deeper
            if some:
                yield low, some

    def names(self, workers: int) -> Iterator[str]:
        """The workers of a set."""
        while workers:
            lowest = workers & -workers
            name = self._names[lowest.bit_length() - 1]
            if name is not None:
                yield name
            workers ^= lowest

    def check_integrity(self) -> None:
        """Both directions of the index say the same; raises AssertionError."""
        holders: dict[bytes, int] = {}
        for worker, held in self._held.items():
            for key in held:
                holders[key] = holders.get(key, 0) | self._bits[worker]
        assert holders == self._holders, "holders differ from what workers hold"
        assert len({*self._bits.values()}) == len(self._bits), "two workers share a bit"

    def _unhold(self, key: bytes, bit: int) -> None:
        rest = self._holders[key] & ~bit
        if rest:
            self._holders[key] = self._share(rest)
        else:
            del self._holders[key]

    def _share(self, workers: int) -> int:
        if len(self._shared) >= _SHARED_SETS:
            self._shared.clear()
        return self._shared.setdefault(workers, workers)
