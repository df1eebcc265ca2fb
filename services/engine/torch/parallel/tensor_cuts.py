"""Who computes which columns of a layer under tensor parallelism. Pure.

Every linear layer is cut by its outputs, attention by its heads; no sum is ever split, so an
element is the one chain of operations that it is in one process. Edges lie where the kernels'
vectors do: elsewhere a slice would be computed by another kernel than the whole layer, and rounded
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from services.engine.torch.shapes import GroupedHeads, GroupedShape, Module
from services.runtime.load import SettingsError

VECTOR = 16
"""Columns that kernels write at once."""
BLOCK = 64
"""Columns that they compute at once: where there are enough of these they stay whole."""
BLOCKS_EACH = 4

Edges = tuple[int, ...]
"""Rank r has columns edges[r] to edges[r + 1]."""


def even(total: int, parts: int) -> Edges:
    """As even as whole numbers allow."""
    return tuple(part * total // parts for part in range(parts + 1))


def widths(edges: Edges) -> tuple[int, ...]:
    """How many columns each rank has."""
    return tuple(b - a for a, b in pairwise(edges))


@dataclass(frozen=True, slots=True)
class Cuts:
    """Of one of several ranks that share every layer; one that is alone has all of it."""

    rank: int = 0
    ranks: int = 1

    def edges(self, what: str, total: int) -> Edges:
        """Of a layer of `total` outputs. Raises SettingsError if they are too few."""
        if self.ranks == 1:
            return (0, total)
        unit = BLOCK if total >= BLOCK * BLOCKS_EACH * self.ranks else VECTOR
        if total // unit < self.ranks:
            raise SettingsError(
                f"engine.tensor_parallel: {self.ranks} processes can't share {what}, which is "
                f"{total} wide; expected at most {max(1, total // VECTOR)}"
            )
        edges = [unit * edge for edge in even(total // unit, self.ranks)]
        return (*edges[:-1], total)

    def here(self, edges: Edges) -> range:
        """Columns of this rank."""
        return range(edges[self.rank], edges[self.rank + 1])

    def within(self, parts: Mapping[str, int], columns: range) -> tuple[Module, ...]:
        """Of modules side by side, by name and outputs: what of each lies within `columns`."""
        found, start = [], 0
        for name, outputs in parts.items():
            first = min(max(columns.start - start, 0), outputs)
            end = min(max(columns.stop - start, first), outputs)
            found.append(Module(name, outputs, range(first, end)))
            start += outputs
        return tuple(found)

    def heads(self, heads: int) -> Edges:
        """Of heads that all look at the same keys. Raises SettingsError if they are too few."""
        if heads < self.ranks:
            raise self._too_few(heads)
        return even(heads, self.ranks)

    def grouped(self, shape: GroupedShape) -> tuple[GroupedHeads, ...]:
        """By rank: whole groups of query heads, or with more ranks than groups a part of one.

        Raises SettingsError if there are too few.
        """
        kv_heads, ranks, group = shape.kv_heads, self.ranks, shape.group
        if ranks <= kv_heads:
            edges = even(kv_heads, ranks)
            return tuple(GroupedHeads(a * group, a, b - a, group) for a, b in pairwise(edges))
        found = []
        sharers = even(ranks, kv_heads)
        for head, count in enumerate(widths(sharers)):
            if count > group:
                raise self._too_few(shape.heads)
            edges = even(group, count)
            found += [GroupedHeads(head * group + a, head, 1, b - a) for a, b in pairwise(edges)]
        return tuple(found)

    def _too_few(self, heads: int) -> SettingsError:
        return SettingsError(
            f"engine.tensor_parallel: {self.ranks} processes can't share {heads} heads"
        )


WHOLE = Cuts()
