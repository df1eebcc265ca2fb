"""What a request asks for beyond room: regions, adapters, sessions, service levels, deadlines."""

from __future__ import annotations

from services.coordinator.core import messages as m


def rate(tokens_per_second, **stats):
    return m.WorkerStats(
        **{"free_blocks": 512, "prefill_tokens_per_second": tokens_per_second, **stats}
    )


class TestRegions:
    def test_residency_bars_all_others(self, cluster):
        cluster.worker("decode-us", region="us")
        cluster.worker("decode-eu", region="eu", stats=m.WorkerStats(running=7, free_blocks=99))
        cluster.worker("prefill-us", region="us")
        placement = cluster.place(128, allowed_regions=frozenset({"eu"}))
        assert (placement.decode.worker_id, placement.prefill) == ("decode-eu", None)

    def test_a_prefix_is_not_taken_from_where_it_may_not_be(self, cluster, make_keys):
        cluster.worker("decode-eu", region="eu")
        cluster.worker("decode-us", region="us")
        cluster.holds("decode-us", make_keys(8))
        assert cluster.place(160, allowed_regions=frozenset({"eu"})).prefix is None
        assert cluster.place(160).decode.worker_id == "decode-us"

    def test_nowhere_to_go_is_said(self, cluster):
        cluster.worker("decode-us", region="us")
        refused = cluster.refuse(32, allowed_regions=frozenset({"eu"}))
        assert refused.reason is m.Reason.NO_WORKERS
        assert "up in eu, where the request may go" in refused.message

    def test_the_frontends_own_region_is_preferred(self, cluster):
        for number in range(20):
            cluster.worker(f"decode-us{number}", region="us")
        cluster.worker("decode-eu", region="eu", stats=m.WorkerStats(running=1, free_blocks=512))
        assert cluster.place(32, region="eu").decode.worker_id == "decode-eu"

    def test_known_round_trips_decide(self, make_cluster):
        cluster = make_cluster(region_seconds={("eu", "us"): 0.09, ("eu", "uk"): 0.01})
        cluster.worker("decode-us", region="us")
        cluster.worker("decode-uk", region="uk")
        assert cluster.place(32, region="eu").decode.worker_id == "decode-uk"


class TestPreferences:
    def test_a_session_stays_where_it_was(self, cluster):
        for number in range(8):
            cluster.worker(f"decode-{number}", max_running=64)
        first = cluster.place(32, session="s").decode.worker_id
        assert [cluster.place(32, session="s").decode.worker_id for _ in range(2)] == [first] * 2

    def test_sessions_of_two_tenants_are_two(self, cluster):
        for number in range(8):
            cluster.worker(f"decode-{number}")
        first = cluster.place(32, session="s", tenant="a").decode.worker_id
        assert cluster.place(32, session="s", tenant="b").decode.worker_id != first

    def test_a_session_does_not_outweigh_a_full_batch(self, cluster):
        cluster.worker("decode-0")
        first = cluster.place(32, session="s").decode.worker_id
        cluster.worker("decode-1")
        cluster.beat(first, running=7)
        assert cluster.place(32, session="s").decode.worker_id == "decode-1"

    def test_the_cheaper_of_equals(self, cluster):
        cluster.worker("decode-0", cost=4.0)
        cluster.worker("decode-1", cost=1.0)
        assert cluster.place(32).decode.worker_id == "decode-1"


class TestHereOrThere:
    def test_a_prompt_waits_for_no_prefill_worker_that_is_far_behind(self, cluster):
        cluster.worker("decode-0", stats=rate(1000))
        cluster.worker("prefill-0", stats=rate(1000, queued_tokens=3000))
        placement = cluster.place(256)
        assert placement.prefill is None
        assert any("sooner than on prefill-0" in reason for reason in placement.reasons)

    def test_nor_is_a_busy_batch_held_up_for_little(self, cluster):
        cluster.worker("decode-0", stats=rate(1000, running=7))
        cluster.worker("prefill-0", stats=rate(1000, queued_tokens=200))
        assert cluster.place(256).prefill is not None

    def test_what_was_not_measured_decides_nothing(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("prefill-0", stats=rate(1000, queued_tokens=3000))
        assert cluster.place(256).prefill is not None

    def test_an_idle_worker_is_not_waited_beside(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("prefill-0")
        cluster.beat("prefill-0", running=20)
        placement = cluster.place(256)
        assert placement.prefill is None
        assert any("and it is idle" in reason for reason in placement.reasons)
        assert cluster.ask(256) not in cluster.answers, "but a busy one is not held up"

    def test_a_worker_of_both_roles_is_on_both_sides(self, cluster):
        cluster.worker("both-0")
        assert cluster.place(1000).prefill is None, "it can't hand over to itself"
        cluster.worker("both-1")
        placement = cluster.place(1000, exclude={"x"})
        names = {placement.decode.worker_id, placement.prefill.worker_id}
        assert names == {"both-0", "both-1"}

    def test_a_changed_role_is_another_side(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("decode-1")
        assert cluster.place(1000).prefill is None
        cluster.do(m.WorkerRoleChanged(cluster.streams["decode-1"], m.Role.PREFILL))
        placement = cluster.place(1000)
        assert placement.decode.worker_id == "decode-0"
        assert placement.prefill.worker_id == "decode-1"

    def test_who_waits_for_a_role_is_served_when_it_comes(self, cluster):
        cluster.worker("decode-0", max_running=1)
        cluster.worker("prefill-0")
        for _ in range(2):
            cluster.place(32)
        ticket = cluster.ask(32)
        assert ticket not in cluster.answers
        cluster.do(m.WorkerRoleChanged(cluster.streams["prefill-0"], m.Role.BOTH))
        assert cluster.placement(ticket).decode.worker_id == "prefill-0"


class TestServiceLevel:
    """What is refused at once rests on what prompts took here."""

    @staticmethod
    def learn(cluster, tokens=800, seconds=10.0):
        """Prompts of a length took so long."""
        for number in range(10):
            request = f"learn-{number}"
            assert cluster.place(tokens, request=request, prompt=())
            ended = m.AttemptEnded(request, 0, ttft_seconds=seconds, computed_tokens=tokens)
            cluster.do(ended)

    def test_a_first_token_that_can_not_come_in_time_is_refused_at_once(self, cluster):
        cluster.worker("decode-0", stats=rate(100))
        self.learn(cluster)
        refused = cluster.refuse(1000, ttft_seconds=2.0)
        assert refused.reason is m.Reason.SLO_UNATTAINABLE
        assert 0 < refused.retry_seconds <= 30
        assert cluster.place(100, ttft_seconds=2.0)
        assert cluster.place(1000, ttft_seconds=9.0)

    def test_the_clusters_own_holds_where_none_is_asked_for(self, make_cluster):
        cluster = make_cluster(ttft_seconds=2.0)
        cluster.worker("decode-0", stats=rate(100))
        self.learn(cluster)
        assert cluster.refuse(1000).reason is m.Reason.SLO_UNATTAINABLE
        assert cluster.place(1000, ttft_seconds=60.0)
        assert cluster.place(1000, attempt=1), "its stream may have begun"

    def test_a_deadline_that_can_not_be_met_is_refused_at_once(self, cluster):
        cluster.worker("decode-0", stats=rate(100))
        self.learn(cluster)
        refused = cluster.refuse(1000, timeout=2.0)
        assert refused.reason is m.Reason.DEADLINE
        assert "of the request's time 2 s are left" in refused.message
        assert cluster.place(1000, timeout=9.0)

    def test_what_a_peer_holds_need_not_be_computed(self, cluster, make_keys):
        cluster.worker("decode-0", stats=rate(100))
        cluster.worker("decode-1", stats=rate(100, running=7, free_blocks=99))
        self.learn(cluster)
        cluster.holds("decode-1", make_keys(60))
        assert cluster.place(1000, prompt=make_keys(62), ttft_seconds=2.0)

    def test_nothing_is_refused_by_what_was_never_measured(self, cluster):
        cluster.worker("decode-0")
        assert cluster.place(4000, ttft_seconds=0.001, timeout=0.5)

    def test_tokens_too_far_apart_are_waited_for(self, cluster):
        cluster.worker("decode-0")
        for _ in range(40):
            cluster.wait(0.5)
            cluster.beat("decode-0", step_seconds=0.5, running=4)
        ticket = cluster.ask(32, itl_seconds=0.1)
        assert ticket not in cluster.answers
        for _ in range(200):
            cluster.wait(0.5)
            cluster.beat("decode-0", step_seconds=0.01, running=1)
        assert cluster.placement(ticket).decode.worker_id == "decode-0"

    def test_who_waits_for_a_first_token_waits_no_longer_than_it_is_of_use(self, cluster):
        cluster.worker("decode-0", max_running=1)
        for _ in range(2):
            cluster.place(32)
        ticket = cluster.ask(32, ttft_seconds=1.0, timeout=60.0)
        for _ in range(9):
            cluster.wait(0.1)
            cluster.beat("decode-0", running=2)
            assert ticket not in cluster.answers
        cluster.wait(0.2)
        assert cluster.answers[ticket].refusal.reason is m.Reason.SLO_UNATTAINABLE

    def test_a_turn_that_can_not_come_in_time_is_not_waited_for(self, make_cluster):
        cluster = make_cluster(queue_limit=100)
        cluster.worker("decode-0", max_running=1)
        running = [f"r{n}" for n in range(40)]
        for request in running:
            cluster.ask(32, request=request)
        for request in running[:20]:
            cluster.wait(0.5)
            cluster.beat("decode-0", running=2)
            cluster.do(m.AttemptEnded(request, 0, generated_tokens=1))
        refused = cluster.refuse(32, ttft_seconds=2.0)
        assert refused.reason is m.Reason.SLO_UNATTAINABLE
        assert "in the queue" in refused.message
        assert cluster.ask(32, ttft_seconds=60.0) not in cluster.answers


class TestBlame:
    def test_what_is_not_a_workers_fault_is_not_held_against_it(self, cluster):
        for number in range(4):
            cluster.worker(f"decode-{number}")
        for number, failure in enumerate(["DEADLINE", "INVALID_REQUEST", "NO_TRANSPORT"] * 5):
            cluster.wait(1.0, beat=[f"decode-{n}" for n in range(4)])
            cluster.do(m.AttemptEnded(f"r{number}", 0, "decode-0", failure))
        assert cluster.core.members.get("decode-0").avoided == ""

    def test_what_is_its_fault_is(self, cluster):
        for number in range(4):
            cluster.worker(f"decode-{number}")
        for number in range(8):
            cluster.wait(1.0, beat=[f"decode-{n}" for n in range(4)])
            cluster.do(m.AttemptEnded(f"r{number}", 0, "decode-0", "ENGINE_FAILED"))
        assert "failures" in cluster.core.members.get("decode-0").avoided
        assert cluster.place(32).decode.worker_id != "decode-0"


class TestReturn:
    def test_a_worker_that_says_it_is_larger_now_has_new_books(self, cluster):
        cluster.worker("decode-0", max_running=1)
        for _ in range(2):
            cluster.place(32)
        cluster.worker("decode-0", max_running=40, dp_ranks=2)
        assert {cluster.place(32).decode.dp_rank for _ in range(8)} == {0, 1}
