"""A worker leaves while it generates: the successor takes over, and nobody sees the seam."""

from __future__ import annotations

import random

import pytest

from services.engine.api import FinishReason, KvPrefix
from services.frontend import events as e
from services.frontend import moving
from services.frontend.attempt import State
from services.frontend.moving import Step
from services.frontend.output import Limits
from services.frontend.request import Request
from services.frontend.text import TextStream
from services.runtime.errors import NoWorkersError, WorkerLostError, by_reason
from tests.unit.frontend.request_world import (
    EOS,
    Letters,
    Moves,
    Undisturbed,
    World,
    check_end,
    placements,
    step,
)

SEEDS = 400


class Random:
    """Chance by seed; most steps generate, or the seams would be all there is."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def among(self, choices):
        return self._random.choice(choices)

    def count(self, low, high):
        return self._random.randint(low, high)


def a_world(seed: int) -> tuple[World, Random]:
    pick = Random(seed)
    tokens = [pick.count(1, 3) for _ in range(pick.count(40, 120))]
    truth = Undisturbed(tokens, len(tokens), ["bbbbbb"] if seed % 5 == 0 else [])
    limits = Limits(10, truth.max_tokens, 0, frozenset({EOS}), 50)
    world = World(Request(limits, TextStream(Letters(), truth.stops), arrived=0.0), truth)
    world.obey(world.core.start())
    return world, pick


def run(world: World, pick: Random, trouble: int) -> None:
    """To the end; `trouble` of 100 steps are anything at all, the others make headway."""
    while world.core.state is not State.ENDED:
        if pick.count(0, 99) < trouble:
            step(world, pick)
            continue
        if world.placing:
            placements(world, pick)
        else:
            old, *new = world.courses()
            course = pick.among([old, old, old, old, *new])
            moves = Moves(world, course.number, pick)
            if moves.it.prefill == "runs":
                moves.prefill_done()
            elif moves.it.decode == "runs" and not moves.it.waits_for_first:
                moves.leaves() if pick.count(0, 9) == 0 else moves.decode_speaks()
        world.check()
    check_end(world)


@pytest.mark.parametrize("first", range(0, SEEDS, 100))
def test_tokens_are_neither_lost_nor_repeated(first):
    moved = begun_again = 0
    for seed in range(first, first + 100):
        world, pick = a_world(seed)
        try:
            run(world, pick, trouble=(0, 10, 40)[seed % 3])
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        moved += sum(a.failure == "DRAINING" and a.tokens > 0 for a in world.core.attempts)
        begun_again += len(world.tries) - len({t.placed_as for t in world.tries.values()})
    # Otherwise this tests something else.
    assert moved > 50
    assert begun_again > 50


def test_every_worker_leaves_at_once_and_each_request_still_ends():
    world, pick = a_world(1)
    while world.core.state is not State.ENDED:
        if world.placing:
            (number,) = world.placing
            del world.placing[number]
            if len(world.core.attempts) == 0:
                world.placing[number] = ()
                placements(world, pick)
                continue
            world.reports[number] = 1
            world.feed(e.Unplaced(number, NoWorkersError("none")))
            continue
        (course,) = world.courses()
        moves = Moves(world, course.number, pick)
        if moves.it.prefill == "runs":
            moves.prefill_done()
            continue
        world.feed(e.DecodeOutput(course.number, moving=True))
        moves.decode_speaks()
    assert isinstance(world.ends[0], e.Finish)
    assert world.core.moves > 1


# The steps by themselves

OLD, NEW = e.Worker("d0", "d0:1"), e.Worker("d1", "d1:1")


def begun(tokens: int) -> Request:
    """On d0, with so many tokens of the output, d0 about to leave and d1 starting."""
    limits = Limits(10, 1000, 0, frozenset({EOS}), 3)
    core = Request(limits, TextStream(Letters(), []), arrived=0.0)
    core.start()
    core.handle(e.Placed(0, e.Placement(OLD)), 1.0)
    core.handle(e.DecodeOutput(0, (1,) * (tokens - 1)), 2.0)
    commands = core.handle(e.DecodeOutput(0, (1,), moving=True), 3.0)
    assert commands == [e.Emit((1,), (), "b"), e.Place(1, ("d0",))]
    return core


def test_the_successor_takes_the_kv_from_the_old_worker_and_no_prefill_worker_is_asked():
    core = begun(tokens=20)
    core.handle(e.DecodeOutput(0, (1,) * 2), 3.5)
    chosen = e.Placement(NEW, e.Worker("p0", "p0:1"), ("because",))
    (start,) = core.handle(e.Placed(1, chosen), 4.0)
    assert start == e.StartDecode(1, NEW, None, KvPrefix("d0", "d0:1", 31))
    assert "d0" in core.attempts[1].placement.reasons[-1]


def test_a_successor_that_is_close_takes_over_and_what_both_generated_is_dropped():
    core = begun(tokens=20)
    core.handle(e.Placed(1, e.Placement(NEW)), 4.0)
    core.handle(e.DecodeOutput(0, (1, 1)), 5.0)
    assert [d.attempt for d in core.owing] == [0, 1]
    commands = core.handle(e.DecodeOutput(1, (1, 1, 1)), 6.0)
    report = core.attempts[0]
    assert commands[0] == e.CancelDecode(0, OLD)
    told = commands[1]
    assert (told.attempt, told.failed_worker, told.failure) == (0, "", "DRAINING")
    assert told.generated_tokens == 22
    assert commands[2:] == [e.Emit((1,), (), "b")]
    assert (report.tokens, report.failure) == (22, "DRAINING")
    assert core.handle(e.DecodeOutput(0, (1,)), 7.0) == []
    assert core.handle(e.DecodeOutput(1, (2,)), 7.0) == [e.Emit((2,), (), "c")]


def test_one_that_is_far_behind_begins_again_where_its_cache_is_warm():
    core = begun(tokens=20)
    core.handle(e.Placed(1, e.Placement(NEW)), 4.0)
    core.handle(e.DecodeOutput(0, (1,) * 30), 5.0)
    commands = core.handle(e.DecodeOutput(1, (1,)), 6.0)
    assert commands == [e.CancelDecode(1, NEW), e.StartDecode(2, NEW, None)]
    assert core.handle(e.DecodeOutput(1, (1,)), 6.5) == []
    core.handle(e.DecodeOutput(0, (1, 1)), 7.0)
    # One of the two that the old one generated meanwhile: close enough.
    commands = core.handle(e.DecodeOutput(2, (1,)), 8.0)
    assert [type(c) for c in commands] == [e.CancelDecode, e.Report]
    assert core.course.number == 2
    # The end is reported of the placement, whatever the number at the worker.
    last = core.handle(e.ClientGone(), 9.0)
    assert [c.attempt for c in last] == [2, 1]
    assert (last[-1].failed_worker, last[-1].failure) == ("", "CANCELLED")


def test_a_successor_that_generates_something_else_begins_again_and_is_dropped_at_last():
    core = begun(tokens=20)
    core.handle(e.Placed(1, e.Placement(NEW)), 4.0)
    number = 1
    for rounds in range(moving.ROUNDS):
        core.handle(e.DecodeOutput(0, (1, 1)), 5.0)
        _, begins = core.handle(e.DecodeOutput(number, (3,)), 6.0)
        number = begins.attempt
        assert number == 2 + rounds
    core.handle(e.DecodeOutput(0, (1, 1)), 7.0)
    cancel, report = core.handle(e.DecodeOutput(number, (3,)), 8.0)
    assert cancel == e.CancelDecode(number, NEW)
    assert (report.attempt, report.failed_worker, report.failure) == (1, "d1", "ENGINE_FAILED")
    assert set(core.output) == {1}
    # The old one goes on, and after a while there is another try.
    assert core.handle(e.DecodeOutput(0, (1,)), 8.5) == [e.Emit((1,), (), "b")]
    later = core.handle(e.DecodeOutput(0, (1,)), 8.0 + moving.RETRY_SECONDS)
    assert later[-1] == e.Place(number + 1, ("d1", "d0"))


def test_the_old_one_hands_back_before_the_successor_is_placed():
    core = begun(tokens=20)
    leaving = by_reason("DRAINING", "bye", {})
    failed = e.DecodeOutput(0, (), (), FinishReason.ERROR, leaving)
    (report,) = core.handle(failed, 4.0)
    assert (report.attempt, report.failed_worker) == (0, "d0")
    assert core.state is State.PLACING
    # Nobody has the KV any more who could be named: it is placed as any other.
    chosen = e.Placement(NEW, e.Worker("p0", "p0:1"))
    commands = core.handle(e.Placed(1, chosen), 5.0)
    assert [type(c) for c in commands] == [e.StartPrefill, e.StartDecode]


def test_the_old_one_dies_and_the_successor_does_not_generate_all_of_it_again():
    core = begun(tokens=20)
    core.handle(e.Placed(1, e.Placement(NEW)), 4.0)
    core.handle(e.DecodeOutput(0, (1,) * 30), 5.0)
    core.handle(e.WorkerFailed(0, e.Role.DECODE, WorkerLostError("gone"), True), 6.0)
    assert core.handle(e.DecodeOutput(1, (1,)), 7.0) == [
        e.CancelDecode(1, NEW),
        e.StartDecode(2, NEW, None),
    ]
    assert core.handle(e.DecodeOutput(2, (2,)), 8.0) == [e.Emit((2,), (), "c")]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("rounds", [0, moving.ROUNDS])
def test_what_is_done_about_tokens_of_one_that_may_be_behind(ended, alone, rounds):
    known = [1, 2, 3, 4, 5, 6, 7, 8]

    def judged(at: int, *tokens: int) -> Step:
        return moving.judge(known, at, tokens, ended, rounds=rounds, alone=alone)

    far = Step.AGAIN if alone or not rounds else Step.TAKE
    other = Step.AGAIN if alone or not rounds else Step.DROP
    assert judged(8, 9) is Step.TAKE
    assert judged(6, 7, 8, 9) is Step.TAKE
    assert judged(6, 7, 8) is Step.TAKE
    assert judged(4, 5) is (Step.DROP if ended else Step.TAKE)
    assert judged(0, 1) is (Step.DROP if ended else far)
    assert judged(6, 7, 9, 9) is (Step.DROP if ended else other)
