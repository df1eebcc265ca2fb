"""The core with its queue, predictions and health: whose turn it is, and who is better refused."""

from __future__ import annotations

import pytest

from services.coordinator.core import messages as m
from services.coordinator.core.fairness import OUTPUT_WEIGHT, Line
from services.coordinator.core.lengths import ENOUGH


class TestTurns:
    @pytest.fixture
    def full(self, cluster):
        """One worker whose whole KV pool a first request takes."""
        cluster.worker("both-0", total_blocks=9)
        cluster.place(tokens=128, request="first", tenant="heavy")
        return cluster

    def end(self, cluster, request, **more):
        cluster.do(m.AttemptEnded(request, 0, **more))

    def test_a_tenant_that_floods_does_not_keep_others_waiting(self, full):
        flood = [full.ask(request=f"f{n}", tenant="heavy") for n in range(5)]
        light = full.ask(request="light", tenant="light")
        self.end(full, "first", computed_tokens=128, generated_tokens=100)
        placed = [ticket for ticket in (*flood, light) if ticket in full.answers]
        assert len(placed) == 1
        if placed == flood[:1]:  # Both had as much since light came.
            self.end(full, "f0", computed_tokens=128, generated_tokens=100)
        assert light in full.answers
        assert flood[1] not in full.answers

    def test_priority_goes_first_and_takes_a_place_in_a_full_queue(self, full):
        usual = [full.ask(request=f"u{n}") for n in range(10)]
        assert not any(ticket in full.answers for ticket in usual)
        urgent = full.ask(request="urgent", priority=1)
        refused = full.answers[usual[-1]].refusal
        assert refused.reason is m.Reason.OVERLOADED
        assert "another took its place" in refused.message
        assert full.refuse(request="more").message.startswith("no worker has room, and 10 of 10")
        self.end(full, "first")
        assert urgent in full.answers

    def test_a_tenant_is_charged_for_what_it_was_served(self, full):
        self.end(full, "first", computed_tokens=100, generated_tokens=7)
        counter = full.core.desk.queue.fairness.counter(Line("m", 0), "heavy")
        assert counter == 100 + OUTPUT_WEIGHT * 7

    def test_a_placement_asked_for_twice_is_charged_once(self, cluster):
        cluster.worker("both-0")
        for _ in range(3):
            cluster.place(tokens=128, request="again", tenant="t")
        self.end(cluster, "again", computed_tokens=100, generated_tokens=7)
        counter = cluster.core.desk.queue.fairness.counter(Line("m", 0), "t")
        assert counter == 100 + OUTPUT_WEIGHT * 7


class TestRefusals:
    def test_a_ttft_is_refused_that_shorter_prompts_did_not_have(self, cluster):
        cluster.worker("both-0")
        for number in range(ENOUGH):
            cluster.place(tokens=512, request=f"r{number}")
            cluster.do(m.AttemptEnded(f"r{number}", 0, ttft_seconds=2.0, computed_tokens=512))
        cluster.place(tokens=1024, ttft_seconds=1.5)
        refused = cluster.refuse(tokens=1024, ttft_seconds=0.5)
        assert refused.reason is m.Reason.SLO_UNATTAINABLE
        assert refused.message == (
            "the first token is expected in 2 s (2 s for the prompt), not within 0.5 s"
        )
        assert refused.retry_seconds == 30.0
        cluster.place(tokens=256, ttft_seconds=0.5)

    def test_an_itl_is_refused_that_no_request_had_alone(self, cluster):
        cluster.worker("both-0")
        for _ in range(ENOUGH):
            cluster.now += 0.5
            cluster.beat("both-0", running=1, free_blocks=500, step_seconds=0.1)
        refused = cluster.refuse(itl_seconds=0.02)
        assert refused.reason is m.Reason.SLO_UNATTAINABLE
        assert "100 ms apart at best" in refused.message
        cluster.place(itl_seconds=0.5)

    def test_an_itl_that_is_nearly_kept_alone_is_waited_for_only_beside_others(self, cluster):
        cluster.worker("both-0", max_running=8)
        for _ in range(ENOUGH):
            cluster.now += 0.5
            cluster.beat("both-0", running=1, free_blocks=500, step_seconds=0.1)
        # Somebody else runs there, who will be done some time.
        ticket = cluster.ask(itl_seconds=0.08)
        assert ticket not in cluster.answers
        cluster.now += 0.5
        cluster.beat("both-0", running=0, free_blocks=500, step_seconds=0.1)
        assert cluster.placement(ticket).decode.worker_id == "both-0"


class TestHealth:
    def slow_down(self, cluster, names, slow):
        for number in range(12):
            cluster.now += 0.5
            for name in names:
                times = 8 if name == slow else 1
                step = times * (0.02 + number * 1e-5)
                cluster.beat(name, running=2, free_blocks=500, step_seconds=step)

    def test_a_slow_worker_gets_what_nobody_else_can_take(self, cluster):
        names = ["both-0", "both-1", "both-2"]
        for name in names:
            cluster.worker(name)
        self.slow_down(cluster, names, "both-1")
        assert "its steps take" in cluster.core.members.get("both-1").avoided
        chosen = {cluster.place().decode.worker_id for _ in range(8)}
        assert chosen <= {"both-0", "both-2"}
        where = cluster.place(exclude=["both-0", "both-2"]).decode.worker_id
        assert where == "both-1"

    def test_an_avoided_worker_computes_the_prompt_if_nobody_else_can(self, cluster):
        names = ["both-0", "both-1", "both-2"]
        for name in names:
            cluster.worker(name)
        self.slow_down(cluster, names, "both-1")
        # The other one that is well is where the KV is to go.
        placed = cluster.place(tokens=400, exclude=["both-2"])
        assert placed.decode.worker_id == "both-0"
        assert placed.prefill.worker_id == "both-1"

    def test_the_only_worker_is_never_avoided(self, cluster):
        cluster.worker("both-0")
        for _ in range(20):
            cluster.now += 1.0
            cluster.beat("both-0")
            cluster.do(m.AttemptEnded("r", 0, failed_worker="both-0", failure="INTERNAL"))
        assert cluster.core.members.get("both-0").avoided == ""
        cluster.place()
