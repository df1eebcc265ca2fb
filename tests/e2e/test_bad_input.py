"""Bad input from a hostile client: a status that names the field, and a server that stays up."""

from __future__ import annotations

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from services.runtime.errors import from_rpc
from tandem.inference.v1 import inference_pb2
from tests.e2e.world import SCRIPTED, Cluster, prompt, running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster():
    async with running(1, 1, SCRIPTED) as it:
        yield it


pytestmark = pytest.mark.asyncio(loop_scope="module")


def text(value: str) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt=value)


def chat(*turns: tuple[str, str]) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest()
    request.chat.SetInParent()
    for role, content in turns:
        request.chat.messages.add(role=role, content=content)
    return request


def changed(**fields: object) -> inference_pb2.GenerateRequest:
    request = prompt()
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(request, name).extend(value)
        else:
            setattr(request, name, value)
    return request


NAN, INF = float("nan"), float("inf")

BAD = {
    "no input": (inference_pb2.GenerateRequest(), "input"),
    "empty prompt": (text(""), "prompt"),
    "no tokens": (
        inference_pb2.GenerateRequest(tokens=inference_pb2.TokenInput()),
        "tokens.token_ids",
    ),
    "token out of vocabulary": (prompt(4_000_000_000), "tokens.token_ids"),
    "no messages": (chat(), "chat.messages"),
    "temperature": (prompt(temperature=-0.1), "sampling.temperature"),
    "temperature nan": (prompt(temperature=NAN), "sampling.temperature"),
    "temperature inf": (prompt(temperature=INF), "sampling.temperature"),
    "top_p zero": (prompt(top_p=0.0), "sampling.top_p"),
    "top_p above": (prompt(top_p=1.5), "sampling.top_p"),
    "min_p": (prompt(min_p=-1.0), "sampling.min_p"),
    "repetition": (prompt(repetition_penalty=0.0), "sampling.repetition_penalty"),
    "presence": (prompt(presence_penalty=3.0), "sampling.presence_penalty"),
    "frequency": (prompt(frequency_penalty=NAN), "sampling.frequency_penalty"),
    "max_tokens": (prompt(max_tokens=0), "sampling.max_tokens"),
    "min above max": (prompt(max_tokens=3, min_tokens=4), "sampling.min_tokens"),
    "logprobs": (prompt(logprobs=21), "sampling.logprobs"),
    "empty stop": (changed(stop=["a", ""]), "stop"),
    "too many stops": (changed(stop=["x"] * 17), "stop"),
    "request id": (changed(request_id="a b\n"), "request_id"),
    "long request id": (changed(request_id="a" * 129), "request_id"),
}


async def failure(cluster: Cluster, request, *, stream: bool) -> grpc.aio.AioRpcError:
    if stream:
        call = cluster.stream(request, timeout=20).read()
    else:
        call = cluster.inference.Generate(request, timeout=20)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", BAD)
async def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(cluster, case, stream):
    request, field = BAD[case]
    error = await failure(cluster, request, stream=stream)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    told = from_rpc(error)
    assert told.reason == "INVALID_REQUEST"
    assert told.metadata["field"].startswith(field)
    assert told.metadata["allowed"]
    status = rpc_status.from_call(error)
    violation = error_details_pb2.BadRequest()
    assert any(detail.Unpack(violation) for detail in status.details)
    assert violation.field_violations[0].field == told.metadata["field"]


async def test_a_prompt_beyond_the_context_window_says_both_numbers(cluster):
    (model,) = (await cluster.inference.ListModels(inference_pb2.ListModelsRequest())).models
    error = await failure(cluster, prompt(*([7] * (model.context_tokens + 1))), stream=False)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(model.context_tokens) in error.details()
    assert str(model.context_tokens + 1) in error.details()


async def test_an_unknown_model_lists_what_is_served(cluster):
    (model,) = (await cluster.inference.ListModels(inference_pb2.ListModelsRequest())).models
    error = await failure(cluster, changed(model="gpt-17"), stream=False)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "gpt-17" in error.details()
    assert model.name in error.details()


async def raw(cluster: Cluster, body: bytes) -> grpc.aio.AioRpcError:
    call = cluster.channel.unary_unary("/tandem.inference.v1.InferenceService/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(body, timeout=30)
    return caught.value


async def test_text_that_is_not_utf8_is_named(cluster):
    body = prompt().SerializeToString() + b"\x12\x02\xff\xfe"
    error = await raw(cluster, body)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc(error).metadata["field"] == "prompt"
    assert "UTF-8" in error.details()


async def test_bytes_that_are_no_message(cluster):
    error = await raw(cluster, b"\xff\xff\xff\xff")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_of_100_mb_is_refused_with_both_sizes(cluster):
    error = await raw(cluster, text("x" * 100_000_000).SerializeToString())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "100000005" in error.details()
    assert "4194304" in error.details()


async def test_after_all_that_it_answers(cluster):
    answer = await cluster.ask(prompt(max_tokens=3, ignore_eos=True))
    assert len(answer.tokens) == 3
    await cluster.nothing_held()
