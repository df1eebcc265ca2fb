"""Where requests go, and the reasons given."""

from __future__ import annotations

from collections import Counter

from services.coordinator.core import messages as m
from services.coordinator.core.candidates import SHORTLIST


class TestDecode:
    def test_the_idlest(self, cluster):
        cluster.worker("decode-0", stats=m.WorkerStats(running=4, free_blocks=512))
        cluster.worker("decode-1")
        assert cluster.place(32).decode.worker_id == "decode-1"

    def test_a_cached_prefix_outweighs_some_load(self, cluster, make_keys):
        cluster.worker("decode-0", stats=m.WorkerStats(running=3, free_blocks=400))
        cluster.worker("decode-1")
        cluster.holds("decode-0", make_keys(8))
        placement = cluster.place(128)
        assert placement.decode == m.Chosen("decode-0", "decode-0:1", 128)

    def test_only_those_with_enough_blocks(self, cluster):
        cluster.worker("decode-0", stats=m.WorkerStats(free_blocks=8))
        cluster.worker("decode-1", stats=m.WorkerStats(running=7, free_blocks=9))
        assert cluster.place(128).decode.worker_id == "decode-1", "128 tokens and one more"

    def test_bookings_spread_what_comes_between_two_reports(self, cluster):
        for number in range(4):
            cluster.worker(f"decode-{number}")
        chosen = Counter(cluster.place(32).decode.worker_id for _ in range(20))
        assert set(chosen.values()) == {5}

    def test_beyond_the_shortlist(self, cluster):
        """All of the least loaded may be unusable for a request: then the others are looked at."""
        names = [f"decode-{n}" for n in range(SHORTLIST + 4)]
        for name in names:
            cluster.worker(name)
        assert cluster.place(32, exclude=names[:-1]).decode.worker_id == names[-1]

    def test_the_holder_is_found_beyond_the_least_loaded(self, cluster, make_keys):
        for number in range(3 * SHORTLIST):
            cluster.worker(f"decode-{number}")
        cluster.worker("decode-holder", stats=m.WorkerStats(running=2, free_blocks=500))
        cluster.holds("decode-holder", make_keys(8))
        assert cluster.place(128).decode.worker_id == "decode-holder"

    def test_ranks_take_turns(self, cluster):
        cluster.worker("decode-0", dp_ranks=2)
        ranks = [cluster.place(32).decode.dp_rank for _ in range(4)]
        assert sorted(ranks) == [0, 0, 1, 1]
        assert ranks[0] != ranks[1]


class TestPrefill:
    def test_short_prompts_are_computed_where_they_decode(self, cluster, make_keys):
        cluster.worker("decode-0")
        cluster.worker("prefill-0")
        cluster.holds("decode-0", make_keys(4))
        placement = cluster.place(64 + 23)
        assert placement.prefill is None
        assert "computed on decode-0: 23 uncached tokens <= 64" in placement.reasons

    def test_one_token_too_many_is_not_short(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("prefill-0")
        assert cluster.place(64).prefill is None
        assert cluster.place(65).prefill is not None

    def test_a_fully_cached_prompt_has_its_last_token_computed(self, make_cluster, make_keys):
        cluster = make_cluster(local=0)
        cluster.worker("decode-0")
        cluster.worker("prefill-0")
        cluster.holds("decode-0", make_keys(8))
        placement = cluster.place(128)
        assert placement.decode.cached_tokens == 128
        assert placement.prefill is not None, "with local=0 nothing is computed there"

    def test_with_no_prefill_worker_up_all_prompts_are(self, cluster):
        cluster.worker("decode-0")
        placement = cluster.place(1000)
        assert placement.prefill is None
        assert "computed on decode-0: no prefill worker is up" in placement.reasons

    def test_with_every_prefill_worker_excluded_too(self, cluster):
        cluster.worker("decode-0")
        cluster.worker("prefill-0")
        placement = cluster.place(1000, exclude={"prefill-0"})
        assert placement.prefill is None
        assert "not prefill-0: it failed this request" in placement.reasons

    def test_cached_tokens_are_weighed_against_queued_ones(self, cluster, make_keys):
        cluster.worker("decode-0")
        cluster.worker("prefill-0", stats=m.WorkerStats(queued_tokens=100, free_blocks=512))
        cluster.worker("prefill-1")
        cluster.holds("prefill-0", make_keys(16))
        assert cluster.place(320).prefill == m.Chosen("prefill-0", "prefill-0:1", 256)
        cluster.beat("prefill-0", queued_tokens=400)
        cluster.beat("decode-0")
        assert cluster.place(320).prefill == m.Chosen("prefill-1", "prefill-1:1", 0)

    def test_the_reason_has_the_numbers(self, cluster, make_keys):
        cluster.worker("decode-0")
        cluster.worker("prefill-1")
        cluster.holds("prefill-1", make_keys(6))
        reasons = cluster.place(128).reasons
        assert "prefill-1: 96 of 128 prompt tokens cached, 0 queued" in reasons
        assert (
            "decode-0: 0 of 128 prompt tokens cached, 0 of 8 requests, 512 of 512 blocks free"
            in reasons
        )

    def test_a_slow_worker_is_known_by_its_rate(self, cluster):
        cluster.worker("decode-0")
        slow = m.WorkerStats(prefill_tokens_per_second=100, free_blocks=512)
        cluster.worker("prefill-0", stats=slow)
        fast = m.WorkerStats(prefill_tokens_per_second=1000, queued_tokens=800, free_blocks=512)
        cluster.worker("prefill-1", stats=fast)
        assert cluster.place(128).prefill.worker_id == "prefill-1"

    def test_an_unmeasured_worker_is_taken_for_a_usual_one(self, cluster):
        cluster.worker("decode-0")
        cluster.worker(
            "prefill-0", stats=m.WorkerStats(prefill_tokens_per_second=9000, free_blocks=512)
        )
        cluster.worker("prefill-1", stats=m.WorkerStats(queued_tokens=50, free_blocks=512))
        assert cluster.place(128).prefill.worker_id == "prefill-0"

    def test_the_nearer_of_equals(self, cluster):
        cluster.worker("decode-0", host="x")
        for number in range(4):
            cluster.worker(f"prefill-{number}", host="x" if number == 2 else "y")
        assert cluster.place(128).prefill.worker_id == "prefill-2"

    def test_booked_prompts_are_queued_tokens(self, cluster):
        cluster.worker("decode-0", max_running=100)
        cluster.worker("prefill-0")
        cluster.worker("prefill-1")
        first = cluster.place(2000).prefill.worker_id
        others = {cluster.place(100).prefill.worker_id for _ in range(5)}
        assert first not in others


class TestPairs:
    def test_equal_numerics_before_all_else(self, cluster, make_keys):
        cluster.worker("decode-0", numerics="gpu")
        cluster.worker("prefill-0", numerics="cpu")
        cluster.worker(
            "prefill-1", numerics="gpu", stats=m.WorkerStats(queued_tokens=3000, free_blocks=512)
        )
        cluster.holds("prefill-0", make_keys(8))
        placement = cluster.place(129)
        assert placement.prefill.worker_id == "prefill-1"
        assert not any("different bits" in reason for reason in placement.reasons)

    def test_unequal_ones_are_better_than_none_and_it_is_said(self, cluster):
        cluster.worker("decode-0", numerics="gpu")
        cluster.worker("prefill-0", numerics="cpu")
        placement = cluster.place(128)
        assert placement.prefill.worker_id == "prefill-0"
        assert (
            "prefill-0 and decode-0 compute different bits: no prefill worker with equal "
            "numerics has room" in placement.reasons
        )

    def test_the_equal_one_is_found_in_a_crowd(self, cluster):
        cluster.worker("decode-0", numerics="gpu")
        for number in range(2 * SHORTLIST):
            cluster.worker(f"prefill-{number}", numerics="cpu")
        cluster.worker(
            "prefill-gpu", numerics="gpu", stats=m.WorkerStats(queued_tokens=5000, free_blocks=512)
        )
        assert cluster.place(128).prefill.worker_id == "prefill-gpu"

    def test_without_batch_invariance_numerics_say_nothing(self, cluster):
        cluster.worker("decode-0", numerics="")
        cluster.worker("prefill-0", numerics="")
        assert not any("bits" in reason for reason in cluster.place(128).reasons)

    def test_layouts_never_mix(self, cluster):
        cluster.worker("decode-0", kv_layout="a")
        cluster.worker("prefill-0", kv_layout="b")
        placement = cluster.place(1000, kv_layout="a")
        assert (placement.decode.worker_id, placement.prefill) == ("decode-0", None)

    def test_the_layout_asked_for_comes_first(self, cluster):
        for number in range(3):
            cluster.worker(f"decode-{number}", kv_layout="b")
        cluster.worker("decode-a", kv_layout="a", max_running=1)
        assert cluster.place(32, kv_layout="a").decode.worker_id == "decode-a"
        assert cluster.place(32, kv_layout="a").decode.worker_id == "decode-a"
        placement = cluster.place(32, kv_layout="a")
        assert placement.decode.worker_id != "decode-a", "no room: another layout serves too"
        assert any("KV layout" in reason for reason in placement.reasons)

    def test_models_never_mix(self, cluster):
        cluster.worker("decode-0", model="m")
        cluster.worker("decode-1", model="other")
        assert {cluster.place(32).decode.worker_id for _ in range(6)} == {"decode-0"}
