"""The benchmark of prefix indexes: that it measures what it says, on a small index."""

from __future__ import annotations

import sys

import pytest

from loadtest import bench_index, index_subject
from loadtest.index_subject import HOLDERS, WORKERS, Bench, Tandem, chain


@pytest.fixture(scope="module")
def figures():
    # In a process of its own: this one's memory may shrink while the index's grows.
    return bench_index.measure(sys.executable, "tandem", 40_000, 64)


def test_all_figures_of_the_table_are_there(figures):
    assert all(value > 0 for value in figures.values())
    lines = list(bench_index.table(64, figures, figures))
    assert len(lines) == 2 + len(list(bench_index.rows(64)))
    assert all(line.endswith("1.00x") for line in lines[2:])
    assert len(list(bench_index.table(64, figures, None))) == len(lines)


def test_blocks_are_counted_once_for_each_worker(figures):
    bench = Bench(Tandem(), 40_000, 64)
    distinct = set()
    for number in range(40_000 // 64):
        worker, _ = bench._place_of(number)
        distinct |= {(worker, key) for key in bench._sequence(number)}
    assert figures["blocks"] == len(distinct)


def test_a_ratio_says_how_many_times_better():
    less, more = bench_index.Row("memory", "m", "B"), bench_index.Row("stored", "s", "/s", True)
    ours, peers = {"m": 20.0, "s": 6e6}, {"m": 60.0, "s": 2e6}
    assert less.ratio(ours, peers) == more.ratio(ours, peers) == 3
    assert bench_index.middle([{"m": 1.0}, {"m": 9.0}, {"m": 2.0}]) == {"m": 2.0}


def test_an_index_that_is_wrong_is_not_measured():
    class Forgetful(Tandem):
        def apply(self, worker, message):
            if worker % 2:
                super().apply(worker, message)

    with pytest.raises(RuntimeError, match=f"held by {HOLDERS} workers"):
        Bench(Forgetful(), 20_000, 64).run()


def test_a_worker_that_is_dropped_holds_nothing():
    subject, keys = Tandem(), chain(index_subject.random.Random(1), 20)
    for worker in range(WORKERS):
        subject.apply(worker, subject.stored(keys, None))
    subject.drop(3)
    found = subject.answer(subject.find(subject.query(keys)))
    assert found == {worker: 20 for worker in range(WORKERS) if worker != 3}
    subject.apply(4, subject.removed(keys[5:]))
    assert subject.answer(subject.find(subject.query(keys)))[4] == 5


def test_a_peer_that_is_not_installed_is_said_to_be():
    with pytest.raises(SystemExit, match=r"dynamo failed in .*(?s:.*)--help"):
        bench_index.measure(sys.executable, "dynamo", 1000, 64)
