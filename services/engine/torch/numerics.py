"""Batch invariance of linear layers: found out at start, on the machine and weights at hand.

A row of a matrix product should not depend on how many rows are computed with it. Libraries do
not promise that: they may choose another kernel for few rows. So every weight shape is probed at
every row count that steps will have (few, by `row_grid`), rows at different places, against one
reference; the cheapest rule that makes a shape's probes equal is used for it: none, a least number
of rows, rows in multiples, and at worst tiles of one fixed size. If none does, that is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from services.engine.models.errors import NotInvariantError
from services.engine.torch.proven import Proven


class Rows(Protocol):
    """A linear layer. More than most_rows rows are computed in parts."""

    @property
    def inputs(self) -> int:
        """Width of a row."""

    @property
    def outputs(self) -> int:
        """Width of a row's result."""

    @property
    def most_rows(self) -> int:
        """Rows at once, at most: so many are probed."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer of x [rows, inputs]: [rows, outputs]."""


# Row counts up to this are probed with the rows at a second place too.
FEW = 64


@dataclass(frozen=True, slots=True)
class RowRule:
    """How rows are filled up before linear layers: to `least`, to a multiple, or in tiles."""

    least: int = 1
    multiple: int = 1
    tile: int = 0

    def rows(self, count: int) -> int:
        """Rows to compute for `count` of them."""
        if self.tile:
            return -(-count // self.tile) * self.tile
        count = max(self.least, row_grid(count))
        return -(-count // self.multiple) * self.multiple


# From the cheapest on.
RULES = (
    RowRule(),
    RowRule(least=2),
    RowRule(least=4),
    RowRule(least=8),
    RowRule(least=4, multiple=4),
    RowRule(least=8, multiple=8),
    RowRule(least=16, multiple=16),
    RowRule(least=32, multiple=32),
    RowRule(tile=32),
)


def row_grid(count: int) -> int:
    """The next row count of few: a new one costs oneDNN a millisecond a shape, and memory."""
    if count <= 16:
        return count
    step = 4 if count <= 64 else 16
    return -(-count // step) * step


def probe_counts(most: int) -> list[int]:
    """Row counts that a step of up to `most` rows may have."""
    return sorted({row_grid(count) for count in range(1, most + 1)})


class Rules:
    """The rule of every shape of linear layer; shapes that are not there have none."""

    def __init__(self, rules: Mapping[tuple[int, int], RowRule]) -> None:
        self._rules = rules

    def room(self, count: int) -> int:
        """Rows that buffers must have for `count` of them."""
        return max((r.rows(count) for r in self._rules.values()), default=RowRule().rows(count))

    def apply(self, linear: Rows, buffer: torch.Tensor, count: int) -> torch.Tensor:
        """The layer of the first `count` rows, and of as many more as the rule asks for.

        No more rows at once than were probed. What splitting leaves over is a count that was
        probed, too: beyond 64 they rise in sixteens.
        """
        rule = self._rules.get((linear.inputs, linear.outputs), RowRule())
        rows = rule.rows(count)
        most = rule.tile or linear.most_rows
        if rows <= most:
            return linear(buffer[:rows])
        return torch.cat([linear(part) for part in torch.split(buffer[:rows], most)])

    def __str__(self) -> str:
        return ", ".join(f"{i}x{o}: {rule}" for (i, o), rule in self._rules.items())


def probe_input(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers everywhere: no generator of torch's, whose streams may change."""
    random = np.random.Generator(np.random.PCG64(width))
    return torch.from_numpy(random.standard_normal((rows, width), np.float32)).to(dtype)


def choose_rules(
    linears: Iterable[Rows], dtype: torch.dtype, proven: Proven | None = None
) -> Rules:
    """Makes layers of these shapes invariant. Raises NotInvariantError.

    proven: what probes have found here before; what is not in it is probed, and put there.
    """
    rules: dict[tuple[int, int], RowRule] = {}
    found: dict[str, tuple[int, ...]] = {}
    for linear in linears:
        name = f"{linear.inputs}x{linear.outputs}, {linear.most_rows} rows"
        kept = proven.get(name, 3) if proven is not None else None
        rule = None if kept is None else RowRule(*kept)
        if rule not in RULES:
            rule = choose_rule(linear, dtype)
            found[name] = (rule.least, rule.multiple, rule.tile)
        rules[linear.inputs, linear.outputs] = rule
    if proven is not None:
        proven.put(found)
    return Rules(rules)


def prove_slice(
    linear: Rows, whole: Rows, columns: Iterable[range], dtype: torch.dtype, proven: Proven | None
) -> None:
    """Some columns of a layer have the bits that the whole has there. Raises NotInvariantError.

    As each of the two is invariant, or fails to be loaded, one row count speaks for all.
    """
    parts = ", ".join(f"{c.start}-{c.stop}" for c in columns)
    name = f"{linear.inputs}x{whole.outputs}, {linear.most_rows} rows, columns {parts}"
    if proven is not None and proven.get(name, 1) == (1,):
        return
    x = probe_input(linear.most_rows, linear.inputs, dtype)
    found, expected = (
        choose_rules([one], dtype, proven).apply(one, x, len(x)) for one in (linear, whole)
    )
    here = torch.cat([expected[:, c.start : c.stop] for c in columns], dim=1)
    if not torch.equal(found, here):
        raise NotInvariantError(
            f"linear layers of shape {linear.inputs}x{whole.outputs} have other bits when some of "
            "their columns are computed alone, with this torch on this machine; set "
            "engine.tensor_parallel=1 or engine.batch_invariant=false"
        )
    if proven is not None:
        proven.put({name: (1,)})


def choose_rule(linear: Rows, dtype: torch.dtype) -> RowRule:
    """The cheapest rule under which a layer is invariant. Raises NotInvariantError."""
    x = probe_input(linear.most_rows, linear.inputs, dtype)
    reference = linear(x)
    for rule in RULES:
        if _holds(linear, x, reference, rule):
            return rule
    raise NotInvariantError(
        f"linear layers of shape {linear.inputs}x{linear.outputs} depend on a row's place in the "
        "batch, with this torch on this machine; set engine.batch_invariant=false"
    )


def _holds(linear: Rows, x: torch.Tensor, reference: torch.Tensor, rule: RowRule) -> bool:
    if rule.tile:
        # Of one size, so only the place in the tile can matter.
        first, shifted = linear(x[: rule.tile]), linear(x[1 : rule.tile + 1])
        return torch.equal(first[1:], shifted[:-1])
    return all(
        torch.equal(linear(x[start : start + count]), reference[start : start + count])
        for count, start in _places(len(x), rule)
    )


def _places(total: int, rule: RowRule) -> Iterator[tuple[int, int]]:
    """Row counts that the rule leads to, at the first rows; few ones at others too."""
    counts = {rule.rows(count) for count in probe_counts(total)}
    for count in sorted(c for c in counts if c <= total):
        yield count, 0
        if count <= FEW and count < total:
            yield count, (total - count) // 2 + 1


def digest(arrays: Sequence[np.ndarray]) -> str:
    """32 hexadecimal digits over the arrays' bytes."""
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
