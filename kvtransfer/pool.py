"""The books of a block pool: who may use which block, and what it holds. No bytes here.

A block is in exactly one of three states:

    free     nothing in it is worth keeping          allocate -> held
    held     referenced at least once                release of the last reference -> cached if
                                                     committed, else free
    cached   committed, not referenced               match -> held; evicted by allocate -> held

A held block gets a key by `begin`, and enters the prefix index by `commit`; then its content does
not change until its generation does. The least recently used cached block is evicted first; of one
sequence the last block goes before the first, because a prefix without its start is worth nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvtransfer.errors import OutOfBlocksError


class PoolWatcher(Protocol):
    """Told of what becomes of committed blocks, as it happens."""

    def committed(self, block: int, key: bytes) -> None:
        """A held block entered the index."""

    def cached(self, block: int, key: bytes) -> None:
        """Held became cached: now the most recently used."""

    def taken(self, block: int, key: bytes) -> None:
        """Cached became held."""

    def left(self, block: int, key: bytes) -> None:
        """It left the index."""


class BlockPool:
    """Blocks 0..blocks-1. Not thread-safe; its owner serializes."""

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self.watcher: PoolWatcher | None = None
        self.evicted = 0
        """Cached blocks evicted so far."""
        # A stack: what was used last is warm, and memory never needed is never touched.
        self._free = list(range(blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * blocks
        self._generations = [0] * blocks
        self._keys: list[bytes | None] = [None] * blocks
        self._index: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks with nothing in them."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Committed blocks that nothing references."""
        return len(self._cached)

    @property
    def held(self) -> int:
        """Referenced blocks."""
        return self.total - self.free - self.cached

    @property
    def available(self) -> int:
        """Blocks that allocate() can give."""
        return self.free + self.cached

    def references(self, block: int) -> int:
        """How often a block is referenced."""
        return self._references[block]

    def generation(self, block: int) -> int:
        """Grows whenever the block's memory goes to other content."""
        return self._generations[block]

    def key(self, block: int) -> bytes | None:
        """What the block holds or is going to hold."""
        return self._keys[block]

    def find(self, key: bytes) -> int | None:
        """The committed block of a key. Takes no reference."""
        return self._index.get(key)

    def committed(self, block: int) -> bool:
        """Whether the block is the one the index has for its key."""
        key = self._keys[block]
        return key is not None and self._index.get(key) == block

    def keys(self) -> list[bytes]:
        """Every committed key."""
        return list(self._index)

    def committed_blocks(self) -> dict[int, tuple[bytes, bool]]:
        """Every committed block: its key, and whether it is held."""
        return {b: (key, self._references[b] > 0) for key, b in self._index.items()}

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest committed prefix of `keys`, one reference taken on each."""
        found = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            self._reference(block)
            found.append(block)
        return found

    def allocate(self, count: int) -> tuple[list[int], list[bytes]]:
        """`count` blocks with one reference each, and the keys evicted to have them.

        All or nothing: raises OutOfBlocksError and changes nothing.
        """
        if count > self.available:
            raise OutOfBlocksError(count, self.available)
        fresh = min(count, len(self._free))
        blocks = [self._free.pop() for _ in range(fresh)]
        removed = []
        for _ in range(count - fresh):
            block, _none = self._cached.popitem(last=False)
            removed.append(self._unindex(block))
            blocks.append(block)
        self.evicted += len(removed)
        for block in blocks:
            self._references[block] = 1
            self._generations[block] += 1
            self._keys[block] = None
        return blocks, removed

    def retain(self, blocks: Sequence[int]) -> None:
        """One more reference on each of some held blocks. Raises ValueError, changing nothing."""
        self._require_held(blocks)
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> int:
        """One reference less on each; returns how many blocks became available by it.

        Raises ValueError, changing nothing, if one of them is not held (that often).
        """
        self._require_held(blocks)
        available = self.available
        for at, block in enumerate(reversed(blocks)):
            if not self._references[block]:
                self._undo_release(blocks[len(blocks) - at :])
                raise ValueError(f"block {block} is released more often than it is referenced")
            self._references[block] -= 1
        for block in dict.fromkeys(reversed(blocks)):
            if not self._references[block]:
                self._retire(block)
        return self.available - available

    def begin(self, block: int, key: bytes) -> bytes | None:
        """The block is going to hold `key`; returns the key that leaves the index by it, if any.

        Content that others may rely on stays as it is if the key is the same.
        Raises ValueError if the block is not held, or has another key and is in use by others.
        """
        self._require_held([block])
        same = self._keys[block] == key
        if same and (self.committed(block) or self._references[block] > 1):
            return None
        removed = None
        if self._keys[block] is not None:
            if self._references[block] > 1:
                raise ValueError(f"block {block} is shared; its content can't change")
            if self.committed(block):
                removed = self._unindex(block)
            self._generations[block] += 1
        self._keys[block] = key
        return removed

    def commit(self, block: int) -> bool:
        """Enters the block in the index; False if another block has its key, or it is in already.

        Raises ValueError if the block is not held or has no key.
        """
        self._require_held([block])
        key = self._keys[block]
        if key is None:
            raise ValueError(f"block {block} has no key")
        if key in self._index:
            return False
        self._index[key] = block
        if self.watcher is not None:
            self.watcher.committed(block, key)
        return True

    def check_integrity(self) -> None:
        """Proves that free + cached + held = total and the index is right; AssertionError."""
        free, cached = set(self._free), set(self._cached)
        held = {b for b, n in enumerate(self._references) if n}
        assert min(self._references, default=0) >= 0, "negative references"
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, f"both free and cached: {free & cached}"
        assert not free & held, f"both free and held: {free & held}"
        assert not cached & held, f"both cached and held: {cached & held}"
        assert len(free) + len(cached) + len(held) == self.total, (
            f"{len(free)} free + {len(cached)} cached + {len(held)} held != {self.total}"
        )
        for key, block in self._index.items():
            assert self._keys[block] == key, f"the index has block {block} under another key"
            assert block not in free, f"block {block} is free and in the index"
        assert all(self.committed(b) for b in cached), "a cached block is not in the index"

    def _reference(self, block: int) -> None:
        if not self._references[block]:
            del self._cached[block]
            if self.watcher is not None:
                self.watcher.taken(block, self._key(block))
        self._references[block] += 1

    def _undo_release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._references[block] += 1

    def _retire(self, block: int) -> None:
        if self.committed(block):
            self._cached[block] = None
            if self.watcher is not None:
                self.watcher.cached(block, self._key(block))
        else:
            self._keys[block] = None
            self._free.append(block)

    def _unindex(self, block: int) -> bytes:
        key = self._key(block)
        del self._index[key]
        if self.watcher is not None:
            self.watcher.left(block, key)
        return key

    def _key(self, block: int) -> bytes:
        key = self._keys[block]
        assert key is not None
        return key

    def _require_held(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if not 0 <= block < self.total or not self._references[block]:
                raise ValueError(f"block {block} is not held")
