"""The request core against simulated workers that refuse, die, stall, leave and talk late.

Whatever happens on the way, what the client gets is a prefix of what an undisturbed run gives, and
all of it if the request finishes; it ends once; nothing that was started is left behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.api import FinishReason, KvPrefix, KvReport
from services.frontend import events as e
from services.frontend.attempt import State
from services.frontend.faults import FINAL, REFUSALS
from services.frontend.output import Limits
from services.frontend.patience import Owed
from services.frontend.request import Request
from services.frontend.text import TextStream
from services.runtime.errors import NoWorkersError, by_reason
from tests.unit.frontend.request_world import (
    EOS,
    Letters,
    Undisturbed,
    World,
    check_end,
    placement,
    step,
)


class Drawn:
    """Chance that hypothesis shrinks."""

    def __init__(self, draw: Callable) -> None:
        self.draw = draw

    def among(self, choices):
        return self.draw(st.sampled_from(choices))

    def count(self, low, high):
        return self.draw(st.integers(low, high))


TRUTHS = st.builds(
    Undisturbed,
    st.lists(st.integers(0, 3) | st.integers(1, 3), min_size=30, max_size=30)
    | st.lists(st.integers(1, 3), min_size=30, max_size=30),
    st.integers(1, 30),
    st.lists(st.text("bcd", min_size=1, max_size=3), max_size=2),
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(TRUTHS, st.integers(1, 6), st.booleans(), st.data())
def test_whatever_happens(truth, max_attempts, patient, data):
    limits = Limits(10, truth.max_tokens, 0, frozenset({EOS}), max_attempts)
    core = Request(limits, TextStream(Letters(), truth.stops), arrived=0.0)
    world = World(core, truth)
    world.obey(core.start())
    ends = [] if patient else [e.ClientGone(), e.DeadlinePassed()]
    while core.state is not State.ENDED:
        step(world, Drawn(data.draw), [lambda end=end: world.feed(end) for end in ends])
    check_end(world)


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


@pytest.mark.parametrize(
    ("end", "failure"),
    [
        (e.ClientGone(), "CANCELLED"),
        (e.ClientGone("INTERNAL"), "INTERNAL"),
        (e.DeadlinePassed(), "DEADLINE"),
    ],
)
def test_an_end_that_is_no_workers_doing_is_reported_as_what_it_is(end, failure):
    core = start()
    core.handle(e.Placed(0, placement()), 1.0)
    core.handle(e.PrefillDone(0, (1,)), 2.0)
    (report,) = [c for c in core.handle(end, 3.0) if isinstance(c, e.Report)]
    assert (report.failed_worker, report.failure, report.generated_tokens) == ("", failure, 1)
    (report,) = [c for c in start().handle(end, 3.0) if isinstance(c, e.Report)]
    assert (report.failed_worker, report.failure) == ("", failure)


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


def test_refusals_of_full_workers_weigh_little_but_not_nothing():
    core = start()
    most = REFUSALS * core.limits.max_attempts
    for attempt in range(most - 1):
        core.handle(e.Placed(attempt, placement()), 1.0)
        last = core.handle(lost(attempt, e.Role.PREFILL, "ENGINE_OVERLOADED"), 2.0)[-1]
        assert last == e.Place(attempt + 1, ())
    core.handle(e.Placed(most - 1, placement()), 1.0)
    last = core.handle(lost(most - 1, e.Role.PREFILL, "ENGINE_OVERLOADED"), 2.0)[-1]
    assert isinstance(last, e.Fail)
    assert last.error.reason == "ENGINE_OVERLOADED"


def test_workers_that_leave_are_excluded_and_not_counted_as_failures():
    core = start(max_attempts=1)
    for attempt in range(REFUSALS - 1):
        core.handle(e.Placed(attempt, placement("")), 1.0)
        last = core.handle(lost(attempt, e.Role.DECODE, "DRAINING"), 2.0)[-1]
        assert last == e.Place(attempt + 1, ("d0",))
    core.handle(e.Placed(REFUSALS - 1, placement("")), 1.0)
    last = core.handle(lost(REFUSALS - 1, e.Role.DECODE, "DRAINING"), 2.0)[-1]
    assert (last.error.reason, last.error.metadata["attempts"]) == ("NO_WORKERS", str(REFUSALS))


def test_a_worker_that_says_that_it_is_lost_is_reported_as_gone():
    """So that the coordinator waits for another, rather than finding none but this one."""
    core = start()
    core.handle(e.Placed(0, placement("")), 1.0)
    lost = by_reason("WORKER_LOST", "the engine stopped", {})
    output = e.DecodeOutput(0, (), finish_reason=FinishReason.ERROR, error=lost)
    commands = unmeasured(core.handle(output, 2.0))
    assert commands == [e.Report(0, "d0", "WORKER_LOST", True), e.Place(1, ("d0",))]


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


@pytest.mark.parametrize("reason", sorted(FINAL))
def test_what_every_worker_would_say_is_not_tried_again_and_is_nobodys_failure(reason):
    core = start()
    core.handle(e.Placed(0, placement("")), 1.0)
    error = by_reason(reason, "as it is", {})
    failed = e.WorkerFailed(0, e.Role.DECODE, error, ended=True)
    assert core.handle(failed, 2.0) == [e.Report(0, "", reason, False), e.Fail(error)]


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
