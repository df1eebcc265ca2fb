"""What one fetch has of each block. Pure: no bytes, no waiting."""

from __future__ import annotations

from kvtransfer.errors import TransportError
from kvtransfer.layout import KvLayout
from kvtransfer.pieces import Piece


class Arrivals:
    """Counts the layers of `count` blocks in. A block ends complete, or corrupt, or is wanting."""

    def __init__(self, layout: KvLayout, count: int) -> None:
        self._total_layers, self._layer_bytes = layout.layers, layout.layer_bytes
        self._block_bytes = layout.block_bytes
        self._all = (1 << layout.layers) - 1
        self._claimed = [0] * count
        self._layers = [0] * count
        self._corrupt: set[int] = set()
        self._open = count

    @property
    def done(self) -> bool:
        """Nothing more is wanted."""
        return not self._open

    @property
    def complete(self) -> tuple[bool, ...]:
        """Per block: all layers are in and verified."""
        return tuple(self.is_complete(i) for i in range(len(self._layers)))

    @property
    def corrupt(self) -> int:
        """Blocks given up because their bytes were wrong twice."""
        return len(self._corrupt)

    def is_complete(self, index: int) -> bool:
        """The same for one block."""
        return self._layers[index] == self._all and index not in self._corrupt

    def claim(self, piece: Piece) -> bool:
        """Whether the piece is to be read: not if it was claimed before, or its block is corrupt.

        Raises TransportError if no honest source announces such a piece.
        """
        fits = 0 <= piece.key_index < len(self._layers) and piece.layers > 0
        fits = fits and piece.first_layer + piece.layers <= self._total_layers
        if not fits or piece.length != piece.layers * self._layer_bytes:
            raise _impossible(piece, f"in {piece.length} bytes")
        if piece.offset % self._block_bytes != piece.first_layer * self._layer_bytes:
            raise _impossible(piece, f"at {piece.offset}")
        mask, claimed = _mask(piece), self._claimed[piece.key_index]
        if mask & claimed:
            if mask & ~claimed:
                raise _impossible(piece, "when part of them had been announced")
            return False
        self._claimed[piece.key_index] |= mask
        return piece.key_index not in self._corrupt

    def verified(self, piece: Piece) -> bool:
        """A piece is in place and right; whether its block is complete by it."""
        index = piece.key_index
        if index in self._corrupt or self._layers[index] == self._all:
            return False
        self._layers[index] |= _mask(piece)
        if self._layers[index] != self._all:
            return False
        self._open -= 1
        return True

    def failed(self, piece: Piece) -> None:
        """A piece was wrong twice: its block is given up."""
        index = piece.key_index
        if index not in self._corrupt and self._layers[index] != self._all:
            self._corrupt.add(index)
            self._open -= 1


def _impossible(piece: Piece, how: str) -> TransportError:
    return TransportError(
        f"the source announced layers {piece.first_layer}+{piece.layers} of block "
        f"{piece.key_index} {how}, which can't be"
    )


def _mask(piece: Piece) -> int:
    return ((1 << piece.layers) - 1) << piece.first_layer
