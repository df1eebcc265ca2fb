"""A request in an engine: its sequence, what is kept beside it, and what is told of its KV."""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.engine.api import KvReport, PrefixReport
from services.engine.guides.guided import Guided
from services.engine.stepped.inbox import FetchStopped
from services.engine.stepped.prefix import Verdict
from services.engine.stepped.sampler import Occurrences
from services.engine.stepped.scheduler import Fetch
from services.engine.stepped.sequence import Sequence


@dataclass(slots=True)
class Live:
    """A sequence, and what is kept about it until it ends."""

    sequence: Sequence
    guided: Guided | None = None
    occurrences: Occurrences | None = None
    fetch: Fetch | None = None
    fetched: FetchStopped | None = None
    verdict: Verdict | None = None
    leased: bool = False
    proceeded: float = 0.0
    reported: bool = False


def report_of(live: Live) -> KvReport:
    """Where the KV of its context came from."""
    sequence, fetched = live.sequence, live.fetched
    have = min(sequence.computed, sequence.context)
    computed = max(0, have - sequence.cached_tokens - sequence.fetched_tokens)
    report = KvReport(
        cached_tokens=sequence.cached_tokens,
        computed_tokens=computed,
        prefix=_prefix_report(live),
    )
    if fetched is None:
        return report
    of_prefix = live.fetch is not None and live.fetch.held_only
    waited = not (of_prefix or sequence.held_back)
    return replace(
        report,
        transport=fetched.transport,
        bytes=fetched.bytes,
        blocks=fetched.blocks,
        seconds=fetched.seconds,
        exposed_seconds=max(0.0, fetched.ended - live.proceeded) if waited else 0.0,
        corrupt_blocks=fetched.corrupt_blocks,
        lost=f"{fetched.lost}: {fetched.why}" if fetched.lost else "",
        why=fetched.choice,
    )


def _prefix_report(live: Live) -> PrefixReport | None:
    verdict, fetched = live.verdict, live.fetched
    if verdict is None:
        return None
    if not verdict.fetch:
        return verdict.report(0, 0.0, "computed")
    if fetched is None:
        return verdict.report(0, 0.0, "computed, since the fetch was stopped")
    tokens = live.sequence.fetched_tokens
    if not fetched.lost:
        return verdict.report(tokens, fetched.seconds, f"fetched in {fetched.seconds:.3f} s")
    outcome = f"{tokens} tokens came, then {fetched.lost}: {fetched.why}"
    return verdict.report(tokens, fetched.seconds, outcome)
