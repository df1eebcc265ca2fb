"""How KV of one layout becomes KV of another: which values of which shard go where. Pure.

Source and sink may differ in the dtype of components, in the tokens a block has, in the order of a
layer's bytes, and in the tensor-parallel shard. What goes from each source shard is a list of
steps, one a component: heads of it, in a layer, with a codec between (codecs.py, which says what
each one loses; same dtype and scales lose nothing). Tokens are dealt by windows(): the part of a
source's block that lies in one of the sink's. Any two block sizes fit.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer.codecs import NUMPY_DTYPES, Stored, recode
from kvtransfer.errors import LayoutMismatchError
from kvtransfer.layout import DTYPE_BYTES, SCALE, Component, KvLayout


@dataclass(frozen=True, slots=True)
class Place:
    """Values of some heads in every layer: an array [layers, tokens, heads, width] in a block."""

    dtype: str
    start: int
    """Bytes from the start of a layer to the first of them; strides are in bytes too."""
    layer: int
    token: int
    head: int
    heads: int
    width: int

    def array(
        self, memory: NDArray[np.uint8], layers: int, first_token: int, tokens: int
    ) -> NDArray[Any]:
        """The values of some tokens, in memory that starts with a layer."""
        return np.ndarray(
            (layers, tokens, self.heads, self.width),
            NUMPY_DTYPES[self.dtype],
            memory,
            self.start + first_token * self.token,
            (self.layer, self.token, self.head, DTYPE_BYTES[self.dtype]),
        )


@dataclass(frozen=True, slots=True)
class Values:
    """A component's place on one side, and that of its scales if it has some."""

    values: Place
    scales: Place | None

    def stored(
        self, memory: NDArray[np.uint8], layers: int, first_token: int, tokens: int
    ) -> Stored:
        """As Place.array."""
        span = layers, first_token, tokens
        scales = None if self.scales is None else self.scales.array(memory, *span)
        return Stored(self.values.array(memory, *span), scales)


@dataclass(frozen=True, slots=True)
class Step:
    """Heads of one component, from a source to the sink."""

    source: Values
    sink: Values


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one source gives."""

    source: int
    """Index into the sources."""
    layout: KvLayout
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Conversion:
    """How a sink's blocks are made of those of the sources that are needed for it."""

    sink: KvLayout
    contributions: tuple[Contribution, ...]
    exact: bool
    """Every value arrives as it was: nothing is rounded."""

    @property
    def identical(self) -> bool:
        """One source has the very layout of the sink: there is nothing to convert."""
        return [c.layout for c in self.contributions] == [self.sink]


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens of one source block that lie in one of the sink's."""

    sink_block: int
    """Counted from the start of the sequence, as source blocks are."""
    source_token: int
    """First of them in the source's block."""
    sink_token: int
    """First of them in the sink's block."""
    tokens: int


def plan(sources: Sequence[KvLayout], sink: KvLayout) -> Conversion:
    """How to make the sink's blocks from these sources, one or more shards of the same model.

    Not every source need be used: where several hold a head, one gives it, chosen so that the
    shards of a sink spread over them. Raises LayoutMismatchError that names the field if a source
    can't be converted, or if no source has a head that the sink needs.
    """
    for source in sources:
        _check(source, sink)
    given: dict[int, list[tuple[str, range]]] = {}
    for component in _values(sink):
        for giver, heads in _givers(sources, sink, component.name, given):
            given.setdefault(giver, []).append((component.name, heads))
    contributions = [
        Contribution(i, sources[i], tuple(_step(sources[i], sink, n, heads) for n, heads in runs))
        for i, runs in sorted(given.items())
    ]
    exact = all(_lossless(step) for c in contributions for step in c.steps)
    return Conversion(sink, tuple(contributions), exact)


def windows(block: int, source_tokens: int, sink_tokens: int, tokens: range) -> tuple[Window, ...]:
    """Where the tokens of a source's block go, as far as they are among `tokens`.

    Blocks have source_tokens and sink_tokens each; both sides count them from token 0.
    """
    start = max(block * source_tokens, tokens.start)
    end = min((block + 1) * source_tokens, tokens.stop)
    found = []
    while start < end:
        into, at = divmod(start, sink_tokens)
        count = min(end - start, sink_tokens - at)
        found.append(Window(into, start - block * source_tokens, at, count))
        start += count
    return tuple(found)


def convert(
    contribution: Contribution,
    piece: NDArray[np.uint8],
    into: NDArray[np.uint8],
    window: Window,
) -> None:
    """Carries a contribution out on bytes, of whole layers. The interpreter's lock is not held.

    `piece` is a range of layers of a source's block, `into` the sink's block from the first of
    them on; both contiguous.
    """
    layers, tokens = len(piece) // contribution.layout.layer_bytes, window.tokens
    for step in contribution.steps:
        recode(
            step.source.stored(piece, layers, window.source_token, tokens),
            step.sink.stored(into, layers, window.sink_token, tokens),
        )


def _check(source: KvLayout, sink: KvLayout) -> None:
    """Raises LayoutMismatchError unless one can be converted into the other."""
    fields = source.fields(), sink.fields()
    fixed = [{n: f[n] for n in ("model", "layers")} for f in fields]
    if fixed[0] != fixed[1]:
        raise LayoutMismatchError.between(*fixed)
    one, other = ({c.name: c for c in _values(layout)} for layout in (source, sink))
    if one.keys() != other.keys() or not all(_fits(one[name], other[name]) for name in one):
        raise LayoutMismatchError.between(*({"components": f["components"]} for f in fields))


def _fits(one: Component, other: Component) -> bool:
    if (one.width, one.total_heads) != (other.width, other.total_heads):
        return False
    # Under a fixed scale there is no bound on what is lost.
    fixed = one.scale is not None or other.scale is not None
    return not fixed or (one.dtype, one.scale) == (other.dtype, other.scale)


def _givers(
    sources: Sequence[KvLayout], sink: KvLayout, name: str, used: Container[int]
) -> list[tuple[int, range]]:
    """Which source gives which heads of a component to the sink; sources in use first."""
    runs: list[tuple[int, range]] = []
    for head in _heads(sink, name):
        holders = [i for i, s in enumerate(sources) if head in _heads(s, name)]
        if not holders:
            have = ", ".join(f"{s.shard} of {s.shards}" for s in sources) or "none"
            need = f"{sink.shard} of {sink.shards}"
            raise LayoutMismatchError(
                f"KV layouts differ: head {head} of {name}, which shard {need} at the sink needs, "
                f"is at none of the sources, shards {have}",
                field="shard",
                source=have,
                sink=need,
            )
        holders = [i for i in holders if i in used] or holders
        giver = holders[sink.shard % len(holders)]
        if runs and runs[-1][0] == giver:
            runs[-1] = giver, range(runs[-1][1].start, head + 1)
        else:
            runs.append((giver, range(head, head + 1)))
    return runs


def _step(source: KvLayout, sink: KvLayout, name: str, heads: range) -> Step:
    return Step(_stored(source, name, heads), _stored(sink, name, heads))


def _stored(layout: KvLayout, name: str, heads: range) -> Values:
    has_scales = any(c.name == name + SCALE for c in layout.components)
    return Values(
        _place(layout, name, heads), _place(layout, name + SCALE, heads) if has_scales else None
    )


def _place(layout: KvLayout, name: str, heads: range) -> Place:
    component = layout.component(name)
    head = component.width * DTYPE_BYTES[component.dtype]
    return Place(
        component.dtype,
        layout.component_offset(name) + (heads.start - layout.first_head(name)) * head,
        layout.layer_bytes,
        layout.token_stride(name),
        head,
        len(heads),
        component.width,
    )


def _lossless(step: Step) -> bool:
    source, sink = step.source, step.sink
    if (source.values.dtype, sink.values.dtype) == ("bfloat16", "float32"):
        return True
    groups = [0 if side.scales is None else side.scales.width for side in (source, sink)]
    return source.values.dtype == sink.values.dtype and groups[0] == groups[1]


def _values(layout: KvLayout) -> list[Component]:
    """Its components but for scales."""
    names = {c.name for c in layout.components}
    return [c for c in layout.components if c.name.removesuffix(SCALE) not in names - {c.name}]


def _heads(layout: KvLayout, name: str) -> range:
    first = layout.first_head(name)
    return range(first, first + layout.component(name).heads)
