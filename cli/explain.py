"""`tandem explain`: why a request went where it did, waited, or was refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from cli.output import CommandError, UsageError
from services.frontend import validate
from services.runtime.client import Client, Explained
from services.runtime.errors import (
    CancelledError,
    DeadlineError,
    DrainingError,
    InvalidRequestError,
    RoleChangedError,
    WorkerLostError,
    WorkerSilentError,
)
from services.runtime.explained import Considered, Decision
from services.runtime.oneline import one_line

GIVEN_UP = {
    DeadlineError.reason: "the client's deadline passed",
    CancelledError.reason: "the client went away",
}
LEAVING = {
    DrainingError.reason: "its worker was leaving",
    RoleChangedError.reason: "its worker took another role",
}
FAULTS = {
    WorkerLostError.reason: "was lost",
    WorkerSilentError.reason: "fell silent",
}
"""Reasons that are better said than named."""

MOMENT = 0.0005
"""Seconds that are not worth a word."""

NOTABLE = 0.005
"""Differences of scores below this are not worth a word."""

DIFFERENCES = 3
"""Scorers named where two workers are compared."""


def check_request_id(request_id: str) -> None:
    """It can be one. Raises UsageError."""
    if not request_id:
        raise UsageError("which request? Its id is in the answer, and in every error's metadata")
    try:
        validate.check_request_id(request_id)
    except InvalidRequestError as error:
        raise UsageError(error.message) from None


async def show(coordinators: str, request_id: str, *, as_json: bool) -> None:
    """Prints it. Raises CallFailedError if no coordinator answers, CommandError if none knows."""
    async with Client("", coordinators) as client:
        found = await client.explain(request_id)
    if len(found.silent) == len(found.asked):
        raise found.silent[0]
    if not found.decisions:
        raise CommandError(unknown(request_id, found))
    if as_json:
        print(json.dumps([asdict(one) for one in found.decisions], indent=2))
    else:
        print("\n".join(one_line(line) for line in lines(request_id, found.decisions)))
    if found.silent:
        print(f"note: {_silence(found)}; there may be more to tell", file=sys.stderr)


def unknown(request_id: str, found: Explained) -> str:
    """None of those that answered remembers it."""
    silent = {error.address for error in found.silent}
    answered = [address for address in found.asked if address not in silent]
    words = (
        f"none of {', '.join(answered)} remembers request {request_id}: a frontend refused it "
        "itself (unknown model, bad field), or more than coordinator.explain_decisions others "
        "came after it, or the coordinator was restarted"
    )
    return one_line(f"{words}; {_silence(found)}" if found.silent else words)


def _silence(found: Explained) -> str:
    """Who did not answer, and why."""
    return one_line(
        "; ".join(f"{e.address} did not answer ({e.reason or e.code})" for e in found.silent)
    )


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
        return f"has waited {last.queued_seconds:.1f} s for a place"
    if last.outcome == "refused":
        return f"refused with {last.refusal}"
    if last.outcome == "cancelled":
        return f"given up by its frontend after {last.queued_seconds:.1f} s in the queue"
    if not last.ended:
        return "runs"
    if last.failure in GIVEN_UP:
        return f"given up: {GIVEN_UP[last.failure]}"
    if last.failure in LEAVING:
        return f"to be placed again: {LEAVING[last.failure]}"
    if last.failed_worker:
        return f"its last attempt failed on {last.failed_worker} with {last.failure}"
    return f"given up with {last.failure}" if last.failure else "answered"


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
    words = f"first token {ttft:.3f} s after the placement"
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
    """What came of an attempt."""
    tokens = _count(one.generated_tokens)
    first = f"; the first came {one.ttft_seconds:.3f} s after the placement"
    first = first if one.ttft_seconds else ""
    if one.failure == DeadlineError.reason:
        of = f"{one.generated_tokens} of up to {_count(one.max_tokens)}"
        return f"ended: {GIVEN_UP[one.failure]} after {of}{first}"
    if one.failure in GIVEN_UP:
        return f"ended: {GIVEN_UP[one.failure]} after {tokens}{first}"
    if one.failure in LEAVING:
        return (
            f"moved after {tokens}: {LEAVING[one.failure]}; it goes on as the next attempt{first}"
        )
    if one.failed_worker:
        what = FAULTS.get(one.failure, "failed it")
        return f"failed after {tokens}: {one.failed_worker} {what} ({one.failure}){first}"
    if one.failure:
        return f"ended after {tokens} with {one.failure}{first}"
    if not one.generated_tokens:
        return "ended with no token of its own: it was not needed any more"
    return f"finished: {tokens}{first}"


def _count(tokens: int) -> str:
    return f"{tokens} token" if tokens == 1 else f"{tokens} tokens"
