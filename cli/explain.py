"""`tandem explain`: why a request went where it did, waited, or was refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from cli.output import CommandError, printable
from services.runtime.client import CallFailedError, Client
from services.runtime.explained import Considered, Decision

MOMENT = 0.0005
"""Seconds that are not worth a word."""

NOTABLE = 0.005
"""Differences of scores below this are not worth a word."""

DIFFERENCES = 3
"""Scorers named where two workers are compared."""


async def show(coordinators: Sequence[str], request_id: str, *, as_json: bool) -> None:
    """Prints it. Raises CallFailedError if no coordinator answers, CommandError if none knows."""
    found, failures = await _ask(coordinators, request_id)
    if not found:
        if failures and len(failures) == len(coordinators):
            raise failures[0]
        raise CommandError(
            f"no coordinator remembers request {request_id}: it was never asked for here, or so "
            "many came after it (coordinator.explain_decisions are remembered), or the "
            "coordinator has started anew since"
        )
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    else:
        print(printable("\n".join(lines(request_id, found))))


async def _ask(
    coordinators: Sequence[str], request_id: str
) -> tuple[list[Decision], list[CallFailedError]]:
    found: list[Decision] = []
    failures: list[CallFailedError] = []
    for address in coordinators:
        async with Client("", address) as client:
            try:
                found += await client.explain(request_id)
            except CallFailedError as error:
                failures.append(error)
    return sorted(found, key=lambda d: (d.attempt, -d.asked_seconds_ago)), failures


def lines(request_id: str, decisions: Sequence[Decision]) -> Iterator[str]:
    """The whole story, as text."""
    first, last = decisions[0], decisions[-1]
    yield f"request {request_id}: {_summary(last)}"
    yield f"  {_wanted(first)}"
    for decision in decisions:
        yield ""
        yield from _attempt(decision)


def _summary(last: Decision) -> str:
    if last.outcome == "waiting":
        return f"waits for a place since {last.queued_seconds:.1f} s"
    if last.outcome == "refused":
        return f"refused with {last.refusal}"
    if last.outcome == "cancelled":
        return f"given up by its frontend after {last.queued_seconds:.1f} s in the queue"
    if not last.ended:
        return "runs"
    if last.failed_worker:
        return f"its last attempt failed on {last.failed_worker} with {last.failure}"
    return "done"


def _wanted(one: Decision) -> str:
    words = [f"{one.context_tokens} tokens of context, up to {one.max_tokens} more"]
    if one.model:
        words.append(f"model {one.model}")
    if one.tenant:
        words.append(f"tenant {one.tenant}")
    if one.priority:
        words.append(f"priority {one.priority}")
    if one.session:
        words.append(f"session {one.session}")
    if one.adapter:
        words.append(f"adapter {one.adapter}")
    if one.allowed_regions:
        words.append(f"only in {', '.join(one.allowed_regions)}")
    if one.deadline_seconds:
        words.append(f"{one.deadline_seconds:.1f} s to its deadline")
    if one.wanted_ttft_seconds:
        words.append(f"first token within {one.wanted_ttft_seconds:g} s")
    if one.wanted_itl_seconds:
        words.append(f"at most {one.wanted_itl_seconds * 1e3:g} ms between tokens")
    return "; ".join(words)


def _attempt(one: Decision) -> Iterator[str]:
    yield (
        f"attempt {one.attempt}, {one.asked_seconds_ago:.1f} s ago, by {one.coordinator_id}: "
        f"{one.outcome} {_after(one.queued_seconds)}"
    )
    for why, seconds in one.waits:
        yield f"  waited {seconds:.3f} s for this: {why}" if seconds >= MOMENT else f"  {why}"
    for reason in one.reasons:
        if not reason.startswith("waited "):
            yield f"  {'refused' if one.refusal else 'because'}: {reason}"
    for role, title in (("decode", "to generate"), ("prefill", "to run the prompt")):
        some = [c for c in one.considered if c.role == role]
        if some:
            yield f"  {title}:"
            yield from _workers(some)
    if one.predicted_ttft_seconds:
        yield f"  predicted: {_times(one.predicted_ttft_seconds, one.predicted_itl_seconds)}"
    if one.ended:
        yield f"  {_end(one)}"


def _times(ttft: float, itl: float) -> str:
    words = f"first token after {ttft:.3f} s"
    return f"{words}, then one every {itl * 1e3:.1f} ms" if itl else words


def _after(seconds: float) -> str:
    return f"after {seconds:.3f} s" if seconds >= MOMENT else "at once"


def _workers(some: Sequence[Considered]) -> Iterator[str]:
    """Those that could have it, the winner first; then those that could not."""
    able = [c for c in some if not c.rejected]
    winner = next((c for c in able if c.chosen), None)
    width = max(len(c.worker_id) for c in some)
    for c in able:
        words = _for(c, able) if c is winner else _against(c, winner)
        yield f"    {c.worker_id.ljust(width)}  {c.score:5.2f}  {words}"
    for c in some:
        if c.rejected:
            yield f"    {c.worker_id.ljust(width)}    out  {c.rejected}"


def _for(winner: Considered, able: Sequence[Considered]) -> str:
    """What was not the same for all."""
    if len(able) == 1:
        return "chosen: nobody else could have it"
    others = [c for c in able if c is not winner]
    told = [
        f"{name} {value:.2f}"
        for name, value in sorted(winner.scores.items(), key=lambda one: -one[1])
        if any(abs(c.scores.get(name, 0.0) - value) >= NOTABLE for c in others)
    ]
    return "chosen: " + (", ".join(told) if told else "all were as good")


def _against(c: Considered, winner: Considered | None) -> str:
    """What a worker lacked, or had, in comparison with the one chosen."""
    if winner is None:
        return "could have had it"
    differences = {name: value - winner.scores.get(name, 0.0) for name, value in c.scores.items()}
    notable = [(n, d) for n, d in differences.items() if abs(d) >= NOTABLE]
    notable.sort(key=lambda one: -abs(one[1]))
    if not notable:
        return "as good: the draw decided"
    return "against it: " + ", ".join(f"{name} {d:+.2f}" for name, d in notable[:DIFFERENCES])


def _end(one: Decision) -> str:
    words = f"{one.generated_tokens} tokens generated"
    if one.ttft_seconds:
        words += f", the first after {one.ttft_seconds:.3f} s"
    if one.failed_worker:
        return f"ended: {one.failed_worker} failed it with {one.failure}; {words}"
    return f"ended well: {words}"
