"""Pieces: ranges of layers of one block, the unit that is announced, read and verified."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """One layer range of one block, final in the source's memory."""

    key_index: int
    """Index into the keys asked for."""
    first_layer: int
    layers: int
    offset: int
    """Bytes from the start of the source's segment data."""
    length: int
    """Bytes."""
    generation: int
    """Grows whenever the block's memory goes to other content."""
    checksum: int
    """XXH3-64 of the bytes."""


@dataclass(frozen=True, slots=True)
class PieceGrid:
    """How one side cuts blocks into pieces: every `per_piece` layers, the last with the rest."""

    layers: int
    per_piece: int

    def __post_init__(self) -> None:
        if self.layers < 1 or self.per_piece < 1:
            raise ValueError("layers and layers per piece are positive")

    @property
    def count(self) -> int:
        """Pieces of a block."""
        return -(-self.layers // self.per_piece)

    @property
    def all(self) -> int:
        """Bit mask of all pieces."""
        return (1 << self.count) - 1

    def span(self, index: int) -> tuple[int, int]:
        """First layer and layers of a piece."""
        first = index * self.per_piece
        return first, min(self.per_piece, self.layers - first)

    def indices(self, first_layer: int, layers: int) -> range:
        """The pieces that a range of layers is. Raises ValueError if it is not whole pieces."""
        end = first_layer + layers
        whole = end == self.layers or end % self.per_piece == 0
        if first_layer % self.per_piece or not whole or not 0 <= first_layer < end <= self.layers:
            raise ValueError(
                f"layers {first_layer}..{end - 1} are not whole pieces of {self.per_piece} layers"
            )
        return range(first_layer // self.per_piece, -(-end // self.per_piece))
