"""A request core among simulated workers that refuse, die, stall, leave and talk late.

Tokens of the truth come from whoever is asked for them; the world keeps the books of what was
started, told and reported, and `check` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from services.engine.api import FinishReason, KvReport
from services.frontend import events as e
from services.frontend.attempt import State
from services.frontend.request import Request
from services.frontend.text import TextStream
from services.runtime.errors import NoWorkersError, by_reason

T = TypeVar("T")

EOS = 0
ERRORS = ["WORKER_LOST", "ENGINE_OVERLOADED", "ENGINE_FAILED", "DRAINING", "KV_SOURCE_LOST"]
ERRORS += ["LAYOUT_MISMATCH", "SOMETHING_NEW"]
FINAL = ["INVALID_REQUEST", "DEADLINE"]


class Pick(Protocol):
    """Where chance comes from."""

    def among(self, choices: Sequence[T]) -> T: ...

    def count(self, low: int, high: int) -> int: ...


class Letters:
    def push(self, token_ids):
        return "".join(chr(97 + t) for t in token_ids)

    def finish(self):
        return ""


@dataclass
class Undisturbed:
    """What workers generate, and what of it the client is to see."""

    tokens: list[int]
    max_tokens: int
    stops: list[str]

    def __post_init__(self):
        cut = self.tokens.index(EOS) + 1 if EOS in self.tokens else len(self.tokens)
        self.worker = self.tokens[: min(cut, self.max_tokens)]
        self.worker_reason = FinishReason.STOP if self.worker[-1] == EOS else FinishReason.LENGTH
        stream = TextStream(Letters(), self.stops)
        spoken = self.worker[:-1] if self.worker[-1] == EOS else self.worker
        taken, self.text = stream.push(spoken)
        self.client, self.reason = self.worker, self.worker_reason
        if stream.stopped:
            self.client, self.reason = self.worker[:taken], FinishReason.STOP
        else:
            self.text += stream.finish()


@dataclass
class Try:
    """An attempt as its workers see it."""

    placement: e.Placement
    placed_as: int
    base: int
    prefill: str = ""
    decode: str = ""
    waits_for_first: bool = False
    at: int = 0
    lease: bool = False
    leaves: bool = False


@dataclass
class World:
    core: Request
    truth: Undisturbed
    tries: dict[int, Try] = field(default_factory=dict)
    placing: dict[int, tuple[str, ...]] = field(default_factory=dict)
    reports: dict[int, int] = field(default_factory=dict)
    emitted: list[int] = field(default_factory=list)
    text: str = ""
    ends: list[e.Command] = field(default_factory=list)
    now: float = 0.0
    sent: list[e.Event] = field(default_factory=list)
    faults: int = 0

    def feed(self, event: e.Event) -> None:
        self.now += 1.0
        self.sent.append(event)
        self.obey(self.core.handle(event, self.now))

    def obey(self, commands: list[e.Command]) -> None:
        for command in commands:
            self._obey(command)

    def _obey(self, command: e.Command) -> None:
        assert not self.ends, f"{command} after the end"
        match command:
            case e.Place(attempt, exclude):
                assert attempt not in self.tries
                assert attempt not in self.reports
                assert len(set(exclude)) == len(exclude)
                assert len(self.emitted) < len(self.truth.worker), "placed a complete request"
                self.placing[attempt], self.reports[attempt] = exclude, 0
            case e.CancelPlace(attempt):
                del self.placing[attempt]
            case e.Report(attempt):
                self.reports[attempt] += 1
            case e.Emit(token_ids, _, text):
                assert token_ids or text
                self.emitted += token_ids
                self.text += text
            case e.Finish() | e.Fail():
                self.ends.append(command)
            case _:
                self._obey_at_worker(command)

    def _obey_at_worker(self, command: e.Command) -> None:
        match command:
            case e.StartPrefill(attempt, worker):
                assert worker == self.tries[attempt].placement.prefill
                self.tries[attempt].prefill = "runs"
            case e.StartDecode(attempt, worker, source):
                if attempt not in self.tries:
                    self.begins_again(attempt, worker)
                it = self.tries[attempt]
                assert worker == it.placement.decode
                it.decode, it.waits_for_first = "runs", source is not None
                it.at = it.base = len(self.emitted)
            case e.Proceed(attempt, worker, token_ids):
                it = self.tries[attempt]
                assert it.waits_for_first
                assert worker == it.placement.decode
                it.waits_for_first = False
                it.at += len(token_ids)
            case e.CancelPrefill(attempt):
                assert self.tries[attempt].prefill == "runs"
                self.tries[attempt].prefill = "over"
            case e.CancelDecode(attempt):
                assert self.tries[attempt].decode == "runs"
                self.tries[attempt].decode = "over"
            case e.Release(attempt):
                assert self.tries[attempt].lease
                self.tries[attempt].lease = False

    def begins_again(self, number: int, worker: e.Worker) -> None:
        course = next(c for c in self.courses() if c.number == number)
        before = [t for t in self.tries.values() if t.placed_as == course.placed_as]
        assert before
        assert all(t.decode == "over" and t.placement.decode == worker for t in before)
        self.tries[number] = Try(before[0].placement, course.placed_as, 0)

    def courses(self):
        both = (self.core.course, self.core.successor)
        return [c for c in both if c is not None and c.state is not State.ENDED]

    def check(self) -> None:
        client = self.truth.client
        assert self.emitted == client[: len(self.emitted)]
        assert self.truth.text.startswith(self.text)
        courses = self.courses()
        live = {c.number for c in courses}
        for number, attempt in self.tries.items():
            if number not in live:
                assert attempt.prefill != "runs"
                assert attempt.decode != "runs"
                assert not attempt.lease
        for placed_as, reports in self.reports.items():
            assert reports == (0 if placed_as in {c.placed_as for c in courses} else 1)
        assert {c.number for c in courses if c.state is State.PLACING} == set(self.placing)
        if self.core.successor is not None:
            assert self.core.state is State.DECODING
        if self.core.state is State.ENDED:
            assert self.core.owing == []


class Moves:
    """What the workers of an attempt can do next."""

    def __init__(self, world: World, number: int, pick: Pick) -> None:
        self.world, self.number, self.pick = world, number, pick
        self.it, self.truth = world.tries[number], world.truth.worker

    def possible(self) -> list[Callable[[], None]]:
        it, moves = self.it, []
        if it.prefill == "runs":
            moves += [self.prefill_accepts, self.prefill_done, self.prefill_done]
            moves += [self.prefill_fails]
        if it.prefill == "over" and it.decode == "runs" and not it.waits_for_first:
            moves += [self.prefill_fails_late]
        if it.decode == "runs":
            moves += [self.decode_fails, self.decode_gives_up, self.stalls]
            if it.lease:
                moves += [self.kv_arrives]
            if not it.waits_for_first:
                moves += [self.decode_speaks] * 6 + [self.leaves]
        return moves

    def error(self):
        return by_reason(self.pick.among([*ERRORS, *FINAL]), "broke", {})

    def chunk(self, at: int) -> tuple[tuple[int, ...], FinishReason | None]:
        count = self.pick.count(1, 4)
        tokens = tuple(self.truth[at : at + count])
        ended = at + count >= len(self.truth)
        told = ended and self.pick.count(0, 3) > 0  # at times that word is lost
        return tokens, self.world.truth.worker_reason if told else None

    def prefill_accepts(self) -> None:
        self.world.feed(e.PrefillAccepted(self.number))

    def prefill_done(self) -> None:
        tokens, reason = self.chunk(self.it.base)
        self.it.prefill, self.it.lease = "over", reason is None
        kv = KvReport(cached_tokens=3, computed_tokens=7) if self.pick.count(0, 1) == 1 else None
        self.world.feed(e.PrefillDone(self.number, tokens, (), reason, b"h", kv))

    def prefill_fails(self) -> None:
        self.world.faults += 1
        self.it.prefill = "over"
        failed = e.WorkerFailed(
            self.number, e.Role.PREFILL, self.error(), self.pick.count(0, 1) == 1
        )
        self.world.feed(failed)

    def prefill_fails_late(self) -> None:
        self.world.feed(e.WorkerFailed(self.number, e.Role.PREFILL, self.error(), True))

    def leaves(self) -> None:
        self.it.leaves = True
        self.world.feed(e.DecodeOutput(self.number, moving=True))

    def decode_speaks(self) -> None:
        tokens, reason = self.chunk(self.it.at)
        self.it.at += len(tokens)
        kv = None
        if self.it.lease and self.pick.count(0, 1) == 1:
            self.it.lease, kv = False, KvReport("shm", 10, 1)
        if reason is not None:
            self.it.decode = "over"
        self.world.feed(e.DecodeOutput(self.number, tokens, (), reason, None, kv))

    def kv_arrives(self) -> None:
        self.it.lease = False
        self.world.feed(e.DecodeOutput(self.number, kv=KvReport("shm", 10, 1)))

    def decode_fails(self) -> None:
        self.world.faults += 1
        self.it.decode = "over"
        if self.pick.count(0, 1) == 1:
            self.world.feed(e.WorkerFailed(self.number, e.Role.DECODE, self.error(), True))
        else:
            failed = e.DecodeOutput(self.number, (), (), FinishReason.ERROR, self.error())
            self.world.feed(failed)

    def decode_gives_up(self) -> None:
        self.world.faults += 1
        self.it.decode = "over"
        self.world.feed(e.DecodeOutput(self.number, (), (), FinishReason.CANCELLED))

    def stalls(self) -> None:
        self.world.faults += 1
        debt = self.pick.among(self.world.core.owing)
        self.world.feed(e.WorkerFailed(debt.attempt, debt.role, self.error(), ended=False))


def old_talk(world: World, pick: Pick) -> None:
    """Something an earlier attempt said, or says only now."""
    live = {c.number for c in world.courses()}
    old = pick.among([n for n in range(world.core.numbers) if n not in live])
    event = pick.among(
        [
            e.Placed(old, placement()),
            e.Unplaced(old, NoWorkersError("none")),
            e.PrefillDone(old, (9, 9)),
            e.DecodeOutput(old, (9, 9, 9)),
            e.DecodeOutput(old, (), (), FinishReason.STOP),
            e.WorkerFailed(old, e.Role.DECODE, NoWorkersError("none"), True),
            *[s for s in world.sent if getattr(s, "attempt", None) == old],
        ]
    )
    assert world.core.handle(event, world.now) == []


def placement(prefill: str = "p0", decode: str = "d0") -> e.Placement:
    where = e.Worker(prefill, f"{prefill}:1") if prefill else None
    return e.Placement(e.Worker(decode, f"{decode}:1"), where, ("because",))


def placements(world: World, pick: Pick) -> None:
    number = pick.among(sorted(world.placing))
    exclude = world.placing.pop(number)
    decode = [d for d in ("d0", "d1", "d2", "d3") if d not in exclude]
    prefill = [p for p in ("p0", "p1", "p2") if p not in exclude]
    if not decode or pick.count(0, 15) == 0:
        world.reports[number] = 1  # nothing was booked, so there is nothing to report
        world.feed(e.Unplaced(number, NoWorkersError("no decode worker is up")))
        return
    chosen = placement(pick.among(["", *prefill, *prefill]), pick.among(decode))
    world.tries[number] = Try(chosen, number, len(world.core.output))
    world.feed(e.Placed(number, chosen))


def step(world: World, pick: Pick, more: Sequence[Callable[[], None]] = ()) -> None:
    """One thing that can happen now, happens."""
    moves = list(more)
    if world.placing:
        moves += [lambda: placements(world, pick)]
    for course in world.courses():
        if course.number in world.tries:
            moves += Moves(world, course.number, pick).possible()
    if world.core.numbers > len(world.courses()):
        moves += [lambda: old_talk(world, pick)]
    pick.among(moves)()
    world.check()


def check_end(world: World) -> None:
    """It ended once, with all of it if it finished, and hears nothing more."""
    core, truth = world.core, world.truth
    ended_silently = isinstance(world.sent[-1], e.ClientGone)
    assert len(world.ends) == (0 if ended_silently else 1)
    most = core.limits.max_attempts
    assert core.moves <= most
    assert len(core.attempts) <= min(most + core.refusals, 1 + world.faults) + core.moves
    if world.ends and isinstance(world.ends[0], e.Finish):
        assert world.emitted == truth.client == core.output
        assert world.text == truth.text
        assert world.ends[0].reason is truth.reason
        assert sum(a.tokens for a in core.attempts) == len(truth.client)
        assert core.first_token_at is not None
        assert core.placed_at <= core.first_token_at <= core.ended_at
    for event in [*world.sent, e.ClientGone(), e.DeadlinePassed()]:
        assert core.handle(event, world.now) == []
