"""What is remembered of decisions, and that it is enough to explain them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.core import messages as m
from services.coordinator.core.explain import WAITS, Explanations
from services.coordinator.explained import attributes, explanation_to


def want(request_id="r", attempt=0):
    return m.PlaceRequest(request_id, attempt, "m", (b"k" * 16,) * 4, 64, 10)


class TestRing:
    def test_the_oldest_goes_first(self):
        kept = Explanations(2)
        for name in "abc":
            kept.asked(want(name), 0.0, None)
        assert kept.of("a") == []
        assert [len(kept.of(name)) for name in "bc"] == [1, 1]

    @given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=60))
    def test_what_is_there_can_be_asked_for(self, asked):
        kept = Explanations(5)
        for name, attempt in asked:
            kept.asked(want(name, attempt), 0.0, None)
        latest = list(dict.fromkeys(reversed(asked)))[:5]
        there = [(r.want.request_id, r.want.attempt) for name in "abcd" for r in kept.of(name)]
        assert sorted(there) == sorted(latest)
        assert len(kept) == len(there)

    def test_none_are_kept_where_none_are_wanted(self):
        kept = Explanations(0)
        kept.asked(want(), 0.0, None)
        assert kept.waiting(want(), "x", 0.0) is False
        assert kept.of("r") == []

    def test_reasons_to_wait_are_bounded_and_noted_once(self):
        kept = Explanations(5)
        kept.asked(want(), 0.0, None)
        assert kept.waiting(want(), "a", 0.0)
        assert not kept.waiting(want(), "a", 1.0)
        for number in range(3 * WAITS):
            kept.waiting(want(), str(number), 2.0)
        (record,) = kept.of("r")
        assert len(record.waits) == WAITS

    def test_nothing_of_the_prompt_is_kept(self):
        kept = Explanations(5)
        kept.asked(want(), 0.0, None)
        assert kept.of("r")[0].want.block_keys == ()

    def test_an_end_that_comes_late_or_for_nobody_is_ignored(self):
        kept = Explanations(5)
        kept.ended(m.AttemptEnded("r", 0))
        kept.asked(want(), 0.0, None)
        kept.ended(m.AttemptEnded("r", 0))
        assert kept.of("r")[0].end is None


class TestDecisions:
    def told(self, cluster, request_id):
        now, kept = cluster.now, cluster.core.desk.explanations
        return [explanation_to(record, now) for record in kept.of(request_id)]

    def test_a_placed_one_names_winner_and_losers(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("decode-1", stats=m.WorkerStats(running=5, free_blocks=512))
        cluster.worker("prefill-0")
        cluster.place(128, request="r")
        (told,) = self.told(cluster, "r")
        assert told.outcome == "placed"
        chosen = {c.worker_id for c in told.considered if c.chosen}
        assert chosen == {"decode-0", "prefill-0"}
        (loser,) = (c for c in told.considered if not c.chosen)
        winner = next(c for c in told.considered if c.worker_id == "decode-0")
        assert loser.worker_id == "decode-1"
        assert loser.score < winner.score
        assert abs(sum(winner.scores.values()) - winner.score) < 1e-9
        assert loser.scores["batch_room"] < winner.scores["batch_room"]

    def test_a_queued_one_says_what_it_waits_for(self, cluster):
        cluster.worker("decode-0", max_running=1)
        for _ in range(2):
            cluster.place(32)
        ticket = cluster.ask(32, request="r")
        for _ in range(10):
            cluster.wait(0.1)
            cluster.beat("decode-0", running=2)
        (told,) = self.told(cluster, "r")
        assert told.outcome == "waiting"
        assert told.waits[0].why == "no decode worker of m has room"
        assert told.waits[0].seconds > 0.9
        (out,) = told.considered
        assert out.rejected.startswith("no room: ")
        cluster.do(m.PlaceCancelled(ticket))
        assert self.told(cluster, "r")[0].outcome == "cancelled"

    def test_a_refused_one_says_why(self, cluster):
        cluster.worker("decode-0")
        cluster.refuse(32, request="r", model="other")
        (told,) = self.told(cluster, "r")
        assert (told.outcome, told.refusal) == ("refused", "UNKNOWN_MODEL")
        assert "other is not served here" in told.reasons[0]

    def test_a_replaced_one_has_an_attempt_each(self, cluster):
        cluster.worker("decode-0")
        cluster.place(32, request="r")
        ended = m.AttemptEnded("r", 0, "decode-0", "WORKER_LOST", True, generated_tokens=7)
        cluster.do(ended)
        cluster.worker("decode-1")
        cluster.place(39, request="r", attempt=1, exclude={"decode-0"})
        first, second = self.told(cluster, "r")
        assert (first.failed_worker, first.failure) == ("decode-0", "WORKER_LOST")
        assert first.generated_tokens == 7
        assert list(second.wanted.exclude_workers) == ["decode-0"]
        assert any("it failed this request" in reason for reason in second.reasons)

    def test_the_span_says_the_same(self, cluster):
        cluster.worker("decode-0")
        cluster.place(32, request="r")
        (record,) = cluster.core.desk.explanations.of("r")
        flat = attributes(record, cluster.now)
        assert flat["tandem.place.outcome"] == "placed"
        assert flat["tandem.place.considered"][0].startswith("decode decode-0: chosen 2.")
