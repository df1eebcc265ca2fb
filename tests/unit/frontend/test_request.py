"""The request core against simulated workers that refuse, die, stall and talk late at every point.

Whatever happens on the way, what the client gets is a prefix of what an undisturbed run gives, and
all of it if the request finishes; it ends once; nothing that was started is left behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.api import FinishReason, KvPrefix, KvReport
from services.frontend import events as e
from services.frontend.attempt import State
from services.frontend.output import Limits
from services.frontend.patience import Owed
from services.frontend.request import Request
from services.frontend.text import TextStream
from services.runtime.errors import NoWorkersError, by_reason

EOS = 0
ERRORS = ["WORKER_LOST", "ENGINE_OVERLOADED", "ENGINE_FAILED", "DRAINING", "KV_SOURCE_LOST"]
ERRORS += ["LAYOUT_MISMATCH", "SOMETHING_NEW"]
FINAL = ["INVALID_REQUEST", "DEADLINE"]


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
    base: int
    prefill: str = ""
    decode: str = ""
    waits_for_first: bool = False
    at: int = 0
    lease: bool = False
    reports: int = 0


@dataclass
class World:
    core: Request
    truth: Undisturbed
    tries: dict[int, Try] = field(default_factory=dict)
    placing: int | None = None
    exclude: tuple[str, ...] = ()
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
                assert self.placing is None
                assert attempt == len(self.tries)
                assert len(self.emitted) < len(self.truth.worker), "placed a complete request"
                self.placing, self.exclude = attempt, exclude
            case e.CancelPlace(attempt):
                assert attempt == self.placing
                self.placing = None
                self.tries[attempt] = Try(e.Placement(e.Worker("", "")), 0)
            case e.StartPrefill(attempt, worker):
                assert worker == self.tries[attempt].placement.prefill
                self.tries[attempt].prefill = "runs"
            case e.StartDecode(attempt, worker, source):
                it = self.tries[attempt]
                assert (worker, source) == (it.placement.decode, it.placement.prefill)
                it.decode, it.waits_for_first = "runs", source is not None
                it.at = it.base
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
            case e.Report(attempt):
                self.tries[attempt].reports += 1
            case e.Emit(token_ids, _, text):
                assert token_ids or text
                self.emitted += token_ids
                self.text += text
            case e.Finish() | e.Fail():
                self.ends.append(command)

    def check(self) -> None:
        client = self.truth.client
        assert self.emitted == client[: len(self.emitted)]
        assert self.truth.text.startswith(self.text)
        live = self.tries.get(self.core.number) if self.core.state is not State.ENDED else None
        for attempt in self.tries.values():
            if attempt is live:
                assert attempt.reports == 0
                continue
            assert attempt.prefill != "runs"
            assert attempt.decode != "runs"
            assert not attempt.lease
            assert attempt.reports == 1
        if self.core.state is State.ENDED:
            assert self.placing is None
            assert self.core.owing == []


class Moves:
    """What the workers of an attempt can do next."""

    def __init__(self, world: World, number: int, draw: Callable) -> None:
        self.world, self.number, self.draw = world, number, draw
        self.it, self.truth = world.tries[number], world.truth.worker

    def possible(self) -> list[Callable[[], None]]:
        it, moves = self.it, []
        if it.prefill == "runs":
            moves += [self.prefill_accepts, self.prefill_done, self.prefill_done]
            moves += [self.prefill_fails]
        if it.prefill == "over" and self.world.core.state is State.DECODING:
            moves += [self.prefill_fails_late]
        if it.decode == "runs":
            moves += [self.decode_fails, self.decode_gives_up, self.stalls]
            if it.lease:
                moves += [self.kv_arrives]
            if not it.waits_for_first:
                moves += [self.decode_speaks] * 6
        return moves

    def error(self):
        return by_reason(self.draw(st.sampled_from([*ERRORS, *FINAL])), "broke", {})

    def chunk(self, at: int) -> tuple[tuple[int, ...], FinishReason | None]:
        count = self.draw(st.integers(1, 4))
        tokens = tuple(self.truth[at : at + count])
        ended = at + count >= len(self.truth)
        told = ended and self.draw(st.integers(0, 3)) > 0  # at times that word is lost
        return tokens, self.world.truth.worker_reason if told else None

    def prefill_accepts(self) -> None:
        self.world.feed(e.PrefillAccepted(self.number))

    def prefill_done(self) -> None:
        tokens, reason = self.chunk(self.it.base)
        self.it.prefill, self.it.lease = "over", reason is None
        kv = KvReport(cached_tokens=3, computed_tokens=7) if self.draw(st.booleans()) else None
        self.world.feed(e.PrefillDone(self.number, tokens, (), reason, b"h", kv))

    def prefill_fails(self) -> None:
        self.world.faults += 1
        self.it.prefill = "over"
        failed = e.WorkerFailed(self.number, e.Role.PREFILL, self.error(), self.draw(st.booleans()))
        self.world.feed(failed)

    def prefill_fails_late(self) -> None:
        self.world.feed(e.WorkerFailed(self.number, e.Role.PREFILL, self.error(), True))

    def decode_speaks(self) -> None:
        tokens, reason = self.chunk(self.it.at)
        self.it.at += len(tokens)
        kv = None
        if self.it.lease and self.draw(st.booleans()):
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
        if self.draw(st.booleans()):
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
        debt = self.draw(st.sampled_from(self.world.core.owing))
        self.world.feed(e.WorkerFailed(debt.attempt, debt.role, self.error(), ended=False))


def old_talk(world: World, draw: Callable) -> None:
    """Something an earlier attempt said, or says only now."""
    old = draw(st.integers(0, world.core.number - 1))
    event = draw(
        st.sampled_from(
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
    )
    assert world.core.handle(event, world.now) == []


def placement(prefill: str = "p0", decode: str = "d0") -> e.Placement:
    where = e.Worker(prefill, f"{prefill}:1") if prefill else None
    return e.Placement(e.Worker(decode, f"{decode}:1"), where, ("because",))


def placements(world: World, draw: Callable) -> None:
    number = world.placing
    decode = [d for d in ("d0", "d1", "d2", "d3") if d not in world.exclude]
    prefill = [p for p in ("p0", "p1", "p2") if p not in world.exclude]
    world.placing = None
    if not decode or draw(st.integers(0, 15)) == 0:
        world.tries[number] = Try(placement(), 0, reports=1)
        world.feed(e.Unplaced(number, NoWorkersError("no decode worker is up")))
        return
    chosen = placement(
        draw(st.sampled_from(["", *prefill, *prefill])), draw(st.sampled_from(decode))
    )
    world.tries[number] = Try(chosen, len(world.core.output))
    world.feed(e.Placed(number, chosen))


TRUTHS = st.builds(
    Undisturbed,
    st.lists(st.integers(0, 3) | st.integers(1, 3), min_size=12, max_size=12),
    st.integers(1, 12),
    st.lists(st.text("bcd", min_size=1, max_size=3), max_size=2),
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(TRUTHS, st.integers(1, 6), st.booleans(), st.data())
def test_whatever_happens(truth, max_attempts, patient, data):
    draw = data.draw
    limits = Limits(10, truth.max_tokens, 0, frozenset({EOS}), max_attempts)
    core = Request(limits, TextStream(Letters(), truth.stops), arrived=0.0)
    world = World(core, truth)
    world.obey(core.start())
    while core.state is not State.ENDED:
        moves: list[Callable[[], None]] = []
        if world.placing is not None:
            moves += [lambda: placements(world, draw)]
        elif core.number in world.tries:
            moves += Moves(world, core.number, draw).possible()
        if core.number:
            moves += [lambda: old_talk(world, draw)]
        if not patient:
            moves += [lambda: world.feed(e.ClientGone()), lambda: world.feed(e.DeadlinePassed())]
        draw(st.sampled_from(moves))()
        world.check()
    ended_silently = isinstance(world.sent[-1], e.ClientGone)
    assert len(world.ends) == (0 if ended_silently else 1)
    assert len(core.attempts) <= min(max_attempts, 1 + world.faults)
    if world.ends and isinstance(world.ends[0], e.Finish):
        assert world.emitted == truth.client == core.output
        assert world.text == truth.text
        assert world.ends[0].reason is truth.reason
        assert sum(a.tokens for a in core.attempts) == len(truth.client)
        assert core.first_token_at is not None
        assert core.placed_at <= core.first_token_at <= core.ended_at
    for event in [*world.sent, e.ClientGone(), e.DeadlinePassed()]:
        assert core.handle(event, world.now) == []


def start(*, max_attempts: int = 3, max_tokens: int = 8, stops: tuple[str, ...] = ()) -> Request:
    limits = Limits(10, max_tokens, 0, frozenset({EOS}), max_attempts)
    core = Request(limits, TextStream(Letters(), stops), arrived=0.0)
    assert core.start() == [e.Place(0, ())]
    return core


P0, D0 = placement().prefill, placement().decode


def unmeasured(commands: list[e.Command]) -> list[e.Command]:
    """Reports without their figures, which a test of their own looks at."""
    return [
        dataclasses.replace(c, generated_tokens=0, ttft_seconds=0.0, computed_tokens=0)
        if isinstance(c, e.Report)
        else c
        for c in commands
    ]


def debts(core: Request) -> list[tuple]:
    return [(d.role, d.worker, d.owed) for d in core.owing]


def lost(number: int, role: e.Role = e.Role.DECODE, reason: str = "WORKER_LOST"):
    return e.WorkerFailed(number, role, by_reason(reason, "gone", {}), unreachable=True)


def test_both_workers_start_at_once_and_the_first_token_goes_out_before_it_proceeds():
    core = start()
    assert core.handle(e.Placed(0, placement()), 1.0) == [
        e.StartPrefill(0, P0),
        e.StartDecode(0, D0, P0),
    ]
    assert debts(core) == [(e.Role.PREFILL, P0, Owed.ACCEPTANCE)]
    core.handle(e.PrefillAccepted(0), 1.5)
    assert debts(core) == [(e.Role.PREFILL, P0, Owed.PROMPT)]
    assert core.handle(e.PrefillDone(0, (1,), (), None, b"h"), 2.0) == [
        e.Emit((1,), (), "b"),
        e.Proceed(0, D0, (1,), b"h"),
    ]
    assert debts(core) == [(e.Role.PREFILL, P0, Owed.KV), (e.Role.DECODE, D0, Owed.FIRST_TOKEN)]
    core.handle(e.DecodeOutput(0, (2,), kv=KvReport()), 3.0)
    assert debts(core) == [(e.Role.DECODE, D0, Owed.TOKEN)]
    assert (core.placed_at, core.first_token_at) == (1.0, 2.0)


def test_a_first_token_that_ends_the_request_cancels_decode():
    core = start()
    core.handle(e.Placed(0, placement()), 1.0)
    assert unmeasured(core.handle(e.PrefillDone(0, (EOS,), (), FinishReason.STOP), 2.0)) == [
        e.Emit((EOS,), (), ""),
        e.CancelDecode(0, D0),
        e.Report(0),
        e.Finish(FinishReason.STOP),
    ]


def test_a_stop_string_in_the_first_token_leaves_nothing_behind():
    core = start(stops=("b",))
    core.handle(e.Placed(0, placement()), 1.0)
    assert unmeasured(core.handle(e.PrefillDone(0, (1,)), 2.0)) == [
        e.Emit((1,), (), ""),
        e.CancelDecode(0, D0),
        e.Release(0, P0),
        e.Report(0),
        e.Finish(FinishReason.STOP),
    ]


def test_a_lost_decode_worker_is_reported_excluded_and_replaced():
    core = start()
    core.handle(e.Placed(0, placement()), 1.0)
    core.handle(e.PrefillDone(0, (1,)), 2.0)
    core.handle(e.DecodeOutput(0, (2,), kv=KvReport("shm", 5, 1)), 3.0)
    assert unmeasured(core.handle(lost(0), 4.0)) == [
        e.Report(0, "d0", "WORKER_LOST", True),
        e.Place(1, ("d0",)),
    ]
    assert core.output == [1, 2]
    assert core.attempts[0].failure == "WORKER_LOST"


@pytest.mark.parametrize("reason", ["KV_SOURCE_LOST", "KV_REGION_DENIED", "NO_TRANSPORT"])
def test_a_lost_source_is_the_prefill_workers_fault_and_it_is_reachable_for_all_we_know(reason):
    core = start()
    core.handle(e.Placed(0, placement()), 1.0)
    core.handle(e.PrefillDone(0, (1,)), 2.0)
    told = by_reason(reason, "gone", {})
    commands = core.handle(e.DecodeOutput(0, (), (), FinishReason.ERROR, told), 3.0)
    assert unmeasured(commands) == [
        e.Release(0, P0),
        e.Report(0, "p0", reason, False),
        e.Place(1, ("p0",)),
    ]


def test_who_computes_the_prompt_is_told_who_holds_its_start():
    held = KvPrefix("d7", "d7:1", 32)
    core = start()
    two = dataclasses.replace(placement(), prefix=held)
    commands = core.handle(e.Placed(0, two), 1.0)
    assert commands == [e.StartPrefill(0, P0, held), e.StartDecode(0, D0, P0)]
    core = start()
    alone = dataclasses.replace(placement(""), prefix=held)
    assert core.handle(e.Placed(0, alone), 1.0) == [e.StartDecode(0, D0, None, held)]


def test_a_full_worker_is_reported_and_not_excluded():
    core = start()
    core.handle(e.Placed(0, placement()), 1.0)
    assert core.handle(lost(0, e.Role.PREFILL, "ENGINE_OVERLOADED"), 2.0)[-1] == e.Place(1, ())


def test_a_silent_worker_is_told():
    core = start()
    core.handle(e.Placed(0, placement("")), 1.0)
    failed = e.WorkerFailed(0, e.Role.DECODE, by_reason("WORKER_LOST", "", {}), ended=False)
    assert unmeasured(core.handle(failed, 2.0)) == [
        e.CancelDecode(0, D0),
        e.Report(0, "d0", "WORKER_LOST", False),
        e.Place(1, ("d0",)),
    ]


def test_the_last_token_without_the_word_finish_is_the_last_token():
    core = start(max_tokens=2)
    core.handle(e.Placed(0, placement("")), 1.0)
    assert unmeasured(core.handle(e.DecodeOutput(0, (1, 2)), 2.0)) == [
        e.Emit((1, 2), (), "bc"),
        e.CancelDecode(0, D0),
        e.Report(0),
        e.Finish(FinishReason.LENGTH),
    ]


def test_prefills_death_after_its_token_is_for_decode_to_notice():
    core = start()
    core.handle(e.Placed(0, placement()), 1.0)
    core.handle(e.PrefillDone(0, (1,)), 2.0)
    assert core.handle(lost(0, e.Role.PREFILL), 3.0) == []
    assert core.state is State.DECODING


def test_attempts_are_counted():
    core = start(max_attempts=2)
    core.handle(e.Placed(0, placement("")), 1.0)
    core.handle(lost(0), 2.0)
    core.handle(e.Placed(1, placement("", "d1")), 3.0)
    *_, fail = core.handle(lost(1), 4.0)
    assert fail.error.reason == "WORKER_LOST"
    assert "the last of 2 placements" in fail.error.message
    assert fail.error.code == "UNAVAILABLE"


def test_no_worker_left_says_what_became_of_the_last_one():
    core = start()
    core.handle(e.Placed(0, placement("")), 1.0)
    core.handle(lost(0), 2.0)
    refusal = NoWorkersError("no decode worker is up", role="decode")
    (fail,) = core.handle(e.Unplaced(1, refusal), 3.0)
    assert fail.error.reason == "NO_WORKERS"
    assert fail.error.message == (
        "no decode worker is up; the last attempt ended with WORKER_LOST: gone"
    )
    assert fail.error.metadata == {"role": "decode"}


@pytest.mark.parametrize("reason", ["INVALID_REQUEST", "DUPLICATE_REQUEST", "DEADLINE"])
def test_what_every_worker_would_say_is_not_tried_again(reason):
    core = start()
    core.handle(e.Placed(0, placement("")), 1.0)
    *_, fail = core.handle(lost(0, reason=reason), 2.0)
    assert fail.error.reason == reason


def test_a_worker_that_speaks_out_of_turn_is_replaced_before_its_tokens_count():
    core = start()
    core.handle(e.Placed(0, placement()), 1.0)
    commands = core.handle(e.DecodeOutput(0, (3,)), 2.0)
    assert commands == [
        e.CancelPrefill(0),
        e.CancelDecode(0, D0),
        e.Report(0, "d0", "ENGINE_FAILED", False),
        e.Place(1, ("d0",)),
    ]
    assert core.output == []


def test_tokens_beyond_the_limit_are_not_the_clients():
    core = start(max_tokens=2)
    core.handle(e.Placed(0, placement("")), 1.0)
    emit, *_, finish = core.handle(e.DecodeOutput(0, (1, 2, 3)), 2.0)
    assert emit.token_ids == (1, 2)
    assert finish.reason is FinishReason.LENGTH
