"""Changes of role as the core sees them: asked for, told of, and what becomes of bookings."""

from __future__ import annotations

import pytest

from services.coordinator.core import messages as m
from services.coordinator.core.messages import Role

ANY = tuple(Role)


@pytest.fixture
def cluster(make_cluster):
    cluster = make_cluster(rebalance_seconds=10.0)
    for name in ("prefill-0", "decode-0", "decode-1"):
        cluster.worker(name, can_be=ANY)
    return cluster


def press(cluster, seconds=12.0):
    """Prompts pile up for so long; what is asked of workers meanwhile."""
    before = len(cluster.commands)
    cluster.beat("prefill-0", queued_tokens=30_000, prefill_tokens_per_second=1000.0, running=4)
    cluster.wait(seconds, step=0.5, beat=("prefill-0", "decode-0", "decode-1"))
    return [c for c in cluster.commands[before:] if isinstance(c, m.AskRole)]


def change(cluster, name, role):
    cluster.do(m.WorkerRoleChanged(cluster.streams[name], role))


def test_a_worker_is_asked_when_its_pool_is_out_of_balance(cluster):
    (ask,) = press(cluster)
    assert (ask.stream, ask.role) == (cluster.streams["decode-0"], Role.PREFILL)
    assert ask.why.startswith("needed: prefill ")


def test_whoever_does_not_decide_asks_nobody(cluster):
    cluster.core.decides = False
    assert press(cluster) == []


def test_who_changes_gets_the_other_half_of_the_work(cluster):
    change(cluster, "decode-0", Role.PREFILL)
    cluster.beat("prefill-0", queued_tokens=30_000)
    placement = cluster.place(128)
    assert (placement.prefill.worker_id, placement.decode.worker_id) == ("decode-0", "decode-1")
    change(cluster, "decode-0", Role.DECODE)
    change(cluster, "decode-1", Role.PREFILL)
    placement = cluster.place(128)
    assert (placement.prefill.worker_id, placement.decode.worker_id) == ("decode-1", "decode-0")


def test_bookings_stay_where_they_are_and_end_with_their_attempt(cluster):
    cluster.beat("decode-1", running=8)
    placement = cluster.place(128, request="r")
    assert placement.decode.worker_id == "decode-0"
    load = cluster.core.members.get("decode-0").load
    change(cluster, "decode-0", Role.PREFILL)
    assert load.requests == 1
    cluster.do(m.AttemptEnded("r", 0))
    assert load.requests == 0


def test_requests_that_wait_are_placed_on_who_comes(cluster):
    for name in ("decode-0", "decode-1"):
        cluster.beat(name, running=20)
    ticket = cluster.ask(128)
    assert ticket not in cluster.answers
    cluster.worker("prefill-1", can_be=ANY)
    change(cluster, "prefill-1", Role.BOTH)
    assert cluster.placement(ticket).decode.worker_id == "prefill-1"


def test_who_refuses_for_its_role_gets_nothing_until_it_says_more(cluster):
    cluster.beat("decode-1", running=8)
    placement = cluster.place(128, request="r")
    gone = placement.decode.worker_id
    cluster.do(m.AttemptEnded("r", 0, failed_worker=gone, failure="ROLE_CHANGED"))
    assert cluster.place(128, request="r", attempt=1).decode.worker_id != gone


def test_with_the_last_decode_worker_changing_requests_wait_for_one(make_cluster):
    cluster = make_cluster(wait=10.0)
    cluster.worker("prefill-0")
    cluster.worker("decode-0", can_be=ANY)
    change(cluster, "decode-0", Role.PREFILL)
    ticket = cluster.ask(128)
    assert ticket not in cluster.answers
    change(cluster, "decode-0", Role.DECODE)
    assert cluster.placement(ticket).decode.worker_id == "decode-0"


def test_nothing_changes_for_who_has_the_role_already_or_is_not_here(cluster):
    change(cluster, "decode-0", Role.DECODE)
    cluster.do(m.WorkerRoleChanged(99, Role.PREFILL))
    assert cluster.place(128).prefill.worker_id == "prefill-0"


def test_a_new_hello_tells_the_role_anew(cluster):
    change(cluster, "decode-0", Role.PREFILL)
    cluster.worker("decode-0", role=Role.PREFILL, can_be=ANY)
    cluster.beat("prefill-0", queued_tokens=30_000)
    placement = cluster.place(128)
    assert (placement.prefill.worker_id, placement.decode.worker_id) == ("decode-0", "decode-1")
