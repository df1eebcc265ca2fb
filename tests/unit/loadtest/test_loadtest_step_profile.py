"""What the profile books, and that nothing is left of it."""

from __future__ import annotations

import pytest

pytest.importorskip("numba")

from loadtest import bench_profile, engine_shapes
from loadtest.bench_profile import DECODE, PREFILL, ProfileOptions
from loadtest.step_profile import EXPERTS, LINEAR, PYTHON, Recorder, Step, recording
from services.engine.stepped import choosing
from services.engine.stepped.step import Stepper
from services.engine.torch.kernels.linear import Linear
from services.engine.torch.kernels.team import Call


class Clock:
    """Tells what it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_time_is_booked_once_on_the_stage_it_is_spent_in():
    clock = Clock()
    recorder = Recorder(clock)

    def spend(seconds):
        clock.now += seconds

    linear = recorder.timed(LINEAR, spend)
    nested = recorder.timed(EXPERTS, lambda: linear(2))
    stage = recorder.stage(EXPERTS, lambda: (spend(0.5), linear(4)))
    recorder.begin()
    recorder.planned([1, 3])
    linear(1)
    nested()
    stage()
    linear(8)
    recorder.begin()
    (step,) = recorder.steps
    assert (step.sequences, step.rows, step.longest) == (2, 4, 3)
    assert step.parts == {LINEAR: 9, EXPERTS: 6}
    assert step.python == pytest.approx(0.5)


def test_turns_without_work_are_no_steps():
    recorder = Recorder(Clock())
    recorder.begin()
    recorder.planned([])
    recorder.begin()
    recorder.begin()
    assert recorder.steps == []


def test_wrappers_are_gone_afterwards_even_after_a_failure():
    def present():
        return Stepper.plan, choosing.choose, Linear.__call__, Call.run

    def fail():
        assert not set(present()) & set(was)
        raise ZeroDivisionError

    was = present()
    with pytest.raises(ZeroDivisionError), recording(Recorder()):
        fail()
    assert present() == was


def test_steps_of_another_kind_and_of_unusual_length_are_left_out():
    usual = [Step(4, 4, 1, seconds, {LINEAR: 0.5}) for seconds in (1.0, 1.0, 1.1, 9.0)]
    others = [Step(3, 3, 1, 5.0), Step(4, 40, 37, 5.0)]
    found = bench_profile.profile(usual + others, DECODE, 4)
    assert found.steps == 2
    assert found.milliseconds == pytest.approx(1050)
    assert found.parts[PYTHON] == pytest.approx(550)
    assert bench_profile.profile(usual, PREFILL, 1) is None


def test_a_whole_engine_with_experts_is_profiled(tmp_path):
    folder = engine_shapes.write(engine_shapes.SHAPES["tiny"], tmp_path)
    options = ProfileOptions(
        model="deepseek", path=str(folder), threads=1, batches=(2,), context=40, steps=6
    )
    report = bench_profile.run_now(options, lambda _: None)
    assert [p.phase for p in report.profiles] == [PREFILL, DECODE]
    for p in report.profiles:
        assert sum(p.parts.values()) == pytest.approx(p.milliseconds)
        assert p.parts[EXPERTS] > 0
        assert p.parts["attention"] > 0
        assert 0 < p.python_share < 1
