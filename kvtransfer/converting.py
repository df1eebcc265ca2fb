"""Fetching KV that lies in another layout at its source, or in several shards of one.

Every shard that is needed is fetched as any other KV is, under the keys of its own layout, but
into scratch; there it is verified against the source's checksums, and from there converted
(conversion.py) into the sink's blocks, piece by piece as prefill goes on (making.py).

Tokens say what is fetched, since no key means anything in another layout. The last, incomplete
block of a prompt is known to a source only under the lease of its prompt.

Call codecs.implementation() when a worker starts that will convert: it loads the kernels, or, the
first time on a machine, compiles them for some seconds.

KV that was rounded on its way is not, bit for bit, what the sink would have computed itself: where
streams must be reproducible, fetch between equal dtypes, or keep it out of the index (`commit`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvtransfer.conversion import plan
from kvtransfer.endpoint import KvEndpoint
from kvtransfer.errors import CorruptBlockError, KvSourceLostError
from kvtransfer.making import Making, SaltOf, Wanted
from kvtransfer.observer import Needed, not_needed
from kvtransfer.report import FetchReport, Progress
from kvtransfer.store import KvStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """A shard of the KV: a worker's KV service, and the lease that holds it there."""

    address: str
    lease_id: str


@dataclass(frozen=True, slots=True)
class ConvertedReport:
    """A converted fetch that ended with each block whole, corrupt, or not to be had."""

    fetches: tuple[FetchReport, ...]
    """One for each source that was read."""
    complete: tuple[bool, ...]
    """Per block: all its tokens are in place, verified and converted."""
    corrupt_blocks: int
    """Of the sink's, wanting because bytes for them were corrupt, twice."""
    exact: bool
    """Nothing was rounded."""

    @property
    def bytes(self) -> int:
        """Read and verified, as they were at the sources."""
        return sum(f.bytes for f in self.fetches)

    @property
    def seconds(self) -> float:
        """From the first fetch's start to the last piece converted."""
        if not self.fetches:
            return 0.0
        return max(f.ended for f in self.fetches) - min(f.started for f in self.fetches)

    def require_sound(self) -> None:
        """For who has no other way to the content. Raises CorruptBlockError that names blocks."""
        if self.corrupt_blocks:
            wrong = [i for i, whole in enumerate(self.complete) if not whole]
            raise CorruptBlockError(
                f"{self.corrupt_blocks} of {len(self.complete)} blocks were corrupt, twice over",
                indices=",".join(map(str, wrong)),
            )


async def fetch_converted(
    endpoint: KvEndpoint,
    store: KvStore,
    sources: Sequence[Source],
    tokens: Sequence[int],
    blocks: Sequence[int],
    *,
    salt_of: SaltOf,
    skip: int = 0,
    partial: bool = True,
    commit: bool = True,
    timeout: float | None = None,
    release: bool = True,
    held_only: bool = False,
    tenant: str = "",
    on_progress: Progress | None = None,
    needed: Needed = not_needed,
) -> ConvertedReport:
    """Gets the KV of `tokens` from `skip` on, whole blocks of the sink, into the sink's blocks.

    `endpoint` is `store`'s. `blocks`, held by the caller, are as many as the layout needs for
    these tokens. Sources are asked for their layouts; of shards that hold the same heads one is
    read. With `partial` the incomplete last block of a source is asked for too, which its lease
    must hold; without it the tokens in there are not fetched, and the blocks they belong to stay
    incomplete. Full blocks are sealed as they become whole, unless `commit` is false; the sink's
    own incomplete last block only has its bytes in place. The rest is as in fetch_into(), for
    each source; with `release` every source's lease is released at the end. A lease is one
    sink's: several that read the same source need one each.

    When this returns, raises or is cancelled, nothing writes into the blocks any more. If one
    source fails, the others are given up. Raises KvSourceLostError (`complete` says which of
    `blocks` are whole, and those are sealed), LayoutMismatchError if the layouts can't be
    converted, and what fetch_into() raises.
    """
    layout, loop = store.layout, asyncio.get_running_loop()
    if skip % layout.block_tokens:
        raise ValueError(f"skip: {skip} tokens are not whole blocks of {layout.block_tokens}")
    if len(blocks) != layout.blocks_for(max(0, len(tokens) - skip)):
        raise ValueError(f"{len(blocks)} blocks for {len(tokens) - skip} tokens")
    deadline = None if timeout is None else loop.time() + timeout

    def left() -> float | None:
        return None if deadline is None else max(0.0, deadline - loop.time())

    try:
        layouts = await _together(endpoint.describe(s.address, timeout=left()) for s in sources)
        conversion = plan(layouts, layout)
        wanted = Wanted(tokens, salt_of, skip, partial, tenant)
        making = Making(store, conversion, wanted, blocks, commit=commit, on_progress=on_progress)
        fetches = (
            endpoint.fetch_into(
                sources[part.source].address,
                sources[part.source].lease_id,
                part.keys,
                part.landing,
                timeout=left(),
                release=False,
                held_only=held_only,
                tenant=tenant,
                needed=needed,
            )
            for part in making.parts
        )
        return await _made(making, fetches, exact=conversion.exact)
    except KvSourceLostError as error:
        error.complete = error.complete or (False,) * len(blocks)
        raise
    finally:
        for source in sources if release else ():
            endpoint.release(source.address, source.lease_id)


async def _made(
    making: Making, fetches: Iterable[Coroutine[Any, Any, FetchReport]], *, exact: bool
) -> ConvertedReport:
    """Runs the fetches, one for each of making.parts."""
    assembly = making.assembly
    try:
        reports = await _together(fetches)
    except KvSourceLostError as error:
        error.complete = assembly.complete
        raise
    finally:
        await making.sealed()
    for number, (part, report) in enumerate(zip(making.parts, reports, strict=True)):
        for index, whole in enumerate(report.complete):
            if not whole:
                assembly.failed(number, part.first_block + index)
    return ConvertedReport(tuple(reports), assembly.complete, assembly.corrupt, exact)


async def _together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What they return. The first to fail ends the others, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
