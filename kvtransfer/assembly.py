"""Which of a sink's blocks are whole, as blocks of other sizes land from several sources. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.conversion import Window, windows


class Assembly:
    """The sink's blocks that hold the tokens of a range, numbered from the start of the sequence.

    `source_tokens` has the block size of each contribution. A block of the sink is whole once
    every contribution has brought each of its tokens that are in the range.
    """

    def __init__(self, source_tokens: Sequence[int], sink_tokens: int, tokens: range) -> None:
        self.blocks = range(tokens.start // sink_tokens, -(-tokens.stop // sink_tokens))
        """The sink's."""
        self._source_tokens = source_tokens
        self._sink_tokens = sink_tokens
        self._tokens = tokens
        self._wanting = dict.fromkeys(self.blocks, 0)
        self._corrupt: set[int] = set()
        for contribution in range(len(source_tokens)):
            for block in self.source_blocks(contribution):
                for window in self.windows(contribution, block):
                    self._wanting[window.sink_block] += 1

    @property
    def complete(self) -> tuple[bool, ...]:
        """Per block: it is whole."""
        return tuple(not wanting for wanting in self._wanting.values())

    @property
    def corrupt(self) -> int:
        """Blocks that can't become whole, since bytes for them were wrong twice."""
        return len(self._corrupt)

    def source_blocks(self, contribution: int) -> range:
        """Blocks of a source that have tokens of the range."""
        size = self._source_tokens[contribution]
        return range(self._tokens.start // size, -(-self._tokens.stop // size))

    def windows(self, contribution: int, block: int) -> tuple[Window, ...]:
        """Where the tokens of a source's block go."""
        return windows(block, self._source_tokens[contribution], self._sink_tokens, self._tokens)

    def landed(self, contribution: int, block: int) -> list[int]:
        """A source's block is in, once; returns the sink's blocks that are whole by it."""
        whole = []
        for window in self.windows(contribution, block):
            self._wanting[window.sink_block] -= 1
            if not self._wanting[window.sink_block]:
                whole.append(window.sink_block)
        return whole

    def failed(self, contribution: int, block: int) -> None:
        """A source's block was wrong twice."""
        self._corrupt.update(w.sink_block for w in self.windows(contribution, block))
