"""The core as workers and frontends see it: answers, refusals, the queue, leases, weather."""

from __future__ import annotations

import pytest

from services.coordinator.core import messages as m
from services.coordinator.core.membership import Standing

R = m.Reason


def standing(cluster, name):
    return cluster.core.members.get(name).standing


class TestWorkers:
    def test_a_hello_grants_a_lease(self, cluster):
        assert cluster.worker("decode-0", stream=7) == [m.GrantLease(7, 3.0)]

    def test_silence_ends_it(self, cluster):
        cluster.worker("decode-0", stream=7)
        cluster.wait(2.9)
        assert cluster.core.members.get("decode-0")
        cluster.wait(0.2)
        assert cluster.commands[-1] == m.DropWorker(7, "decode-0", "silent for 3.1 s")
        assert cluster.refuse().reason is R.NO_WORKERS

    @pytest.mark.parametrize(
        "event",
        [
            lambda s: m.WorkerHeartbeat(s, m.WorkerStats()),
            lambda s: m.WorkerKvEvents(s, 1, True),
            lambda s: m.WorkerKvEvents(s, 9, False),
            m.WorkerDraining,
        ],
    )
    def test_any_message_renews_it(self, cluster, event):
        cluster.worker("decode-0", stream=7)
        cluster.wait(2.0)
        cluster.do(event(7))
        cluster.wait(2.0)
        assert cluster.core.members.get("decode-0")

    def test_a_broken_stream_ends_it_at_once(self, cluster, make_keys):
        cluster.worker("decode-0")
        cluster.holds("decode-0", make_keys(4))
        assert cluster.do(m.StreamLost(cluster.streams["decode-0"])) == []
        assert len(cluster.core.members) == 0
        assert len(cluster.core.index) == 0
        assert cluster.refuse().reason is R.NO_WORKERS

    def test_a_second_stream_takes_over_and_the_first_ones_end_is_nothing(self, cluster):
        cluster.worker("decode-0", stream=7)
        commands = cluster.worker("decode-0", stream=8)
        assert commands[0] == m.DropWorker(7, "decode-0", "it registered anew")
        assert commands[1] == m.GrantLease(8, 3.0)
        cluster.do(m.StreamLost(7))
        cluster.do(m.WorkerDraining(7))
        assert standing(cluster, "decode-0") is Standing.UP

    def test_bookings_survive_a_new_stream(self, cluster):
        cluster.worker("decode-0", max_running=1)
        cluster.place(32)
        cluster.worker("decode-0", max_running=1)
        assert cluster.core.members.get("decode-0").load.requests == 1

    def test_another_worker_at_the_address_replaces_it(self, cluster):
        cluster.worker("decode-old", stream=7, address="h:1")
        commands = cluster.worker("decode-new", stream=8, address="h:1")
        assert commands[0] == m.DropWorker(7, "decode-old", "decode-new is at its address now")
        assert [w.worker_id for w in cluster.core.members] == ["decode-new"]

    def test_hello_for_another_on_the_same_stream(self, cluster):
        cluster.worker("decode-0", stream=7)
        assert cluster.worker("decode-1", stream=7) == [m.GrantLease(7, 3.0)]
        assert [w.worker_id for w in cluster.core.members] == ["decode-1"]

    def test_messages_of_strangers_are_nothing(self, cluster):
        for event in (
            m.WorkerHeartbeat(99, m.WorkerStats()),
            m.WorkerKvEvents(99, 1, True, (b"k" * 16,)),
            m.WorkerDraining(99),
            m.StreamLost(99),
            m.PlaceCancelled(99),
            m.AttemptEnded("r", 0, "nobody", "X", unreachable=True),
        ):
            assert cluster.do(event) == []

    def test_draining_workers_get_nothing_new_even_after_a_new_hello(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("decode-1")
        cluster.do(m.WorkerDraining(cluster.streams["decode-0"]))
        assert {cluster.place(32).decode.worker_id for _ in range(5)} == {"decode-1"}
        cluster.worker("decode-0")
        assert {cluster.place(32).decode.worker_id for _ in range(4)} == {"decode-1"}

    def test_when_we_were_away_the_workers_are_not_blamed(self, cluster):
        cluster.worker("decode-0")
        cluster.now += 60.0
        cluster.do(m.Tick())
        assert cluster.core.members.get("decode-0")
        cluster.wait(3.2)
        assert not cluster.core.members.get("decode-0"), "but they have to be heard of now"

    def test_an_unreachable_worker_is_avoided_until_heard_of(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("decode-1")
        cluster.do(m.AttemptEnded("r", 0, "decode-0", "WORKER_LOST", unreachable=True))
        assert {cluster.place(32).decode.worker_id for _ in range(5)} == {"decode-1"}
        cluster.beat("decode-0")
        assert cluster.place(32).decode.worker_id == "decode-0"

    def test_if_it_is_the_only_one_requests_wait_for_it(self, cluster):
        cluster.worker("decode-0")
        cluster.do(m.AttemptEnded("r", 0, "decode-0", "WORKER_LOST", unreachable=True))
        ticket = cluster.ask(32)
        assert ticket not in cluster.answers
        cluster.beat("decode-0")
        assert cluster.placement(ticket).decode.worker_id == "decode-0"

    def test_a_suspect_that_drains_gets_nothing_in_between(self, cluster):
        cluster.worker("decode-0")
        cluster.do(m.AttemptEnded("r", 0, "decode-0", "WORKER_LOST", unreachable=True))
        ticket = cluster.ask(32)
        cluster.do(m.WorkerDraining(cluster.streams["decode-0"]))
        cluster.wait(0.1)
        assert cluster.answers[ticket].refusal.reason is R.NO_WORKERS

    def test_a_suspect_that_is_back_is_judged_by_what_it_says_now(self, cluster):
        cluster.worker("decode-0")
        cluster.do(m.AttemptEnded("r", 0, "decode-0", "WORKER_LOST", unreachable=True))
        ticket = cluster.ask(32)
        cluster.beat("decode-0", running=10)
        assert ticket not in cluster.answers

    def test_what_a_worker_that_left_had_moved_is_not_forgotten(self, cluster):
        cluster.worker("decode-0")
        cluster.beat("decode-0", kv_bytes={"shm": 640, "tcp": 2})
        cluster.do(m.StreamLost(cluster.streams["decode-0"]))
        assert cluster.core.kv_bytes_gone == 642

    @pytest.mark.parametrize("reason", ["GUIDE_FAILED", "ADAPTER_FAILED", "INVALID_REQUEST"])
    def test_what_a_client_can_cause_says_nothing_of_a_worker(self, cluster, reason):
        cluster.worker("decode-0")
        cluster.worker("decode-1")
        for _ in range(50):
            cluster.now += 1.0
            for name in ("decode-0", "decode-1"):
                cluster.beat(name)
                cluster.do(m.AttemptEnded("r", 0, name, reason))
        assert not any(w.avoided for w in cluster.core.members)

    def test_a_worker_that_refused_is_full_until_it_reports(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("decode-1", stats=m.WorkerStats(running=5, free_blocks=512))
        cluster.do(m.AttemptEnded("r", 0, "decode-0", "ENGINE_OVERLOADED"))
        assert cluster.place(32).decode.worker_id == "decode-1"
        cluster.beat("decode-0")
        assert cluster.place(32).decode.worker_id == "decode-0"


class TestKvEvents:
    def test_a_gap_is_answered_by_resync_and_the_old_state_is_kept_till_then(
        self, cluster, make_keys
    ):
        cluster.worker("decode-0", stream=7)
        cluster.holds("decode-0", make_keys(4))
        lost = m.WorkerKvEvents(7, 3, False, make_keys(9, 8))
        assert cluster.do(lost) == [m.AskResync(7)]
        assert cluster.core.index.known_blocks("decode-0") == 4
        cluster.do(m.WorkerKvEvents(7, 1, True, make_keys(6)))
        cluster.do(m.WorkerKvEvents(7, 2, False, make_keys(8, 6), make_keys(6, 5)))
        assert cluster.core.index.known_blocks("decode-0") == 7

    def test_a_resync_that_is_not_answered_is_asked_for_again(self, cluster):
        cluster.worker("decode-0", stream=7)
        cluster.do(m.WorkerKvEvents(7, 5, False))
        asked = len(cluster.commands)
        cluster.wait(10.0, beat=["decode-0"])
        assert cluster.commands[asked:] == [m.AskResync(7)] * 3

    def test_a_key_removed_and_stored_in_one_message_is_held(self, cluster, make_keys):
        """Coalesced events name a key once, in the list of its last state; both is 'stored'."""
        cluster.worker("decode-0", stream=7)
        cluster.holds("decode-0", make_keys(2))
        cluster.do(m.WorkerKvEvents(7, 2, False, make_keys(1), make_keys(1)))
        assert cluster.core.index.known_blocks("decode-0") == 2


class TestRefusals:
    def test_unknown_model(self, cluster):
        cluster.worker("decode-0")
        refusal = cluster.refuse(model="gpt")
        assert refusal.reason is R.UNKNOWN_MODEL
        assert refusal.message == "gpt is not served here; served: m"

    def test_a_model_whose_workers_are_gone_is_not_unknown(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("decode-1", model="other")
        cluster.do(m.StreamLost(cluster.streams["decode-0"]))
        assert cluster.refuse(model="m").reason is R.NO_WORKERS

    def test_no_model_named(self, cluster):
        cluster.worker("decode-0")
        assert cluster.place(32, model="").decode.worker_id == "decode-0"
        cluster.worker("decode-1", model="other")
        refusal = cluster.refuse(model="")
        assert refusal.reason is R.INVALID_REQUEST
        assert refusal.metadata["allowed"] == "name one; served: m, other"

    def test_nobody_there(self, cluster):
        assert cluster.refuse().reason is R.NO_WORKERS
        assert cluster.refuse(model="").reason is R.NO_WORKERS

    def test_prefill_workers_alone_do_not_serve(self, cluster):
        cluster.worker("prefill-0")
        refusal = cluster.refuse()
        assert refusal.reason is R.NO_WORKERS
        assert refusal.message == "no decode worker of m is up"
        assert refusal.metadata["role"] == "decode"

    def test_all_excluded(self, cluster):
        cluster.worker("decode-0")
        refusal = cluster.refuse(exclude={"decode-0"})
        assert refusal.reason is R.NO_WORKERS
        assert refusal.message.endswith("but the 1 that failed this request")

    def test_all_draining(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("prefill-0")
        cluster.do(m.WorkerDraining(cluster.streams["decode-0"]))
        assert cluster.refuse().reason is R.NO_WORKERS

    @pytest.mark.parametrize(("window", "blocks", "most"), [(1000, 512, 999), (4096, 10, 159)])
    def test_larger_than_any_worker(self, cluster, window, blocks, most):
        cluster.worker("decode-0", context_tokens=window, total_blocks=blocks)
        refusal = cluster.refuse(most + 1)
        assert refusal.reason is R.INVALID_REQUEST
        assert refusal.metadata == {
            "field": "context_tokens",
            "value": str(most + 1),
            "allowed": f"at most {most}",
        }
        cluster.place(most)

    def test_one_for_a_larger_worker_that_may_come_back(self, make_cluster):
        cluster = make_cluster(wait=5.0)
        cluster.worker("decode-0", context_tokens=1000)
        cluster.worker("decode-1", context_tokens=4096)
        cluster.do(m.StreamLost(cluster.streams["decode-1"]))
        assert cluster.refuse(5000).reason is R.INVALID_REQUEST
        served = cluster.ask(2000)
        assert served not in cluster.answers
        cluster.worker("decode-1", context_tokens=4096)
        assert cluster.placement(served).decode.worker_id == "decode-1"
        cluster.do(m.StreamLost(cluster.streams["decode-1"]))
        given_up = cluster.ask(2000)
        cluster.wait(6, beat=["decode-0"])
        assert cluster.answers[given_up].refusal.reason is R.INVALID_REQUEST

    def test_a_first_token_that_is_late_by_less_than_rounding_is_told_as_late(self, cluster):
        cluster.worker("decode-0", max_running=1, total_blocks=16)
        cluster.now += 3.3 - cluster.now % 1
        cluster.beat("decode-0", free_blocks=0, running=1, waiting=5)
        since, wanted = cluster.now, 0.1
        while (since + wanted) - since >= wanted:
            wanted += 0.1
        ticket = cluster.ask(ttft_seconds=wanted)
        assert ticket not in cluster.answers
        cluster.now = since + wanted
        cluster.beat("decode-0", free_blocks=0, running=1, waiting=5)
        cluster.do(m.Tick())
        assert cluster.answers[ticket].refusal.reason is R.SLO_UNATTAINABLE

    def test_too_late_already(self, cluster):
        cluster.worker("decode-0")
        assert cluster.refuse(timeout=0.0).reason is R.DEADLINE

    def test_refusals_are_counted(self, cluster):
        cluster.refuse()
        cluster.refuse()
        assert cluster.core.desk.refused == {R.NO_WORKERS: 2}


class TestQueue:
    def full(self, make_cluster, limit=10):
        """A cluster with one decode worker whose batch of 1, and one more, is taken."""
        cluster = make_cluster(queue_limit=limit)
        cluster.worker("decode-0", max_running=1)
        for name in ("a", "b"):
            cluster.place(32, request=name)
        return cluster

    def test_first_in_first_out(self, make_cluster):
        cluster = self.full(make_cluster)
        tickets = [cluster.ask(32) for _ in range(4)]
        assert not cluster.answers.keys() & {*tickets}
        cluster.wait(0.5)
        for name in ("a", "b"):
            cluster.do(m.AttemptEnded(name, 0))
        assert cluster.answers.keys() & {*tickets} == {*tickets[:2]}
        answer = cluster.answers[tickets[0]]
        assert answer.queued_seconds == pytest.approx(0.5)
        assert answer.placement.reasons[-1] == "waited 0.500 s for room"

    def test_the_bound_holds_and_the_refusal_says_when_to_try_again(self, make_cluster):
        cluster = self.full(make_cluster, limit=2)
        cluster.ask(32)
        cluster.ask(32)
        refusal = cluster.refuse(32)
        assert refusal.reason is R.OVERLOADED
        assert refusal.message == "no worker has room, and 2 of 2 requests wait already"
        assert refusal.retry_seconds >= 1.0

    def test_no_queue_at_all(self, make_cluster):
        cluster = self.full(make_cluster, limit=0)
        assert cluster.refuse(32).reason is R.OVERLOADED

    def test_room_seen_by_heartbeat(self, make_cluster):
        cluster = self.full(make_cluster)
        ticket = cluster.ask(32)
        cluster.wait(0.5)
        cluster.beat("decode-0", running=0)
        assert cluster.placement(ticket)

    def test_room_by_a_new_worker(self, make_cluster):
        cluster = self.full(make_cluster)
        ticket = cluster.ask(32)
        cluster.worker("decode-1")
        assert cluster.placement(ticket).decode.worker_id == "decode-1"

    def test_a_cancelled_one_gets_no_answer(self, make_cluster):
        cluster = self.full(make_cluster)
        first, second = cluster.ask(32), cluster.ask(32)
        cluster.do(m.PlaceCancelled(first))
        cluster.do(m.AttemptEnded("a", 0))
        assert cluster.placement(second)
        cluster.wait(1.0, beat=["decode-0"])
        assert first not in cluster.answers

    def test_the_deadline_passes(self, make_cluster):
        cluster = self.full(make_cluster)
        ticket = cluster.ask(32, timeout=1.0)
        cluster.wait(0.9)
        assert ticket not in cluster.answers
        cluster.wait(0.2)
        assert cluster.answers[ticket].refusal.reason is R.DEADLINE

    def test_when_the_last_hope_goes_those_who_wait_are_told(self, make_cluster):
        cluster = self.full(make_cluster)
        tickets = [cluster.ask(32), cluster.ask(32, model="")]
        cluster.do(m.StreamLost(cluster.streams["decode-0"]))
        cluster.wait(0.1)
        assert [cluster.answers[t].refusal.reason for t in tickets] == [R.NO_WORKERS] * 2

    def test_those_without_hope_are_told_wherever_in_the_queue_they_stand(self, make_cluster):
        cluster = self.full(make_cluster, limit=50)
        cluster.worker("decode-1", max_running=1)
        for _ in range(2):
            cluster.place(32)
        for _ in range(20):
            cluster.ask(32)
        ticket = cluster.ask(32, exclude={"decode-0"})
        cluster.do(m.StreamLost(cluster.streams["decode-1"]))
        cluster.wait(0.1)
        assert cluster.answers[ticket].refusal.reason is R.NO_WORKERS
        assert len(cluster.core.desk.queue) == 20

    def test_one_past_its_deadline_is_not_placed_though_no_tick_came_first(self, make_cluster):
        cluster = self.full(make_cluster)
        ticket = cluster.ask(32, timeout=1.0)
        cluster.now += 1.0
        cluster.beat("decode-0")
        assert cluster.answers[ticket].refusal.reason is R.DEADLINE

    def test_one_huge_prompt_does_not_stop_the_others_nor_do_they_starve_it(self, make_cluster):
        cluster = make_cluster(queue_limit=100, local=4096)
        cluster.worker("decode-0", total_blocks=64, max_running=100, context_tokens=2000)
        cluster.place(400, request="old")
        huge = cluster.ask(1000)
        small = [cluster.ask(14, request=f"s{n}") for n in range(40)]
        placed = [t for t in small if t in cluster.answers]
        assert huge not in cluster.answers
        assert len(placed) == 16, "so many may overtake it"
        for number in range(16):
            cluster.do(m.AttemptEnded(f"s{number}", 0))
        assert huge not in cluster.answers
        cluster.do(m.AttemptEnded("old", 0))
        assert cluster.placement(huge)

    def test_another_model_does_not_wait_in_the_same_lane(self, make_cluster):
        cluster = self.full(make_cluster)
        for _ in range(9):
            cluster.ask(32)
        cluster.worker("decode-1", model="other")
        assert cluster.place(32, model="other")

    def test_if_the_prefill_workers_it_waits_for_go_it_is_placed(self, make_cluster):
        cluster = make_cluster()
        cluster.worker("decode-0")
        cluster.worker("prefill-0", max_running=1)
        for _ in range(2):
            cluster.place(128)
        ticket = cluster.ask(128)
        short = cluster.place(32)
        assert short.prefill is None, "short prompts need none"
        assert ticket not in cluster.answers
        cluster.do(m.StreamLost(cluster.streams["prefill-0"]))
        cluster.wait(0.1)
        assert cluster.placement(ticket).prefill is None


class TestAttempts:
    def test_an_ended_attempt_frees_capacity_at_once(self, make_cluster):
        cluster = make_cluster()
        cluster.worker("decode-0", max_running=1)
        cluster.worker("prefill-0", max_running=1)
        for number in range(50):
            cluster.place(128, request=f"r{number}")
            cluster.do(m.AttemptEnded(f"r{number}", 0))
        for name in ("decode-0", "prefill-0"):
            load = cluster.core.members.get(name).load
            assert (load.requests, load.free_blocks, load.queued_tokens) == (0, 512, 0)

    def test_ending_twice_frees_once(self, cluster):
        cluster.worker("decode-0")
        cluster.place(32, request="r")
        cluster.place(32, request="other")
        cluster.wait(0.5)
        cluster.beat("decode-0", running=2)
        cluster.do(m.AttemptEnded("r", 0))
        cluster.do(m.AttemptEnded("r", 0))
        assert cluster.core.members.get("decode-0").load.requests == 1

    def test_the_same_attempt_placed_twice_is_booked_once(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("decode-1")
        cluster.place(32, request="r")
        cluster.place(32, request="r")
        loads = [w.load.requests for w in cluster.core.members]
        assert sorted(loads) == [0, 1]

    def test_a_frontend_that_dies_leaves_nothing_behind(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("prefill-0")
        for _ in range(5):
            cluster.place(128)
        cluster.wait(1.0)
        for name in ("decode-0", "prefill-0"):
            cluster.beat(name)
            load = cluster.core.members.get(name).load
            assert (load.requests, load.queued_tokens, load.bookings) == (0, 0, {})

    def test_memory_of_attempts_is_bounded(self, cluster, monkeypatch):
        monkeypatch.setattr("services.coordinator.core.desk.ATTEMPTS_REMEMBERED", 3)
        cluster.worker("decode-0", max_running=100)
        for number in range(10):
            cluster.place(32, request=f"r{number}")
        assert [a for a, _ in cluster.core.desk.attempts] == ["r7", "r8", "r9"]


class TestStart:
    """A coordinator that was restarted knows nobody for a moment."""

    def test_requests_wait_for_workers_to_come_back(self, make_cluster):
        cluster = make_cluster(settled=False)
        tickets = [cluster.ask(32), cluster.ask(32, model="")]
        cluster.wait(1.0)
        assert not cluster.answers
        cluster.worker("decode-0")
        assert [cluster.placement(t).decode.worker_id for t in tickets] == ["decode-0"] * 2

    def test_but_not_for_ever(self, make_cluster):
        cluster = make_cluster(settled=False)
        ticket = cluster.ask(32)
        cluster.wait(2.9)
        assert ticket not in cluster.answers
        cluster.wait(0.2)
        assert cluster.answers[ticket].refusal.reason is R.NO_WORKERS

    def test_a_prefill_worker_that_comes_first_does_not_refuse_them(self, make_cluster):
        cluster = make_cluster(settled=False)
        ticket = cluster.ask(128)
        cluster.worker("prefill-0")
        assert ticket not in cluster.answers
        cluster.worker("decode-0")
        assert cluster.placement(ticket).prefill.worker_id == "prefill-0"
