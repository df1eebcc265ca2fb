"""Requests wait a while for decode workers to come back, and no longer."""

from __future__ import annotations

import pytest

from services.coordinator.core import messages as m

WAIT = 5.0


@pytest.fixture
def cluster(make_cluster):
    cluster = make_cluster(wait=WAIT)
    cluster.worker("prefill-0")
    cluster.worker("decode-0")
    return cluster


def dies(cluster, name="decode-0"):
    cluster.do(m.StreamLost(cluster.streams[name]))


def test_who_asks_meanwhile_is_placed_on_the_one_that_comes_back(cluster):
    dies(cluster)
    ticket = cluster.ask()
    cluster.wait(WAIT / 2, beat=["prefill-0"])
    assert ticket not in cluster.answers
    cluster.worker("decode-1")
    assert cluster.placement(ticket).decode.worker_id == "decode-1"


@pytest.mark.parametrize("with_prefill", [True, False])
def test_none_comes_back_and_the_refusal_says_how_long_that_was(cluster, with_prefill):
    if not with_prefill:
        dies(cluster, "prefill-0")
    dies(cluster)
    cluster.wait(1, beat=["prefill-0"] if with_prefill else [])
    ticket = cluster.ask()
    cluster.wait(WAIT - 1.2, beat=["prefill-0"] if with_prefill else [])
    assert ticket not in cluster.answers
    cluster.wait(0.4, beat=["prefill-0"] if with_prefill else [])
    refusal = cluster.answers[ticket].refusal
    assert refusal.reason is m.Reason.NO_WORKERS
    assert refusal.message.endswith(("waited 4.0 s for one", "waited 4.1 s for one"))
    # The loss is no news any more: nobody waits again.
    assert cluster.refuse().reason is m.Reason.NO_WORKERS


def test_the_deadline_comes_first(cluster):
    dies(cluster)
    ticket = cluster.ask(timeout=1.0)
    cluster.wait(1.2, beat=["prefill-0"])
    assert cluster.answers[ticket].refusal.reason is m.Reason.DEADLINE


def test_a_worker_that_only_this_request_may_not_use_is_not_waited_for(cluster):
    assert cluster.refuse(exclude=["decode-0"]).reason is m.Reason.NO_WORKERS


def test_one_that_a_frontend_could_not_reach_may_be_about_to_be_replaced(cluster):
    first = cluster.ask(request="r")
    assert cluster.placement(first)
    cluster.do(m.AttemptEnded("r", 0, "decode-0", "WORKER_LOST", unreachable=True))
    again = cluster.ask(request="r", attempt=1, exclude=["decode-0"])
    assert again not in cluster.answers
    dies(cluster)
    cluster.worker("decode-1")
    assert cluster.placement(again).decode.worker_id == "decode-1"


def test_one_that_drains_too(cluster):
    cluster.do(m.WorkerDraining(cluster.streams["decode-0"]))
    ticket = cluster.ask()
    assert ticket not in cluster.answers
    cluster.worker("decode-1")
    assert cluster.placement(ticket).decode.worker_id == "decode-1"


def test_another_models_loss_is_no_reason_to_wait(cluster):
    cluster.worker("decode-7", model="n")
    dies(cluster, "decode-7")
    assert cluster.refuse(exclude=["decode-0"]).reason is m.Reason.NO_WORKERS


def test_a_request_too_long_for_anybody_is_refused_at_once(cluster):
    cluster.worker("decode-1", context_tokens=256)
    dies(cluster)
    assert cluster.refuse(5000).reason is m.Reason.INVALID_REQUEST
