"""The figures of several ranks as those of one worker. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from kvtransfer.observe import Traffic
from kvtransfer.tiers.base import TierStats
from services.engine.api import EngineInfo, EngineStats, RankStats

_SUMS = (
    "running",
    "free_blocks",
    "held_blocks",
    "cached_blocks",
    "finished",
    "preempted",
    "corrupt_blocks",
    "leases",
    "kv_refused",
    "leases_expired",
    "draft_tokens",
    "accepted_tokens",
    "decode_steps",
)


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What the leader knows of a rank: its last report, and what it was given since."""

    stats: EngineStats
    live: int
    """Requests given to it that have not ended."""
    unseen_tokens: int
    """Prompt tokens of those that the report does not know of."""


def group_info(infos: Sequence[EngineInfo]) -> EngineInfo:
    """Of ranks that are alike: see differs()."""
    return replace(
        infos[0],
        total_blocks=sum(info.total_blocks for info in infos),
        max_running=sum(info.max_running for info in infos),
        dp_ranks=len(infos),
    )


def differs(infos: Sequence[EngineInfo]) -> str:
    """In what ranks are not alike that must be; empty: in nothing."""
    for name in ("model", "layout", "context_tokens", "total_blocks", "numerics", "experts"):
        values = [getattr(info, name) for info in infos]
        if any(value != values[0] for value in values):
            return f"{name}: " + ", ".join(map(str, values))
    return ""


def group_stats(loads: Sequence[RankLoad], info: EngineInfo) -> EngineStats:
    """Sums; of rates the mean of ranks that have one, since a prompt is computed by one rank."""
    stats = [load.stats for load in loads]
    ranks = tuple(_rank(load, info) for load in loads)
    maps = [s.expert_map for s in stats if s.expert_map is not None]
    tokens = [s.expert_tokens for s in stats if s.expert_tokens]
    traffic = _traffic([t for s in stats for t in s.kv_traffic])
    return EngineStats(
        **{name: sum(getattr(s, name) for s in stats) for name in _SUMS},
        waiting=sum(rank.waiting for rank in ranks),
        queued_tokens=sum(rank.queued_tokens for rank in ranks),
        prefill_tokens_per_second=_mean(s.prefill_tokens_per_second for s in stats),
        step_seconds=_mean(s.step_seconds for s in stats),
        kv_bytes=_by_transport(stats),
        kv_traffic=traffic,
        kv_tiers=_tiers(stats),
        ranks=ranks,
        expert_tokens=tuple(map(sum, zip(*tokens, strict=True))),
        # A plan is carried out when the last rank says so.
        expert_map=min(maps, key=lambda placed: placed.plan, default=None),
    )


def _rank(load: RankLoad, info: EngineInfo) -> RankStats:
    stats = load.stats
    blocks = info.total_blocks // info.dp_ranks
    return RankStats(
        running=stats.running,
        waiting=max(0, load.live - stats.running),
        free_blocks=stats.free_blocks,
        kv_tokens=max(0, blocks - stats.free_blocks) * info.layout.block_tokens,
        queued_tokens=stats.queued_tokens + load.unseen_tokens,
    )


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if value > 0]
    return sum(known) / len(known) if known else 0.0


def _by_transport(stats: Sequence[EngineStats]) -> dict[str, int]:
    names = {name: None for s in stats for name in s.kv_bytes}
    return {name: sum(s.kv_bytes.get(name, 0) for s in stats) for name in names}


def _traffic(all_of_it: Sequence[Traffic]) -> tuple[Traffic, ...]:
    """Sums by transport before those by peer, as one engine has them."""
    found: dict[tuple[str, str], Traffic] = {}
    for traffic in all_of_it:
        place = traffic.transport, traffic.peer
        known = found.get(place)
        found[place] = (
            traffic
            if known is None
            else replace(traffic, figures=known.figures.plus(traffic.figures))
        )
    return tuple(sorted(found.values(), key=lambda traffic: bool(traffic.peer)))


def _tiers(stats: Sequence[EngineStats]) -> tuple[TierStats, ...]:
    found: dict[str, TierStats] = {}
    for tier in (t for s in stats for t in s.kv_tiers):
        known = found.get(tier.name)
        if known is not None:
            counts = [f.name for f in fields(TierStats) if f.name not in ("name", "off")]
            sums = {name: getattr(known, name) + getattr(tier, name) for name in counts}
            tier = TierStats(name=tier.name, off=known.off or tier.off, **sums)
        found[tier.name] = tier
    return tuple(found.values())
