"""How decisions are put in words."""

from __future__ import annotations

from cli.explain import lines
from services.runtime.explained import Considered, Decision


def worker(name, role="decode", *, chosen=False, rejected="", **scores):
    total = sum(scores.values())
    return Considered(name, role, chosen, rejected, total, scores, 0, 0.0, 0)


def decision(**more):
    fields = {
        "coordinator_id": "c",
        "attempt": 0,
        "asked_seconds_ago": 1.0,
        "model": "m",
        "tenant": "",
        "priority": 0,
        "session": "",
        "adapter": "",
        "context_tokens": 10,
        "max_tokens": 5,
        "deadline_seconds": 0.0,
        "wanted_ttft_seconds": 0.0,
        "wanted_itl_seconds": 0.0,
        "exclude_workers": (),
        "allowed_regions": (),
        "waits": (),
        "considered": (),
        "queued_seconds": 0.0,
        "outcome": "placed",
        "reasons": (),
        "refusal": "",
        "predicted_ttft_seconds": 0.0,
        "predicted_itl_seconds": 0.0,
        "ended": False,
        "failed_worker": "",
        "failure": "",
        "generated_tokens": 0,
        "ttft_seconds": 0.0,
    }
    return Decision(**(fields | more))


def told(**more):
    return "\n".join(lines("r", [decision(**more)]))


def test_the_winner_says_what_made_the_difference_and_losers_what_they_lacked():
    some = (
        worker("a", chosen=True, cached_prefix=0.9, batch_room=0.5, closeness=0.5),
        worker("b", cached_prefix=0.0, batch_room=0.8, closeness=0.5),
        worker("c", rejected="no room: 8 of 8 requests"),
    )
    text = told(considered=some)
    assert "a   1.90  chosen: cached_prefix 0.90, batch_room 0.50\n" in text
    assert "b   1.30  against it: cached_prefix -0.90, batch_room +0.30\n" in text
    assert text.endswith("c    out  no room: 8 of 8 requests")


def test_a_draw_is_called_one():
    some = (worker("a", chosen=True, batch_room=1.0), worker("b", batch_room=1.0))
    text = told(considered=some)
    assert "chosen: all were as good" in text
    assert "as good: the draw decided" in text


def test_what_becomes_of_it_is_in_the_first_line():
    assert told().startswith("request r: runs\n")
    assert told(ended=True).startswith("request r: done\n")
    assert told(outcome="refused", refusal="X").startswith("request r: refused with X\n")
    assert told(outcome="waiting", queued_seconds=2.0).startswith("request r: waits for a place")
    failed = told(ended=True, failed_worker="w", failure="WORKER_LOST")
    assert failed.startswith("request r: its last attempt failed on w with WORKER_LOST\n")


def test_all_that_was_wanted_is_said():
    text = told(
        tenant="t",
        priority=3,
        session="s",
        adapter="legal",
        allowed_regions=("eu",),
        deadline_seconds=30.0,
        wanted_ttft_seconds=1.5,
        wanted_itl_seconds=0.05,
    )
    assert "tenant t; priority 3; session s; adapter legal; only in eu; 30.0 s to" in text
    assert "first token within 1.5 s; at most 50 ms between tokens" in text
