"""LoRA adapters: a request goes to workers that have its adapter loaded, and nowhere else."""

from services.coordinator.core import messages as m
from services.coordinator.core.admission import LOOKAHEAD, MAX_OVERTAKEN
from services.coordinator.wire import models_to

OLD, NEW = "legal@" + "0" * 32, "legal@" + "1" * 32


class TestPlacement:
    def test_only_workers_that_have_it(self, cluster):
        for number in range(20):
            cluster.worker(f"decode-{number}")
        cluster.worker("decode-lora")
        cluster.beat("decode-lora", adapters=(NEW,), running=2)
        assert {cluster.place(32, adapter=NEW).decode.worker_id for _ in range(3)} == {
            "decode-lora"
        }

    def test_weights_of_the_same_name_are_others(self, cluster):
        cluster.worker("decode-a")
        cluster.worker("decode-b")
        cluster.beat("decode-a", adapters=(OLD,))
        cluster.beat("decode-b", adapters=(NEW,))
        assert cluster.place(32, adapter=OLD).decode.worker_id == "decode-a"
        assert cluster.place(32, adapter=NEW).decode.worker_id == "decode-b"

    def test_prefill_workers_too(self, cluster):
        cluster.worker("decode-a", stats=m.WorkerStats(free_blocks=512, adapters=(NEW,)))
        cluster.worker("prefill-without")
        placed = cluster.place(1024, adapter=NEW)
        assert placed.prefill is None
        assert f"no prefill worker is up with {NEW}" in placed.reasons[-1]
        cluster.beat("prefill-without", queued_tokens=100, prefill_tokens_per_second=1e6)
        cluster.worker("prefill-with", stats=m.WorkerStats(free_blocks=512, adapters=(NEW,)))
        assert cluster.place(1024, adapter=NEW).prefill.worker_id == "prefill-with"

    def test_a_full_one_is_waited_for(self, cluster):
        cluster.worker("decode-a")
        cluster.worker("decode-lora")
        cluster.beat("decode-lora", adapters=(NEW,), running=8, waiting=8)
        ticket = cluster.ask(32, adapter=NEW)
        assert ticket not in cluster.answers
        # Others pass it by.
        assert cluster.place(32).decode.worker_id == "decode-a"
        cluster.beat("decode-lora", adapters=(NEW,))
        assert cluster.answers[ticket].placement.decode.worker_id == "decode-lora"

    def test_many_that_wait_for_full_ones_hold_up_nobody_else(self, cluster):
        cluster.worker("decode-a")
        cluster.worker("decode-lora")
        cluster.beat("decode-lora", adapters=(NEW,), running=8, waiting=8)
        cluster.beat("decode-a", running=8, waiting=8)
        waiting = [cluster.ask(32, adapter=NEW) for _ in range(LOOKAHEAD)]
        behind = cluster.ask(32)
        cluster.beat("decode-a")
        assert cluster.answers[behind].placement.decode.worker_id == "decode-a"
        # However many others come: they take nothing that the first could have had.
        for number in range(MAX_OVERTAKEN * 2):
            cluster.worker(f"decode-{number}")
            assert cluster.place(32).decode.worker_id != "decode-lora"
        assert not set(waiting) & set(cluster.answers)
        cluster.beat("decode-lora", adapters=(NEW,))
        assert cluster.answers[waiting[0]].placement.decode.worker_id == "decode-lora"

    def test_loading_is_noticed_at_once(self, cluster):
        cluster.worker("decode-a")
        assert cluster.refuse(32, adapter=NEW).reason is m.Reason.UNKNOWN_ADAPTER
        cluster.beat("decode-a", adapters=(NEW,))
        assert cluster.place(32, adapter=NEW).decode.worker_id == "decode-a"


class TestRefusals:
    def test_nobody_has_it(self, cluster):
        cluster.worker("decode-a")
        cluster.beat("decode-a", adapters=("fiction@2", OLD))
        refused = cluster.refuse(32, adapter=NEW)
        assert refused.reason is m.Reason.UNKNOWN_ADAPTER
        assert refused.metadata["adapter"] == NEW
        assert f"loaded: fiction@2, {OLD}" in refused.message

    def test_those_that_have_it_failed_the_request(self, cluster):
        cluster.worker("decode-a")
        cluster.worker("decode-b")
        cluster.beat("decode-a", adapters=(NEW,))
        refused = cluster.refuse(32, adapter=NEW, exclude=("decode-a",))
        assert refused.reason is m.Reason.NO_WORKERS
        assert f"with adapter {NEW} but the 1 that failed" in refused.message

    def test_one_that_waits_is_refused_when_the_last_is_unloaded(self, cluster):
        cluster.worker("decode-lora")
        cluster.beat("decode-lora", adapters=(NEW,), running=8, waiting=8)
        ticket = cluster.ask(32, adapter=NEW)
        cluster.beat("decode-lora", running=8, waiting=8)
        cluster.do(m.Tick())
        assert cluster.answers[ticket].refusal.reason is m.Reason.UNKNOWN_ADAPTER

    def test_a_worker_that_was_lost_may_bring_it_back(self, make_cluster):
        cluster = make_cluster(wait=10.0)
        cluster.worker("decode-a")
        cluster.worker("decode-lora", stats=m.WorkerStats(free_blocks=512, adapters=(NEW,)))
        cluster.do(m.StreamLost(cluster.streams["decode-lora"]))
        ticket = cluster.ask(32, adapter=NEW)
        cluster.wait(9.0, beat=("decode-a",))
        assert ticket not in cluster.answers
        cluster.wait(2.0, beat=("decode-a",))
        assert cluster.answers[ticket].refusal.reason is m.Reason.UNKNOWN_ADAPTER


def test_models_name_adapters_and_which_version_is_present(cluster):
    cluster.worker("decode-a")
    cluster.worker("decode-b")
    cluster.worker("prefill-a", stats=m.WorkerStats(free_blocks=512, adapters=("other@3",)))
    cluster.beat("decode-a", adapters=(NEW, OLD))
    cluster.beat("decode-b", adapters=(OLD,))
    (served,) = models_to(cluster.core).models
    told = [(a.id, a.decode_workers, a.current_workers) for a in served.adapters]
    assert told == [(OLD, 2, 1), (NEW, 1, 1)]
