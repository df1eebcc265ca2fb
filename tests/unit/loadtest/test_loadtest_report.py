"""Reports: there and back, refusals, comparisons, tables and plots."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from loadtest import environment, measures, plot, processes, report, tables
from loadtest.drive import Ended
from loadtest.errors import PlotUnavailableError, ProcessError, ReportError
from loadtest.measures import Slo
from loadtest.options import Load, LoadOptions
from loadtest.outcome import Outcome
from loadtest.processes import ProcessMeter, ProcessUsage


def make(speed=1.0, failed=0, **more):
    outcomes = [
        Outcome(i, i * 1.0, i + 0.001, i + 3 / speed, 10, ((i + 1 / speed, 1), (i + 3 / speed, 2)))
        for i in range(7)
    ]
    outcomes += [Outcome(7 + i, 3.0, 3.0, 3.5, 10, (), "OVERLOADED") for i in range(failed)]
    options = LoadOptions(
        "127.0.0.1:1", seed=5, load=Load(loop="open", rate=2.0), slo=Slo(2.0, None)
    )
    made = report.Report(
        schema=report.SCHEMA,
        created="2026-01-01T00:00:00+00:00",
        model="m",
        ended_by=Ended.REQUESTS,
        options=options,
        environment=environment.here(),
        numbers=measures.numbers(outcomes, 0.0, options.slo),
        processes=(ProcessUsage("decode-0", 3, 1.5, 214.3, 1, 2, 3, False),
                   ProcessUsage("loadtest", 4, 0.1, 14.3, 1, 2, 3, False)),
        notes=("a note",),
        error_examples={"OVERLOADED": "the queue is full :100: [red]"} if failed else {},
        rows=tuple(report.row(o, 0.0) for o in outcomes),
    )  # fmt: skip
    return replace(made, **more)


def printed(show, *reports):
    console = Console(file=io.StringIO(), width=120)
    show(*reports, console)
    return console.file.getvalue()


def test_a_report_comes_back_as_it_was(tmp_path):
    made = make(failed=2)
    report.write(made, tmp_path / "new" / "a.json")
    assert report.read(tmp_path / "new" / "a.json") == made


def test_json_says_what_it_is():
    found = json.loads(report.to_json(make()))
    assert found["schema"] == "tandem.loadtest/1"
    assert found["options"]["seed"] == 5
    assert found["environment"]["cores"] >= 1
    assert found["numbers"]["ttft"]["count"] == 7
    assert len(found["rows"]) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "schema None"),
        ('{"schema": "tandem.loadtest/99"}', "schema 'tandem.loadtest/99'; expected"),
        ('{"schema": "tandem.loadtest/1"}', "created: Field required"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, text, words):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ReportError) as caught:
        report.read(file)
    assert words in str(caught.value)


def test_the_table_has_everything_a_person_asks_for():
    text = printed(tables.show, make(failed=2))
    for expected in ("TTFT", "ITL", "TPOT", "E2E", "lateness", "p99", "OVERLOADED", "goodput",
                     "decode-0", "214.30", "a note", "the queue is full :100: [red]"):  # fmt: skip
        assert expected in text


def test_a_run_in_which_nothing_succeeded_is_shown_too():
    empty = replace(make(), numbers=measures.numbers([], 0.0, None), rows=None, processes=())
    assert "TTFT" in printed(tables.show, empty)


def test_comparison_gives_ratios_and_names_what_differs():
    fast = make(speed=2.0)
    fast = replace(fast, options=replace(fast.options, load=Load(loop="open", rate=9.0)))
    text = printed(tables.compare, make(), fast)
    ttft = next(line for line in text.splitlines() if "TTFT p50" in line)
    assert [c.strip(" │") for c in ttft.split("│")[2:5]] == ["1000.00", "500.00", "0.500"]
    assert "differs: load.rate: 2.0 | 9.0" in text
    assert "load.loop" not in text


def test_cpu_of_the_cluster_leaves_the_generator_out():
    assert tables.cpu_ms_per_request(make()) == pytest.approx(214.3)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="extra `plot`")
def test_a_plot_is_a_png_even_of_nothing(tmp_path):
    empty = replace(make(), numbers=measures.numbers([], 0.0, None))
    plot.draw([("a", make()), ("b", empty)], tmp_path / "x" / "a.png")
    assert (tmp_path / "x" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlotUnavailableError, match=r"tandem-serving\[plot\]"):
        plot.check_available()


def test_cpu_time_and_memory_of_processes_are_measured():
    meter = ProcessMeter({"me": os.getpid()}, own=False)
    before = os.times()
    while sum(os.times()[:2]) - sum(before[:2]) < 0.2:
        sum(range(10_000))
    memory = meter.sample()
    (usage,) = meter.usage(requests=10)
    assert usage.cpu_seconds == pytest.approx(0.2, abs=0.1)
    assert usage.cpu_ms_per_request == pytest.approx(usage.cpu_seconds * 100)
    assert memory["me"].rss_bytes == usage.rss_last_bytes > 2**20
    assert 0 < memory["me"].private_bytes <= usage.rss_last_bytes
    assert not usage.gone


def test_a_process_that_dies_keeps_what_was_seen_of_it():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    meter = ProcessMeter({"child": child.pid}, own=False)
    meter.sample()
    child.kill()
    assert os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert meter.sample() == {}  # a zombie has no memory to measure
    child.communicate()
    assert meter.sample() == {}
    (usage,) = meter.usage(requests=0)
    assert usage.gone
    assert usage.rss_last_bytes > 0
    assert usage.cpu_ms_per_request is None


def test_a_pid_that_is_not_there_is_named():
    with pytest.raises(ProcessError, match="frontend, pid 4194304999"):
        ProcessMeter({"frontend": 4194304999})


def test_who_listens_is_found():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert processes.listener(f"127.0.0.1:{server.getsockname()[1]}") == os.getpid()
        port = server.getsockname()[1]
    assert processes.listener(f"127.0.0.1:{port}") is None
