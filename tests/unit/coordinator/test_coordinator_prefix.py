"""Who is named as the holder of a prompt's start, and which pairs the rules for KV leave."""

from __future__ import annotations

import random

import pytest

from kvtransfer.policy import ExportPolicy
from services.coordinator.core import messages as m


def two_and_two(cluster, **info):
    for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
        cluster.worker(name, **info)


def test_the_holder_of_most_is_named_where_it_is_not_the_one_that_computes(cluster, make_keys):
    two_and_two(cluster)
    prompt = make_keys(8)
    cluster.holds("prefill-0", prompt[:2])
    cluster.holds("decode-0", prompt[:6])
    # Busy: its prefix does not make up for its queue.
    cluster.beat("decode-0", running=20)
    placement = cluster.place(130, prompt=prompt)
    assert placement.decode.worker_id == "decode-1"
    assert placement.prefill.worker_id == "prefill-0"
    assert placement.prefix == m.Holder("decode-0", "decode-0:1", 96)
    words = "decode-0 holds 96 of 130 prompt tokens: prefill-0 may fetch them"
    assert placement.reasons[-1] == words


def test_nobody_is_named_who_holds_no_more(cluster, make_keys):
    two_and_two(cluster)
    prompt = make_keys(8)
    cluster.holds("prefill-0", prompt[:4])
    cluster.holds("decode-0", prompt[:4])
    assert cluster.place(130, prompt=prompt).prefix is None
    assert cluster.place(130, prompt=make_keys(8, family=1)).prefix is None


def test_the_last_token_is_no_reason_to_name_anybody(cluster, make_keys):
    """Of 128 tokens in 8 full blocks one has to be computed: 7 are of use."""
    two_and_two(cluster)
    prompt = make_keys(8)
    cluster.holds("prefill-0", prompt[:7])
    cluster.holds("prefill-1", prompt)
    cluster.beat("prefill-1", queued_tokens=100_000)
    assert cluster.place(128, prompt=prompt).prefix is None


def test_a_decode_worker_that_computes_is_told_too(make_cluster, make_keys):
    cluster = make_cluster(local=1000)
    two_and_two(cluster)
    prompt = make_keys(8)
    cluster.holds("decode-0", prompt)
    cluster.beat("decode-0", running=20)
    placement = cluster.place(130, prompt=prompt)
    assert (placement.decode.worker_id, placement.prefill) == ("decode-1", None)
    assert placement.prefix == m.Holder("decode-0", "decode-0:1", 128)


@pytest.mark.parametrize(
    "held", [{"numerics": "other"}, {"kv_layout": "other"}, {"export_policy": ExportPolicy("far")}]
)
def test_kv_that_is_no_good_there_or_may_not_come_is_not_named(cluster, make_keys, held):
    for name in ("prefill-0", "decode-0"):
        cluster.worker(name)
    cluster.worker("decode-1", **held)
    prompt = make_keys(8)
    cluster.holds("decode-1", prompt)
    cluster.beat("decode-1", running=20)
    assert cluster.place(130, prompt=prompt).prefix is None


def test_a_worker_that_failed_the_request_is_not_named(cluster, make_keys):
    two_and_two(cluster)
    prompt = make_keys(8)
    cluster.holds("prefill-1", prompt)
    placement = cluster.place(130, prompt=prompt, exclude=["prefill-1"])
    assert placement.prefill.worker_id == "prefill-0"
    assert placement.prefix is None


def test_of_equals_the_nearest_is_named(cluster, make_keys):
    cluster.worker("prefill-0", host="a")
    cluster.worker("decode-0", host="c")
    for name, host in (("decode-1", "b"), ("decode-2", "a"), ("decode-3", "b")):
        cluster.worker(name, host=host)
    prompt = make_keys(8)
    for name in ("decode-1", "decode-2", "decode-3"):
        cluster.holds(name, prompt)
        cluster.beat(name, running=20)
    assert cluster.place(130, prompt=prompt).prefix.worker_id == "decode-2"


def test_what_all_ask_for_is_not_asked_of_one_holder(make_cluster, make_keys):
    cluster = make_cluster(draw=random.Random(1).random)
    for name in ("prefill-0", "decode-0"):
        cluster.worker(name, max_running=1000, total_blocks=10_000)
    prompt = make_keys(8)
    holders = [f"decode-{i}" for i in range(1, 17)]
    for name in holders:
        cluster.worker(name)
        cluster.holds(name, prompt)
        cluster.beat(name, running=20)
    named = {cluster.place(130, prompt=prompt).prefix.worker_id for _ in range(64)}
    assert len(named) > 8
    assert named <= set(holders)


class TestRegions:
    def test_prefill_is_where_its_kv_may_go_from(self, cluster):
        eu, us = ({"region": r, "export_policy": ExportPolicy(r)} for r in ("eu", "us"))
        cluster.worker("prefill-0", **us)
        cluster.worker("prefill-1", **us)
        cluster.worker("prefill-2", **eu)
        cluster.worker("decode-0", **eu)
        cluster.beat("prefill-2", queued_tokens=100_000)
        assert cluster.place(130).prefill.worker_id == "prefill-2"

    def test_with_none_that_may_the_decode_worker_computes(self, cluster):
        cluster.worker("prefill-0", region="us", export_policy=ExportPolicy("us"))
        cluster.worker("decode-0", region="eu")
        placement = cluster.place(130)
        assert placement.prefill is None
        words = "computed on decode-0: no prefill worker may send KV to its region"
        assert placement.reasons[-1] == words

    def test_a_full_worker_that_may_is_waited_for(self, cluster):
        cluster.worker("prefill-0", region="us", export_policy=ExportPolicy("us"))
        cluster.worker("prefill-1", region="eu", export_policy=ExportPolicy("eu"))
        cluster.worker("decode-0", region="eu")
        cluster.beat("prefill-1", running=20)
        cluster.beat("decode-0", running=1)
        ticket = cluster.ask(130)
        assert ticket not in cluster.answers
        cluster.beat("prefill-1")
        assert cluster.placement(ticket).prefill.worker_id == "prefill-1"

    def test_a_tenants_rule_counts_for_its_requests(self, cluster):
        rules = ExportPolicy(tenant_regions={"bank": ("eu",)})
        cluster.worker("prefill-0", region="eu", export_policy=rules)
        cluster.worker("decode-0", region="us")
        assert cluster.place(130, tenant="bank").prefill is None
        assert cluster.place(130, tenant="shop").prefill.worker_id == "prefill-0"


def test_a_worker_that_drains_still_has_what_it_holds(cluster, make_keys):
    two_and_two(cluster)
    prompt = make_keys(8)
    cluster.holds("decode-0", prompt[:6])
    cluster.do(m.WorkerDraining(cluster.streams["decode-0"]))
    placement = cluster.place(130, prompt=prompt)
    assert placement.decode.worker_id == "decode-1"
    assert placement.prefix == m.Holder("decode-0", "decode-0:1", 96)
    cluster.do(m.StreamLost(cluster.streams["decode-0"]))
    assert cluster.place(130, prompt=prompt).prefix is None
