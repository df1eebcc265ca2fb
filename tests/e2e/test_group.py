"""A decode worker of two expert-parallel ranks, of which one is killed or stopped in mid-stream."""

from __future__ import annotations

import signal
from contextlib import asynccontextmanager

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.e2e.world import Cluster, eventually, prompt, running
from tests.unit.engine_torch import torch_deepseek

TOKENS = 60
RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random DeepSeek, with a tokenizer that has a token for each byte."""
    made = torch_deepseek.write(tmp_path_factory.mktemp("deepseek"), eos_token_id=2, bos_token_id=1)
    signs = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({sign: n for n, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(signs[:3])
    tokenizer.save(str(made / "tokenizer.json"))
    return made


@asynccontextmanager
async def deepseek(folder, **more):
    settings = {
        "model.path": str(folder),
        "model.name": "tiny-deepseek",
        "engine.threads": "1",
        "engine.block_tokens": "16",
        "engine.kv_blocks": "64",
        "worker.heartbeat_seconds": "0.1",
        "coordinator.local_prefill_tokens": "0",
        "coordinator.worker_wait_seconds": "80",
    }
    own = {
        "decode-0": {
            "engine.ranks": str(RANKS),
            "engine.redundant_experts": "2",
            "engine.rank_silence_seconds": "6",
        }
    }
    async with running(1, 1, settings, own=own, **more) as cluster:
        yield cluster


def ranks_of(cluster: Cluster) -> list[psutil.Process]:
    return psutil.Process(cluster.local.pids["decode-0"]).children()


async def test_a_rank_that_is_lost_in_mid_stream_changes_no_token(folder):
    request = prompt(*range(10, 60), temperature=0.9, seed=7, max_tokens=TOKENS, ignore_eos=True)
    async with deepseek(folder, restart=True) as cluster:
        (worker,) = [w for w in (await cluster.status()).workers if w.info.dp_ranks == RANKS]
        assert worker.info.experts.gpus == RANKS
        prefill = next(w.info for w in (await cluster.status()).workers if w.info.dp_ranks == 1)
        assert worker.info.numerics == prefill.numerics  # one process gives the same bits
        undisturbed = await cluster.ask(request)
        assert len(undisturbed.tokens) == TOKENS
        first = await disturbed(cluster, request, undisturbed, signal.SIGKILL)
        assert first.decode_worker == worker.info.worker_id
        # Of one that is stopped nothing ends, no process and no connection; the other rank waits
        # for it in the model. The frontend misses tokens: it may be the first to give up.
        await disturbed(cluster, request, undisturbed, signal.SIGSTOP)
        again = ranks_of(cluster)
        # A leader that is killed takes its ranks with it.
        cluster.local.kill("decode-0", signal.SIGKILL)
        await gone(again)


async def disturbed(cluster: Cluster, request, undisturbed, by: signal.Signals):
    """The attempt that a rank's loss ended; the tokens are those without it."""
    lost: list[psutil.Process] = []

    async def at_20(answer) -> None:
        if len(answer.tokens) >= 20 and not lost:
            lost.extend(ranks_of(cluster))
            assert len(lost) == RANKS
            lost[0].send_signal(by)

    answer = await cluster.ask(request, at_20)
    assert lost
    assert answer.tokens == undisturbed.tokens
    attempts = answer.last.route.attempts
    assert attempts[0].failure in ("ENGINE_FAILED", "WORKER_LOST", "WORKER_SILENT")
    assert attempts[-1].decode_worker != attempts[0].decode_worker
    assert sum(a.tokens for a in attempts) == TOKENS
    await gone(lost)
    await cluster.nothing_held()
    return attempts[0]


async def gone(processes: list[psutil.Process]) -> None:
    async def are() -> bool:
        return not any(process.is_running() for process in processes)

    await eventually(are)
