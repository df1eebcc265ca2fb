"""A decode worker of two expert-parallel ranks, one of which is killed in mid-stream."""

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
    own = {"decode-0": {"engine.ranks": str(RANKS), "engine.redundant_experts": "2"}}
    async with running(1, 1, settings, own=own, **more) as cluster:
        yield cluster


def ranks_of(cluster: Cluster) -> list[psutil.Process]:
    return psutil.Process(cluster.local.pids["decode-0"]).children()


async def test_a_rank_killed_in_mid_stream_changes_no_token(folder):
    request = prompt(*range(10, 60), temperature=0.9, seed=7, max_tokens=TOKENS, ignore_eos=True)
    killed: list[psutil.Process] = []
    async with deepseek(folder, restart=True) as cluster:
        (worker,) = [w for w in (await cluster.status()).workers if w.info.dp_ranks == RANKS]
        assert worker.info.experts.gpus == RANKS
        prefill = next(w.info for w in (await cluster.status()).workers if w.info.dp_ranks == 1)
        assert worker.info.numerics == prefill.numerics  # one process gives the same bits
        undisturbed = await cluster.ask(request)
        assert len(undisturbed.tokens) == TOKENS

        async def kill_at_20(answer) -> None:
            if len(answer.tokens) >= 20 and not killed:
                killed.extend(ranks_of(cluster))
                assert len(killed) == RANKS
                killed[0].send_signal(signal.SIGKILL)

        answer = await cluster.ask(request, kill_at_20)
        assert killed
        assert answer.tokens == undisturbed.tokens
        first, *others = answer.last.route.attempts
        assert first.decode_worker == worker.info.worker_id
        assert first.failure in ("ENGINE_FAILED", "WORKER_LOST")
        assert others[-1].decode_worker != first.decode_worker
        assert sum(a.tokens for a in answer.last.route.attempts) == TOKENS
        assert not any(process.is_running() for process in killed)
        await cluster.nothing_held()
        again = ranks_of(cluster)
        # A leader that is killed takes its ranks with it.
        cluster.local.kill("decode-0", signal.SIGKILL)

        async def gone() -> bool:
            return not any(process.is_running() for process in again)

        await eventually(gone)
