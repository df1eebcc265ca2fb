"""Which blocks the tiers have, and which of the pool's should go there next. Books only.

The pool evicts from the cold end of its cached blocks, and its owner can't wait for a copy then.
So blocks are copied ahead of need: of the next `ahead` blocks that allocate() could give, each is
free or in the top tier already, or will be as soon as the copying comes to it. Coldest first; and
where so much is held that fewer than `ahead` are available, held blocks too, oldest first, since
those are taken again as soon as they are let go.

`ahead` is bounded by what the tiers hold: what is in both pool and tier is in the tier for nothing.

Of the keys that only a tier has the latest are announced, those that left the pool last: a disk may
have more keys than a coordinator can keep of every worker.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping

TOP = 0


class SpillBooks:
    """Follows a BlockPool as its watcher. Not thread-safe; the store serializes.

    A committed block that the top tier lacks waits in `_cold` or `_held`. One that could not be
    copied, or that the tier drops, waits no more until the pool touches it again: so there is
    no chasing round in a tier that is too small. `_window` is what of the cold end has been copied:
    each of these is colder than all of `_cold`. `_saved` is what of the held blocks is in the tier.
    """

    def __init__(self, ahead: int, announced: int) -> None:
        if ahead < 1:
            raise ValueError("at least one block is kept ahead")
        self.ahead = ahead
        self._most_announced = announced
        self.lost = 0
        """Blocks evicted from the pool that no tier had."""
        self._levels: dict[bytes, int] = {}
        self._announced: OrderedDict[bytes, None] = OrderedDict()
        self._unannounced: list[bytes] = []
        self._cold: OrderedDict[int, bytes] = OrderedDict()
        self._held: dict[int, bytes] = {}
        self._window: set[int] = set()
        self._saved: set[int] = set()
        self._copying: int | None = None

    def __contains__(self, key: bytes) -> bool:
        """Whether a tier has it."""
        return key in self._levels

    def keys(self) -> Iterable[bytes]:
        """All that a tier has."""
        return self._levels.keys()

    @property
    def announced(self) -> Collection[bytes]:
        """Those that only a tier has and that are announced, the latest last."""
        return self._announced.keys()

    def take_unannounced(self) -> list[bytes]:
        """Keys that later ones have pushed out of `announced` since the last call."""
        keys, self._unannounced = self._unannounced, []
        return keys

    # What the pool tells

    def committed(self, block: int, key: bytes) -> None:
        """A held block entered the index."""
        self._announced.pop(key, None)
        self._place_held(block, key)

    def cached(self, block: int, key: bytes) -> None:
        """The last reference on it is gone."""
        self._take_out(block)
        if not self._is_saved(key):
            self._cold[block] = key

    def taken(self, block: int, key: bytes) -> None:
        """A cached block is referenced again."""
        self._take_out(block)
        self._place_held(block, key)

    def left(self, block: int, key: bytes) -> None:
        """It left the index: its memory goes to other content."""
        self._take_out(block)
        if key in self._levels:
            self._announce(key)
        else:
            self.lost += 1

    # What the copying asks and tells

    def next(self, free: int, available: int) -> int | None:
        """The block to copy next, by the pool's counts, or None if enough is ahead."""
        block = None
        if self._cold and free + len(self._window) < self.ahead:
            block = next(iter(self._cold))
            del self._cold[block]
        elif self._held and available + len(self._saved) < self.ahead:
            block = next(iter(self._held))
            del self._held[block]
        self._copying = block
        return block

    def set_levels(
        self, levels: Mapping[bytes, int | None], blocks: Mapping[bytes, tuple[int, bool]]
    ) -> None:
        """Where keys are now: the highest tier that has each, or none.

        `blocks` has those of them that the pool has: the block, and whether it is held.
        """
        for key, level in levels.items():
            if level is None:
                self._levels.pop(key, None)
                self._announced.pop(key, None)
            else:
                new = key not in self._levels
                self._levels[key] = level
                if new and key not in blocks:
                    self._announce(key)
            if key in blocks:
                self._recount(*blocks[key], saved=level == TOP)

    def check(self, committed: Mapping[int, tuple[bytes, bool]]) -> None:
        """Proves the books right of the pool's committed blocks: key, and whether held."""
        assert len(self._announced) <= self._most_announced, "too much is announced"
        assert self._announced.keys() <= self._levels.keys(), "what no tier has is announced"
        for block, (key, held) in committed.items():
            assert key not in self._announced, f"the key of block {block} is not only in a tier"
            assert not held or block not in self._cold, f"held block {block} is among the cold"
            assert held or block not in self._held, f"cached block {block} is among the held"
            waits = self._held if held else self._cold
            assert waits.get(block, key) == key, f"block {block} waits under another key"
        for block in (*self._cold, *self._held, *self._window, *self._saved):
            assert block in committed, f"block {block} is not committed but in the tiers' books"
        for block in (*self._window, *self._saved):
            key, held = committed[block]
            assert self._is_saved(key), f"block {block} counts as saved and is not"
            assert held == (block in self._saved), f"block {block} is counted in the wrong place"
        assert not self._window & self._cold.keys(), "a block is saved and waits"

    def _announce(self, key: bytes) -> None:
        self._announced[key] = None
        self._announced.move_to_end(key)
        if len(self._announced) > self._most_announced:
            self._unannounced.append(self._announced.popitem(last=False)[0])

    def _place_held(self, block: int, key: bytes) -> None:
        if self._is_saved(key):
            self._saved.add(block)
        else:
            self._held[block] = key

    def _recount(self, block: int, held: bool, *, saved: bool) -> None:
        copied = self._copying == block
        if copied:
            self._copying = None
        if not saved:
            self._window.discard(block)
            self._saved.discard(block)
            return
        self._cold.pop(block, None)
        self._held.pop(block, None)
        if held:
            self._saved.add(block)
        elif copied:  # and not touched meanwhile: it is still at the cold end
            self._window.add(block)

    def _take_out(self, block: int) -> None:
        self._cold.pop(block, None)
        self._held.pop(block, None)
        self._window.discard(block)
        self._saved.discard(block)
        if self._copying == block:
            self._copying = None

    def _is_saved(self, key: bytes) -> bool:
        return self._levels.get(key) == TOP
