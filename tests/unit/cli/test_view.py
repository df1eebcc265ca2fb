"""What `tandem status` says, and that it fits a terminal."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from cli import view
from kvtransfer.observe import Figures, Traffic
from services.runtime.client import Rank, Status, Worker

WHY = "shm fits; not nixl: NIXL is not installed"


def worker(name: str, **more) -> Worker:
    role = name.split("-")[0]
    values = {
        "worker_id": f"{name}-a1b2c3", "role": role, "model": "m", "address": "127.0.0.1:41234",
        "pid": 1234567, "running": 12, "waiting": 345, "free_blocks": 3, "cached_blocks": 12345,
        "held_blocks": 1234, "total_blocks": 16384, "leases": 12, "finished": 123456,
        "step_seconds": 0.1234, "kv_bytes": {"shm": 5 * 2**20}, "kv_refused": 0,
        "leases_expired": 0, "draining": False, "silent_seconds": 0.1,
        "kv_transports": ("shm", "tcp"),
    }  # fmt: skip
    return Worker(**values | more)


def status(*workers: Worker) -> Status:
    return Status(workers, queued=1, placed=10, refused={"OVERLOADED": 2}, uptime_seconds=100.0)


def shown(what: Status, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(view.cluster(what))
    return out.getvalue().splitlines()


def test_at_80_columns_no_figure_is_cut():
    lines = shown(status(worker("prefill-0"), worker("decode-10", draining=True)), 80)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    for line, name in zip(lines[1:3], ("prefill-0-a1b2c3", "decode-10-a1b2c3"), strict=True):
        assert line.startswith(name)
        for figure in ("1234567", "345", "123.4 ms", "123456", "1234/16384", "12345"):
            assert figure in line


def test_a_name_that_does_not_say_its_role_gets_it():
    assert "big-a1b2c3 (decode)" in shown(status(worker("big", role="decode")), 120)[1]


@pytest.mark.parametrize(
    ("more", "state"),
    [
        ({"draining": True}, "is draining"),
        ({"silent_seconds": 3.2}, "was silent for 3 s"),
        ({"avoided": "it fails"}, "is avoided: it fails"),
    ],
)
def test_a_worker_that_is_not_simply_up(more, state):
    assert f"prefill-0-a1b2c3 {state}" in shown(status(worker("prefill-0", **more)), 80)


def test_ranks_of_a_worker_are_shown_one_by_one():
    ranks = (Rank(running=3, waiting=1, free_blocks=80), Rank(running=0, waiting=0, free_blocks=99))
    assert (
        "decode-0-a1b2c3 ranks: 0: 3 run, 1 wait, 80 blocks free, 1: 0 run, 0 wait, 99 blocks free"
    ) in shown(status(worker("decode-0", ranks=ranks)), 120)
    assert "ranks" not in "".join(shown(status(worker("decode-0", ranks=ranks[:1])), 120))


def test_what_workers_that_are_gone_had_moved_still_counts():
    gone = dataclasses.replace(status(worker("decode-0")), kv_bytes_gone=3 * 2**20)
    assert "8.0 MiB of KV moved" in view.summary(gone)


def test_which_transports_are_offered_were_used_and_why():
    moved = Figures(fetches=7, bytes=20 * 2**20, blocks=70, seconds=1.0, exposed_seconds=0.05)
    refused = Figures(fetches=1, refused=1)
    one = worker(
        "decode-0",
        kv_not_offered={"nixl": "NIXL is not installed"},
        kv_traffic=(
            Traffic("shm", "", moved, WHY),
            Traffic("", "", refused),
            Traffic("shm", "127.0.0.1:1", moved, WHY),
        ),
    )
    other = dataclasses.replace(
        one,
        worker_id="decode-1-a1b2c3",
        kv_traffic=(Traffic("shm", "", Figures(fetches=5, bytes=14 * 2**20, lost=2), WHY),),
    )
    assert view.transports(status(one, other)) == [
        "KV transports offered: shm, tcp; not nixl: NIXL is not installed",
        "no transport: 1 fetches, 1 refused",
        f"shm: 12 fetches, 34.0 MiB, 50.0 ms of it exposed, 2 lost ({WHY})",
    ]


def test_what_comes_of_drafts_is_told():
    drafting = worker("decode-0", draft_tokens=200, accepted_tokens=150, decode_steps=100)
    assert view.drafts(status(worker("prefill-0"), drafting)) == [
        "decode-0-a1b2c3 drafts: 2.50 tokens a step and request, 75% of 200 accepted"
    ]


def test_workers_that_offer_others_are_named():
    lines = view.transports(status(worker("prefill-0"), worker("decode-0", kv_transports=("tcp",))))
    assert lines == [
        "KV transports offered by prefill-0-a1b2c3: shm, tcp",
        "KV transports offered by decode-0-a1b2c3: tcp",
    ]


def test_what_workers_call_themselves_drives_no_terminal():
    evil = "\x1b[2J[/red]\u202e\nall is well"
    one = worker(
        f"prefill-0{evil}",
        kv_transports=(evil,),
        kv_not_offered={evil: evil},
        draining=True,
    )
    text = "\n".join(shown(Status((one,), 0, 0, {evil: 1}, 1.0), 1000))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\nall is well" not in text
    assert text.count(r"\x1b[2J[/red]\u202e\nall is well") == 6
