"""The blocks that a step fills: when their pieces may be read, and when they enter the cache."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from kvtransfer.store import KvStore
from services.engine.stepped.scheduler import Work
from services.engine.stepped.sequence import Role, Sequence


class Filling:
    """Of one step. Call begin(), layers_done() as the model goes, finish(); all may raise.

    Blocks that known tokens fill are told of layer by layer, and so are the incomplete last ones of
    prompts. What a draft layer writes is final later; and which blocks drafts have filled is known
    only when they were accepted. Nothing is told of any other block.
    """

    def __init__(self, store: KvStore, works: Seq[Work], layers: int) -> None:
        """`layers`: of the layout, from the first, those that the model's forward() writes."""
        self._store = store
        self._works = works
        self._layers = layers
        self._told = 0
        self._full: list[int] = []
        self._tails: list[int] = []

    def begin(self) -> None:
        """Before the step is computed."""
        size = self._store.layout.block_tokens
        for work in self._works:
            sequence = work.sequence
            for i in range(work.start // size, work.end // size):
                self._full.append(self._begun(sequence, i, sequence.chain.keys[i]))
            if _ends_prompt(work) and work.end % size:  # its last block is an incomplete one
                last = work.end // size
                self._tails.append(self._begun(sequence, last, sequence.context_keys[last]))

    @property
    def any(self) -> bool:
        """Whether layers_done() has anything to tell."""
        return bool(self._full or self._tails)

    def layers_done(self, first: int, layers: int) -> None:
        """As stepped.batch.AfterLayers."""
        end, piece = first + layers, self._store.layers_per_piece
        if end == self._layers < self._store.layout.layers:
            end -= end % piece  # the rest of that piece is the draft layer's
        if end > self._told:
            self._tell(end)

    def finish(self) -> None:
        """All KV of the step is final; sequences' `computed` says which drafts were right."""
        store = self._store
        if self._told < store.layout.layers:
            self._tell(store.layout.layers)
        for block in self._full:
            store.commit(block)
        size = store.layout.block_tokens
        for work in self._works:
            sequence = work.sequence
            for i in range(work.end // size, sequence.computed // size):
                store.seal(sequence.blocks[i], sequence.chain.keys[i], sequence.request.tenant)
            if _ends_prompt(work):
                store.lease_complete(sequence.request.request_id)

    def _tell(self, end: int) -> None:
        for block in self._full + self._tails:
            self._store.piece_done(block, self._told, end - self._told)
        self._told = end

    def _begun(self, sequence: Sequence, index: int, key: bytes) -> int:
        block = sequence.blocks[index]
        self._store.begin(block, key, sequence.request.tenant)
        return block


def _ends_prompt(work: Work) -> bool:
    sequence = work.sequence
    return sequence.role is Role.PREFILL and work.end == sequence.context
