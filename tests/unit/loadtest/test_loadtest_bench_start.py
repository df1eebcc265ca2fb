"""A start's phases, read from a worker's log."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from loadtest.bench_start import FIRST_TOKEN, Reached, milestones_of, start_of
from services.runtime import milestones

BEGAN = 1_700_000_000.0


def line(at, message, logger=milestones.LOGGER):
    time = datetime.fromtimestamp(BEGAN + at, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "logger": logger, "message": message})


def said(milestone, cpu):
    return f"{milestone} after {cpu:.3f} s of CPU"


def test_the_last_start_in_a_log_counts_and_nothing_else():
    lines = [
        line(-60, said(milestones.PROCESS, 9)),
        line(-50, said(milestones.READY, 9)),
        "not JSON",
        "[1, 2]",
        json.dumps({"message": said(milestones.PROCESS, 1)}),
        line(0.5, said(milestones.PROCESS, 0.4)),
        line(0.6, said(milestones.PROCESS, 7), logger="another"),
        line(0.7, "someone says: ready after 3.000 s of CPU"),
        line(2.0, said(milestones.WEIGHTS, 1.5)),
    ]
    found = milestones_of(lines, BEGAN)
    assert set(found) == {milestones.PROCESS, milestones.WEIGHTS}
    assert found[milestones.PROCESS] == Reached(pytest.approx(BEGAN + 0.5), 0.4)
    assert found[milestones.WEIGHTS] == Reached(pytest.approx(BEGAN + 2.0), 1.5)


def test_a_process_says_its_milestones_as_they_are_read(caplog):
    with caplog.at_level("INFO"):
        milestones.reached(milestones.WARM)
    (record,) = caplog.records
    assert record.name == milestones.LOGGER
    milestone, cpu = milestones.parsed(record.getMessage())
    assert milestone == milestones.WARM
    assert cpu > 0


def test_phases_add_up_to_the_whole_start():
    reached = {
        milestones.READY: Reached(BEGAN + 3.0, 2.5),
        milestones.PROCESS: Reached(BEGAN + 0.5, 0.4),
    }
    start = start_of(reached, BEGAN, 0.25)
    assert start.phases == {milestones.PROCESS: 0.5, milestones.READY: 2.5, FIRST_TOKEN: 0.25}
    assert start.cpu == pytest.approx({milestones.PROCESS: 0.4, milestones.READY: 2.1})
