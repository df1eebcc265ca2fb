"""The newcomer's model through real processes: equal to itself, whatever happens on the way."""

from __future__ import annotations

import signal

import pytest
import pytest_asyncio

from tandem.inference.v1 import inference_pb2
from tests.e2e.world import running

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

# Small chunks and blocks, so that prompts of some dozen tokens cross their boundaries.
SETTINGS = {"engine.chunk_tokens": "24", "engine.block_tokens": "16", "engine.kv_memory_mib": "128"}

QUESTIONS = [
    "What is the capital of Japan?",
    "Write three sentences about why the sea is salty, and one about what follows for fish.",
    "List the first five prime numbers and explain in plain words what a prime number is. "
    "Then say why one is not among them, and whether there is a largest.",
]


def question(content: str, **sampling) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest()
    request.chat.messages.add(role="user", content=content)
    for key, value in sampling.items():
        setattr(request.sampling, key, value)
    return request


SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 11, "repetition_penalty": 1.1},
}


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["fp8_e4m3", "bfloat16"])
async def pair(request):
    """The same model twice: prefill and decode apart, and one process that does both."""
    settings = SETTINGS | {"engine.kv_dtype": request.param}
    apart = settings | {"coordinator.local_prefill_tokens": "0"}
    async with running(2, 2, apart, restart=True) as two, running(0, 1, settings) as one:
        yield two, one


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("content", QUESTIONS, ids=["short", "middle", "long"])
async def test_disaggregated_equals_single_process(pair, content, sampling):
    two, one = pair
    request = question(content, max_tokens=40, **SAMPLINGS[sampling])
    apart, together = await two.ask(request), await one.ask(request)
    assert apart.tokens == together.tokens
    assert apart.text == together.text
    (attempt,) = apart.last.route.attempts
    assert attempt.prefill_worker
    assert attempt.kv.bytes + attempt.kv.cached_tokens > 0
    assert together.last.route.attempts[0].prefill_worker == ""


async def test_it_knows_the_capital_of_japan_and_reuses_the_prompt(pair):
    two, _ = pair
    request = question("What is the capital city of Japan?", temperature=0.0, max_tokens=24)
    assert "Tokyo" in (await two.ask(request)).text
    assert (await two.ask(request)).last.usage.cached_tokens >= 16


@pytest.mark.parametrize("pair", ["fp8_e4m3"], indirect=True)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_kill_9_in_mid_stream(pair, role, sampling):
    two, _ = pair
    await two.workers_up(4)
    request = question(QUESTIONS[1] + f" ({role})", max_tokens=60, **SAMPLINGS[sampling])
    undisturbed = await two.ask(request)
    assert len(undisturbed.tokens) > 20
    killed: list[str] = []

    async def kill(answer) -> None:
        if killed or len(answer.tokens) < (1 if role == "prefill" else 12):
            return
        if role == "prefill":
            placed = undisturbed.last.route.attempts[0].prefill_worker
            killed.append(two.worker(placed))
        else:
            killed.append(await two.busy("decode"))
        two.local.kill(killed[0], signal.SIGKILL)

    answer = await two.ask(request, kill)
    assert killed
    assert answer.tokens == undisturbed.tokens
    assert answer.text == undisturbed.text
    await two.workers_up(4)
    await two.nothing_held()


async def test_logprobs_and_stop_strings(pair):
    two, one = pair
    request = question(QUESTIONS[1], temperature=0.0, max_tokens=30)
    request.sampling.logprobs = 3
    whole = (await two.ask(request)).text
    stop = whole[20:26]  # begins and ends within tokens
    request.stop.append(stop)
    for cluster in (two, one):
        answer = await cluster.inference.Generate(request, timeout=60)
        assert answer.text == whole[: whole.index(stop)]
        assert answer.finish_reason == 1
        assert len(answer.logprobs) == len(answer.token_ids)
        assert all(len(item.top) == 3 for item in answer.logprobs)
        # Greedy: what was chosen is the most probable.
        assert all(item.top[0].token_id == item.token_id for item in answer.logprobs)
    await two.nothing_held()
