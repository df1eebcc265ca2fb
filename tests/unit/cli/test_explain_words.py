"""How decisions are put in words."""

from __future__ import annotations

import pytest

from cli.explain import check_request_id, lines, unknown
from cli.found import named
from cli.output import UsageError
from services.runtime.client import CallFailedError, Explained
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
    assert told(ended=True).startswith("request r: answered\n")
    assert told(outcome="refused", refusal="X").startswith("request r: refused with X\n")
    assert told(outcome="waiting", queued_seconds=2.0).startswith(
        "request r: has waited 2.0 s for a place\n"
    )
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


@pytest.mark.parametrize(
    ("failure", "by", "summary", "end"),
    [
        ("DEADLINE", "", "given up: the client's deadline passed",
         "ended: the client's deadline passed after 31 of up to 300 tokens"),
        # The worker's clock may be the first that runs out.
        ("DEADLINE", "w", "given up: the client's deadline passed",
         "ended: the client's deadline passed after 31 of up to 300 tokens"),
        ("CANCELLED", "", "given up: the client went away",
         "ended: the client went away after 31 tokens"),
        ("DRAINING", "", "to be placed again: its worker was leaving",
         "moved after 31 tokens: its worker was leaving; it goes on as the next attempt"),
        ("ROLE_CHANGED", "w", "to be placed again: its worker took another role",
         "moved after 31 tokens: its worker took another role; it goes on as the next attempt"),
        ("WORKER_LOST", "w", "its last attempt failed on w with WORKER_LOST",
         "failed after 31 tokens: w was lost (WORKER_LOST)"),
        ("ENGINE_FAILED", "w", "its last attempt failed on w with ENGINE_FAILED",
         "failed after 31 tokens: w failed it (ENGINE_FAILED)"),
        ("INTERNAL", "", "given up with INTERNAL", "ended after 31 tokens with INTERNAL"),
        ("", "", "answered", "finished: 31 tokens"),
    ],
)  # fmt: skip
def test_an_end_is_called_what_it_was(failure, by, summary, end):
    text = told(
        ended=True, failed_worker=by, failure=failure, generated_tokens=31, max_tokens=300
    ).splitlines()
    assert text[0] == f"request r: {summary}"
    assert text[-1] == f"  {end}"


def test_times_say_from_when_on():
    text = told(ended=True, generated_tokens=1, ttft_seconds=0.5, predicted_ttft_seconds=0.25)
    assert "  predicted: first token 0.250 s after the placement\n" in text
    assert text.endswith("finished: 1 token; the first came 0.500 s after the placement")


def test_an_unknown_request_names_who_was_asked_and_who_was_silent():
    dead = CallFailedError("c:1", "UNAVAILABLE", "", "no route")
    text = unknown("r", Explained((), ("a:1", "b:1", "c:1"), (dead,)))
    assert text.startswith("none of a:1, b:1 remembers request r: a frontend refused it itself")
    assert text.endswith("; c:1 did not answer (UNAVAILABLE)")


@pytest.mark.parametrize("request_id", ["", "\udcff", "a b", "x" * 129])
def test_what_can_be_no_request_is_a_usage_error(request_id):
    with pytest.raises(UsageError):
        check_request_id(request_id)


@pytest.mark.parametrize("texts", [[","], [""], [" , "], ["a:1,\udcff:2"]])
def test_what_names_no_coordinator_is_a_usage_error(texts):
    with pytest.raises(UsageError):
        named(texts)


def test_coordinators_are_named_with_commas_or_one_by_one():
    assert named(["a:1, b:1,", "c:1"]) == "a:1,b:1,c:1"
