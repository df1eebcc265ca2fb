"""Rows to the ranks that have their experts, and what the experts made of them back.

One all-to-all takes the rows there and one brings the results, in every layer with experts. A
message says first how many rows each rank sends to each other; then comes room for as many rows as
were enough lately, which all ranks know from what they were told, so that a decode step needs no
exchange of sizes. Rows beyond that room follow in an exchange of exactly their size.

A row goes to a rank once, with the places there of all experts that it chose; what comes back is
one row for each of those, unweighted. The owner adds them up in the order of its choices, so bits
are those of a single process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.engine.torch.moe import ExpertCompute
from services.engine.torch.parallel.mesh import Mesh
from services.engine.torch.parallel.placement import Replicas

Int32s = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

MOST_ROOM = 64
"""Rows for a rank in the first message, at most: beyond, bytes cost more than another exchange."""
REMEMBERED = 64
"""Exchanges that the room is chosen by."""


class Room:
    """Rows that a message has room for: the power of two that what came lately fits in. Pure."""

    def __init__(self) -> None:
        self.rows = 1
        self._needed = [0] * REMEMBERED
        self._turn = 0

    def note(self, most: int) -> None:
        """So many rows went from one rank to another, at most."""
        self._needed[self._turn] = most
        self._turn = (self._turn + 1) % REMEMBERED
        needed = max(1, *self._needed)
        self.rows = min(MOST_ROOM, 1 << (needed - 1).bit_length())


@dataclass(frozen=True, slots=True)
class _Sent:
    """What goes to one rank of n rows: which, the places there of their choices, -1 for none."""

    rows: npt.NDArray[np.intp]
    places: Int32s
    chosen: npt.NDArray[np.bool_]
    """[n, k]"""


class ExpertExchange:
    """See moe.ExpertCompute. Ranks call it together, as they run the same layers."""

    def __init__(
        self,
        mesh: Mesh,
        local: ExpertCompute,
        replicas: Callable[[int], Replicas],
        *,
        places: int,
        choices: int,
        hidden: int,
        dtype: torch.dtype,
    ) -> None:
        """`local` applies the experts in a rank's `places`; `replicas`: where a layer's are now."""
        self._mesh = mesh
        self._local = local
        self._replicas = replicas
        self._places = places
        self._choices = choices
        self._hidden = hidden
        self._dtype = dtype
        self._ids_bytes = 4 * choices
        self._row_bytes = self._ids_bytes + hidden * dtype.itemsize
        self._room = Room()

    def __call__(self, layer: int, x: torch.Tensor, ids: Int32s) -> tuple[torch.Tensor, Int32s]:
        """See moe.ExpertCompute."""
        there = self._replicas(layer).choose(ids, self._mesh.rank)
        there[ids < 0] = -1
        parts = [self._part(there, rank) for rank in range(self._mesh.ranks)]
        rows, places, counts = self._dispatch(x, parts)
        made, where = self._local(layer, rows, places)
        return self._combine(made, where, counts, parts, ids.shape)

    def _part(self, there: Int32s, rank: int) -> _Sent:
        first = rank * self._places
        chosen = (there >= first) & (there < first + self._places)
        rows = np.flatnonzero(chosen.any(axis=1))
        places = np.where(chosen[rows], there[rows] - np.int32(first), np.int32(-1))
        return _Sent(rows, places, chosen)

    def _dispatch(
        self, x: torch.Tensor, parts: list[_Sent]
    ) -> tuple[torch.Tensor, Int32s, list[int]]:
        """Rows for the experts here, their places, and how many of them are of each rank."""
        ranks, room = self._mesh.ranks, self._room.rows
        head = 4 * ranks
        sizes = np.array([len(p.rows) for p in parts], np.int32)
        sent = np.empty((ranks, head + room * self._row_bytes), np.uint8)
        raw = x.view(torch.uint8).numpy()
        sent[:, :head] = sizes.view(np.uint8)
        for message, part in zip(sent, parts, strict=True):
            self._write(message[head:].reshape(room, -1), raw, part, slice(0, room))
        received = np.empty_like(sent)
        self._mesh.exchange(torch.from_numpy(received), torch.from_numpy(sent))
        table = received[:, :head].copy().view(np.int32)
        """[from, to]"""
        counts: list[int] = table[:, self._mesh.rank].tolist()
        first = received[:, head:].reshape(ranks, room, self._row_bytes)
        found = [rows[: min(room, n)] for rows, n in zip(first, counts, strict=True)]
        most = int(table.max())
        if most > room:
            rest = self._rest(raw, parts, counts, room)
            found = [np.concatenate(pair) for pair in zip(found, rest, strict=True)]
        self._room.note(most)
        whole = np.concatenate(found)
        rows = torch.empty((len(whole), self._hidden), dtype=self._dtype)
        rows.view(torch.uint8).numpy()[:] = whole[:, self._ids_bytes :]
        return rows, whole[:, : self._ids_bytes].copy().view(np.int32), counts

    def _rest(self, raw: Bytes, parts: list[_Sent], counts: list[int], room: int) -> list[Bytes]:
        """Rows that the first messages had no room for, of each rank."""
        going = [max(0, len(p.rows) - room) for p in parts]
        coming = [max(0, n - room) for n in counts]
        sent = np.empty((sum(going), self._row_bytes), np.uint8)
        ends = np.cumsum(going)
        for part, end, count in zip(parts, ends, going, strict=True):
            self._write(sent[end - count : end], raw, part, slice(room, room + count))
        received = np.empty((sum(coming), self._row_bytes), np.uint8)
        self._mesh.exchange(torch.from_numpy(received), torch.from_numpy(sent), coming, going)
        return np.split(received, np.cumsum(coming)[:-1])

    def _write(self, into: Bytes, raw: Bytes, part: _Sent, which: slice) -> None:
        """Places and bytes of some of a part's rows, into the first rows of `into`."""
        places = np.ascontiguousarray(part.places[which]).view(np.uint8)
        into[: len(places), : self._ids_bytes] = places
        into[: len(places), self._ids_bytes :] = raw[part.rows[which]]

    def _combine(
        self,
        made: torch.Tensor,
        where: Int32s,
        counts: list[int],
        parts: list[_Sent],
        shape: tuple[int, ...],
    ) -> tuple[torch.Tensor, Int32s]:
        """What the experts here made goes to whom it is for: row by row, choice by choice."""
        here = where >= 0
        sent = made.index_select(0, torch.from_numpy(where[here].astype(np.int64)))
        ends = np.cumsum(counts)
        going = [int(here[e - n : e].sum()) for e, n in zip(ends, counts, strict=True)]
        coming = [int(p.chosen.sum()) for p in parts]
        total = sum(coming)
        received = torch.empty((total, self._hidden), dtype=self._dtype)
        self._mesh.exchange(received.view(torch.uint8), sent.view(torch.uint8), coming, going)
        found = np.full(shape, -1, np.int32)
        first = 0
        for part, count in zip(parts, coming, strict=True):
            found[part.chosen] = np.arange(first, first + count, dtype=np.int32)
            first += count
        return received, found
