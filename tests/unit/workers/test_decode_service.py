"""DecodeService on a real server, over an engine the test drives."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from services.decode.service import DecodeServicer
from services.engine.api import (
    EngineFault,
    FinishReason,
    FirstTokens,
    KvReport,
    KvSource,
    TokenLogprob,
    TokenOutput,
)
from services.runtime.errors import EngineOverloadedError
from tandem.decode.v1 import decode_pb2, decode_pb2_grpc
from tandem.generation.v1 import generation_pb2

SERVICE = "tandem.decode.v1.DecodeService"


def token_request(request_id: str, *prompt: int) -> generation_pb2.TokenRequest:
    sampling = generation_pb2.SamplingParams(
        temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, presence_penalty=0,
        frequency_penalty=0, max_tokens=8, min_tokens=0, seed=1,
    )  # fmt: skip
    return generation_pb2.TokenRequest(
        request_id=request_id, prompt_token_ids=prompt or (1, 2, 3), sampling=sampling
    )


def start(request_id: str, **more) -> decode_pb2.DecodeRequest:
    return decode_pb2.DecodeRequest(
        start=decode_pb2.Start(request=token_request(request_id), **more)
    )


OPEN = decode_pb2.DecodeRequest(open=decode_pb2.Open(frontend_id="f"))


@pytest.fixture
async def world(puppet, serve):
    servicer = DecodeServicer(puppet)
    channel = await serve(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer, SERVICE)
    return puppet, servicer, decode_pb2_grpc.DecodeServiceStub(channel)


async def test_one_frame_carries_a_steps_outputs_of_this_frontend_only(world):
    engine, servicer, stub = world
    one, two = stub.Decode(), stub.Decode()
    await one.write(OPEN)
    await two.write(OPEN)
    for call, name in ((one, "a"), (one, "b"), (two, "c")):
        await call.write(start(name))
    await engine.wait_for("decode", 3)
    servicer.deliver(tuple(TokenOutput(n, (i,)) for i, n in enumerate("abc")))
    assert [(o.request_id, list(o.token_ids)) for o in (await one.read()).outputs] == [
        ("a", [0]),
        ("b", [1]),
    ]
    assert [o.request_id for o in (await two.read()).outputs] == ["c"]


async def test_what_comes_of_a_request_reaches_the_wire_whole(world):
    engine, servicer, stub = world
    call = stub.Decode()
    await call.write(OPEN)
    source = decode_pb2.KvSource(worker_id="p", address="h:1", lease_id="a")
    await call.write(start("a", source=source))
    ((_, request, seen),) = await engine.wait_for("decode")
    assert request.prompt_token_ids == (1, 2, 3)
    assert seen == KvSource("p", "h:1", "a")
    proceed = decode_pb2.Proceed(request_id="a", token_ids=[7], handle=b"h")
    await call.write(decode_pb2.DecodeRequest(proceed=proceed))
    ((_, name, first),) = await engine.wait_for("proceed")
    assert (name, first) == ("a", FirstTokens((7,), b"h"))
    logprob = TokenLogprob(5, -0.5, ((5, -0.5), (6, -1.5)))
    report = KvReport("shm", 10, 1, 0.5, 0.25, 2, 1, 1)
    servicer.deliver((TokenOutput("a", (5,), (logprob,), FinishReason.LENGTH, kv=report),))
    (output,) = (await call.read()).outputs
    assert output.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert [(t.token_id, t.logprob) for t in output.logprobs[0].top] == [(5, -0.5), (6, -1.5)]
    assert (output.kv.transport, output.kv.bytes, output.kv.corrupt_blocks) == ("shm", 10, 1)
    assert servicer.live == 0


async def test_a_refusal_is_one_requests_output_and_the_stream_goes_on(world):
    engine, servicer, stub = world
    call = stub.Decode()
    await call.write(OPEN)
    engine.refuse = EngineOverloadedError("full", waiting=3)
    await call.write(start("a"))
    (output,) = (await call.read()).outputs
    assert output.finish_reason == generation_pb2.FINISH_REASON_ERROR
    assert (output.error.reason, dict(output.error.metadata)) == (
        "ENGINE_OVERLOADED",
        {"waiting": "3"},
    )
    engine.refuse = None
    await call.write(start("a"))
    await engine.wait_for("decode")
    servicer.deliver((TokenOutput("a", (1,)),))
    assert (await call.read()).outputs[0].token_ids == [1]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r.ClearField("prompt_token_ids"), "request.prompt_token_ids"),
        (lambda r: r.prompt_token_ids.append(100), "request.prompt_token_ids"),
        (lambda r: r.output_token_ids.append(4_000_000_000), "request.output_token_ids"),
        (lambda r: r.sampling.ClearField("seed"), "request.sampling.seed"),
        (lambda r: setattr(r, "request_id", ""), "request.request_id"),
    ],
)
async def test_a_malformed_request_names_its_field(world, change, field):
    _, _, stub = world
    message = start("a")
    change(message.start.request)
    call = stub.Decode()
    await call.write(OPEN)
    await call.write(message)
    (output,) = (await call.read()).outputs
    assert output.error.reason == "INVALID_REQUEST"
    assert output.error.metadata["field"] == field


async def test_a_second_request_of_the_same_id_is_refused_and_the_first_lives(world):
    engine, servicer, stub = world
    call = stub.Decode()
    await call.write(OPEN)
    await call.write(start("a"))
    await call.write(start("a"))
    (output,) = (await call.read()).outputs
    assert output.error.reason == "DUPLICATE_REQUEST"
    assert len(engine.named("decode")) == 1
    assert servicer.live == 1


@pytest.mark.parametrize("how", ["cancel", "half-close"])
async def test_a_broken_stream_cancels_its_requests(world, how):
    engine, servicer, stub = world
    call = stub.Decode()
    await call.write(OPEN)
    await call.write(start("a"))
    await call.write(start("b"))
    await engine.wait_for("decode", 2)
    if how == "cancel":
        call.cancel()
    else:
        await call.done_writing()
    assert {c[1] for c in await engine.wait_for("cancel", 2)} == {"a", "b"}
    assert servicer.live == 0


async def test_cancel_frees_one_and_ignores_strangers(world):
    engine, servicer, stub = world
    call, other = stub.Decode(), stub.Decode()
    await call.write(OPEN)
    await other.write(OPEN)
    await call.write(start("a"))
    await other.write(start("b"))
    await engine.wait_for("decode", 2)
    for name in ("nobody", "b", "a"):
        cancel = decode_pb2.DecodeRequest(cancel=decode_pb2.Cancel(request_id=name))
        await call.write(cancel)
    await engine.wait_for("cancel")
    assert [c[1] for c in engine.named("cancel")] == ["a"]
    assert servicer.live == 1


async def test_the_deadline_ends_a_request_that_its_frontend_forgot(world):
    engine, _, stub = world
    call = stub.Decode()
    await call.write(OPEN)
    await call.write(start("a", deadline_ms=30))
    (output,) = (await call.read()).outputs
    assert output.error.reason == "DEADLINE"
    assert [c[1] for c in engine.named("cancel")] == ["a"]


LEAVING = EngineFault("DRAINING", "leaving")
CHANGED = EngineFault("ROLE_CHANGED", "prefill now", {"role": "prefill"})


async def running(world, *names: str):
    """A stream with requests that the engine has."""
    engine, _, stub = world
    before = len(engine.named("decode"))
    call = stub.Decode()
    await call.write(OPEN)
    for name in names:
        await call.write(start(name))
    await engine.wait_for("decode", before + len(names))
    return call


def told(frame) -> list[tuple[str, list[int], bool]]:
    return [(o.request_id, list(o.token_ids), o.moving) for o in frame.outputs]


async def test_draining_refuses_new_requests_and_hands_back_old_ones(world):
    engine, servicer, _ = world
    call = await running(world, "a")
    servicer.drain(LEAVING)
    assert told(await call.read()) == [("a", [], True)]
    await call.write(start("b"))
    assert (await call.read()).outputs[0].error.reason == "DRAINING"
    servicer.hand_back(LEAVING)
    (output,) = (await call.read()).outputs
    assert (output.request_id, output.error.reason) == ("a", "DRAINING")
    assert [c[1] for c in engine.named("cancel")] == ["a"]


async def test_each_request_that_runs_is_told_to_move_once_and_goes_on(world):
    engine, servicer, _ = world
    call = await running(world, "a", "b")
    other = await running(world, "c")
    servicer.deliver((TokenOutput("a", (1,)),))
    servicer.drain(CHANGED)
    servicer.drain(LEAVING)  # it is told to end before all have moved
    servicer.deliver((TokenOutput("a", (2,)), TokenOutput("b", (3,)), TokenOutput("c", (4,))))
    assert told(await call.read()) == [
        ("a", [1], False),
        ("a", [], True),
        ("b", [], True),
        ("a", [2], False),
        ("b", [3], False),
    ]
    assert told(await other.read()) == [("c", [], True), ("c", [4], False)]
    servicer.deliver((TokenOutput("b", (5,), finish_reason=FinishReason.LENGTH),))
    (last,) = (await call.read()).outputs
    assert (last.finish_reason, last.error.reason) == (generation_pb2.FINISH_REASON_LENGTH, "")
    assert engine.named("cancel") == []
    assert servicer.live == 2


async def test_cancelling_a_request_that_has_moved_leaves_nothing(world):
    engine, servicer, _ = world
    call = await running(world, "a")
    servicer.drain(LEAVING)
    await call.read()
    cancel = decode_pb2.DecodeRequest(cancel=decode_pb2.Cancel(request_id="a"))
    await call.write(cancel)
    await engine.wait_for("cancel")
    assert servicer.live == 0
    servicer.deliver((TokenOutput("a", (7,)),))
    servicer.hand_back(LEAVING)
    await call.write(start("b"))  # what is read next is its refusal: nothing more came of a
    assert [o.request_id for o in (await call.read()).outputs] == ["b"]


async def test_a_role_that_is_left_is_refused_for_what_it_is_and_may_be_taken_up_again(world):
    engine, servicer, _ = world
    call = await running(world, "a")
    servicer.drain(CHANGED)
    assert told(await call.read()) == [("a", [], True)]
    await call.write(start("b"))
    (output,) = (await call.read()).outputs
    assert (output.error.reason, output.error.message) == ("ROLE_CHANGED", "prefill now")
    assert dict(output.error.metadata) == {"role": "prefill"}
    servicer.open()
    await call.write(start("b"))
    await engine.wait_for("decode", 2)
    servicer.drain(LEAVING)
    assert told(await call.read()) == [("a", [], True), ("b", [], True)]


@pytest.mark.parametrize("first", [None, start("a")])
async def test_a_stream_that_does_not_open_is_refused(world, first):
    _, _, stub = world
    call = stub.Decode()
    if first is not None:
        await call.write(first)
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_slow_frontend_gets_fewer_larger_frames_and_every_token(world):
    engine, servicer, stub = world
    call = stub.Decode()
    await call.write(OPEN)
    await call.write(start("a"))
    await engine.wait_for("decode")
    for i in range(500):
        servicer.deliver((TokenOutput("a", (i % 100,)),))
    servicer.deliver((TokenOutput("a", (), finish_reason=FinishReason.STOP),))
    tokens: list[int] = []
    frames = 0
    async with asyncio.timeout(10):
        while True:
            frame = await call.read()
            frames += 1
            for output in frame.outputs:
                tokens.extend(output.token_ids)
            if frame.outputs[-1].finish_reason:
                break
    assert tokens == [i % 100 for i in range(500)]
    assert frames < 500


async def test_an_engine_fault_keeps_its_reason_and_values(world):
    engine, servicer, stub = world
    call = stub.Decode()
    await call.write(OPEN)
    await call.write(start("a"))
    await engine.wait_for("decode")
    fault = EngineFault("KV_SOURCE_LOST", "gone", {"source": "p"})
    servicer.deliver((TokenOutput("a", finish_reason=FinishReason.ERROR, error=fault),))
    (output,) = (await call.read()).outputs
    assert (output.error.reason, output.error.message) == ("KV_SOURCE_LOST", "gone")
    assert dict(output.error.metadata) == {"source": "p"}


async def test_the_engine_hears_what_is_left_until_the_deadline(world):
    engine, _, stub = world
    call = stub.Decode()
    await call.write(OPEN)
    await call.write(start("a", deadline_ms=1500))
    await call.write(start("b"))
    started = await engine.wait_for("decode", 2)
    assert [request.deadline_seconds for _, request, _ in started] == [1.5, None]
    call.cancel()
