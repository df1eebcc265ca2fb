"""PrefillService on a real server, over an engine the test drives."""

from __future__ import annotations

import grpc
import pytest

from services.engine.api import (
    EngineFault,
    FinishReason,
    Hold,
    KvPrefix,
    KvReport,
    PrefixReport,
    TokenOutput,
)
from services.engine.wire import kv_from
from services.prefill.service import PrefillServicer
from services.runtime.errors import EngineOverloadedError, from_rpc
from tandem.generation.v1 import generation_pb2
from tandem.prefill.v1 import prefill_pb2, prefill_pb2_grpc

SERVICE = "tandem.prefill.v1.PrefillService"


def request(name: str = "a/0", lease_ms: int = 1500) -> prefill_pb2.PrefillRequest:
    sampling = generation_pb2.SamplingParams(
        temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, presence_penalty=0,
        frequency_penalty=0, max_tokens=8, min_tokens=0, seed=1,
    )  # fmt: skip
    tokens = generation_pb2.TokenRequest(
        request_id=name, prompt_token_ids=[1, 2, 3], output_token_ids=[4], sampling=sampling
    )
    return prefill_pb2.PrefillRequest(request=tokens, lease_ms=lease_ms)


@pytest.fixture
async def world(puppet, serve):
    servicer = PrefillServicer(puppet, lease_seconds=30.0)
    channel = await serve(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, servicer, SERVICE)
    return puppet, servicer, prefill_pb2_grpc.PrefillServiceStub(channel)


async def test_accepted_then_done_and_the_kv_stays_for_the_sink(world):
    engine, servicer, stub = world
    call = stub.Prefill(request())
    assert (await call.read()).WhichOneof("message") == "accepted"
    ((_, seen, hold),) = await engine.wait_for("prefill")
    assert (seen.token_ids, hold) == ((1, 2, 3, 4), Hold(1.5))
    report = KvReport(cached_tokens=2, computed_tokens=2)
    servicer.deliver((TokenOutput("a/0", (9,), kv=report, prefill_done=True, handle=b"h"),))
    done = (await call.read()).done
    assert (list(done.token_ids), done.handle, done.kv.cached_tokens) == ([9], b"h", 2)
    assert done.finish_reason == generation_pb2.FINISH_REASON_UNSPECIFIED
    assert await call.read() is grpc.aio.EOF
    assert engine.named("cancel") == []
    assert servicer.live == 0


async def test_who_holds_the_start_reaches_the_engine_and_what_came_of_it_the_caller(world):
    engine, servicer, stub = world
    message = request()
    message.prefix.CopyFrom(generation_pb2.KvPrefix(worker_id="decode-1", address="h:1", tokens=2))
    call = stub.Prefill(message)
    await call.read()
    assert engine.prefixes == {"a/0": KvPrefix("decode-1", "h:1", 2)}
    told = PrefixReport("decode-1", 2, 0.25, 0.5, 0.125, "fetched")
    report = KvReport("shm", 10, 1, 0.125, lost="CORRUPT_BLOCK: 1", why="best", prefix=told)
    servicer.deliver((TokenOutput("a/0", (9,), kv=report, prefill_done=True),))
    done = (await call.read()).done
    assert kv_from(done.kv) == report
    await call.read()
    await stub.Prefill(request("b/0")).read()
    assert engine.prefixes["b/0"] is None


async def test_a_first_token_that_ends_the_request_frees_the_kv(world):
    engine, servicer, stub = world
    call = stub.Prefill(request())
    await call.read()
    servicer.deliver((TokenOutput("a/0", (0,), finish_reason=FinishReason.STOP),))
    assert (await call.read()).done.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert [c[1] for c in await engine.wait_for("cancel")] == ["a/0"]


async def test_cancelling_the_call_frees_everything(world):
    engine, servicer, stub = world
    call = stub.Prefill(request())
    await call.read()
    call.cancel()
    assert [c[1] for c in await engine.wait_for("cancel")] == ["a/0"]
    assert servicer.live == 0


async def test_without_a_lease_in_the_request_the_settings_hold(world):
    engine, _, stub = world
    call = stub.Prefill(request(lease_ms=0))
    await call.read()
    ((_, _, hold),) = engine.named("prefill")
    assert hold == Hold(30.0)


async def failure_of(call) -> grpc.aio.AioRpcError:
    async def drained() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained()
    return caught.value


async def test_a_refusal_is_a_status_with_its_reason(world):
    engine, servicer, stub = world
    engine.refuse = EngineOverloadedError("full", retry_seconds=2.5)
    error = await failure_of(stub.Prefill(request()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    told = from_rpc(error)
    assert (told.reason, told.retry_seconds) == ("ENGINE_OVERLOADED", 2.5)
    assert servicer.live == 0


async def test_an_engine_fault_becomes_the_calls_status(world):
    _engine, servicer, stub = world
    call = stub.Prefill(request())
    await call.read()
    fault = EngineFault("ENGINE_FAILED", "broke", {"step": "1"})
    servicer.deliver((TokenOutput("a/0", finish_reason=FinishReason.ERROR, error=fault),))
    told = from_rpc(await failure_of(call))
    assert (told.reason, told.metadata) == ("ENGINE_FAILED", {"step": "1"})


async def test_the_same_id_twice_is_refused_and_the_first_lives(world):
    engine, servicer, stub = world
    call = stub.Prefill(request())
    await call.read()
    error = await failure_of(stub.Prefill(request()))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert engine.named("cancel") == []
    servicer.deliver((TokenOutput("a/0", (9,), prefill_done=True),))
    assert list((await call.read()).done.token_ids) == [9]


async def test_draining_refuses_and_hands_back(world):
    engine, servicer, stub = world
    call = stub.Prefill(request())
    await call.read()
    leaving = EngineFault("DRAINING", "leaving")
    servicer.drain(leaving)
    assert (await failure_of(stub.Prefill(request("b/0")))).code() is grpc.StatusCode.UNAVAILABLE
    servicer.hand_back(leaving)
    assert from_rpc(await failure_of(call)).reason == "DRAINING"
    assert [c[1] for c in await engine.wait_for("cancel")] == ["a/0"]


async def test_a_role_that_is_left_finishes_its_prompts_and_may_be_taken_up_again(world):
    engine, servicer, stub = world
    call = stub.Prefill(request())
    await call.read()
    servicer.drain(EngineFault("ROLE_CHANGED", "decode now"))
    refused = from_rpc(await failure_of(stub.Prefill(request("b/0"))))
    assert (refused.reason, refused.message) == ("ROLE_CHANGED", "decode now")
    servicer.deliver((TokenOutput("a/0", (9,), prefill_done=True),))
    assert list((await call.read()).done.token_ids) == [9]
    servicer.open()
    again = stub.Prefill(request("b/0"))
    assert (await again.read()).WhichOneof("message") == "accepted"
    assert engine.named("cancel") == []


async def test_the_engine_hears_what_is_left_until_the_deadline(world):
    engine, _, stub = world
    call = stub.Prefill(request(), timeout=30)
    ((_, prompt, _),) = await engine.wait_for("prefill")
    # gRPC rounds a deadline up to three digits on the wire.
    assert 20 < prompt.deadline_seconds <= 30.1
    call.cancel()
