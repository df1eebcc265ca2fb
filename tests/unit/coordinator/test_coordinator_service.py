"""Both services over real gRPC in one process: what callers see."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from services.coordinator.app import serve
from services.coordinator.core import messages as m
from services.coordinator.core.core import Core
from services.coordinator.core.rules import Rules
from services.coordinator.service import Driver
from services.runtime.settings import CoordinatorProcess, CoordinatorSettings, ServerSettings
from tandem.coordinator.v1 import coordinator_pb2 as pb
from tandem.coordinator.v1 import coordinator_pb2_grpc as pb_grpc

KEY = b"k" * 16


@asynccontextmanager
async def coordinator(stop=None, **own):
    settings = CoordinatorProcess(
        server=ServerSettings(port=0), coordinator=CoordinatorSettings(**own)
    )
    address = asyncio.get_running_loop().create_future()
    stop = stop or asyncio.Event()
    serving = asyncio.create_task(serve(settings, ready=address.set_result, stop=stop))
    async with grpc.aio.insecure_channel(await address) as channel:
        yield channel
        stop.set()
        await serving


@pytest.fixture
async def channel():
    async with coordinator(lease_seconds=60.0, queue_limit=1) as channel:
        yield channel


@pytest.fixture
async def impatient():
    """A coordinator that soon takes silence for death."""
    async with coordinator(lease_seconds=1.0) as channel:
        yield channel


def hello(name="decode-0", role=pb.WORKER_ROLE_DECODE, **changes):
    info = {
        "worker_id": name,
        "role": role,
        "address": f"{name}:1",
        "model": "m",
        "kv_layout": "l",
        "block_tokens": 16,
        "total_blocks": 64,
        "max_running": 1,
        "context_tokens": 512,
        **changes,
    }
    stats = pb.WorkerStats(free_blocks=64)
    return pb.RegisterRequest(hello=pb.Hello(info=pb.WorkerInfo(**info), stats=stats))


@pytest.fixture
def register():
    """Brings workers in that say nothing more; keeps their streams open."""
    calls = []

    async def register(channel, *args, **kwargs):
        call = pb_grpc.WorkerRegistryServiceStub(channel).Register()
        calls.append(call)
        await call.write(hello(*args, **kwargs))
        answer = await call.read()
        assert answer.accepted.lease_ms > 0
        assert answer.accepted.coordinator_id.startswith("coordinator-")
        return call

    return register


def want(request="r", tokens=32, **more):
    return pb.PlaceRequest(request_id=request, context_tokens=tokens, model="m", **more)


def details(error):
    """ErrorInfo and RetryInfo of a failed call."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for box in rpc_status.from_call(error).details:
        box.Unpack(info)
        box.Unpack(retry)
    return info, retry


async def fails(call, code, reason):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    info, _ = details(caught.value)
    assert (caught.value.code(), info.reason) == (code, reason)
    return info


async def eventually(condition):
    """Asks until it is so; each question is a call, which gives way to others."""
    async with asyncio.timeout(30):
        while not await condition():
            pass


async def queued(stub, count):
    status = await stub.GetStatus(pb.GetStatusRequest())
    return status.queued == count


class TestPlace:
    async def test_an_answer_with_reasons(self, channel, register):
        await register(channel)
        await register(channel, "prefill-0", pb.WORKER_ROLE_PREFILL)
        stub = pb_grpc.CoordinatorServiceStub(channel)
        answer = await stub.Place(want(tokens=100))
        assert answer.decode.worker_id == "decode-0"
        assert answer.decode.address == "decode-0:1"
        assert answer.prefill.worker_id == "prefill-0"
        assert "prefill-0: 0 of 100 prompt tokens cached, 0 queued" in answer.reasons
        local = await stub.Place(want("other"))
        assert not local.HasField("prefill")

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (pb.PlaceRequest(context_tokens=1), "request_id"),
            (pb.PlaceRequest(request_id="r"), "context_tokens"),
            (want(block_keys=[b"short"]), "block_keys"),
            (want(tokens=1, block_keys=[KEY, KEY]), "block_keys"),
        ],
    )
    async def test_bad_input_names_the_field(self, channel, register, request_, field):
        await register(channel)
        stub = pb_grpc.CoordinatorServiceStub(channel)
        call = stub.Place(request_, timeout=5)
        info = await fails(call, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert info.metadata["field"] == field

    async def test_refusals_carry_their_reason_and_when_to_retry(self, channel, register):
        stub = pb_grpc.CoordinatorServiceStub(channel)
        await register(channel)
        for name in ("a", "b"):
            await stub.Place(want(name))
        waiting = stub.Place(want("c"))
        await eventually(lambda: queued(stub, 1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Place(want("d"))
        info, retry = details(caught.value)
        assert info.reason == "OVERLOADED"
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry.retry_delay.ToSeconds() >= 1
        await stub.Report(pb.ReportRequest(request_id="a"))
        answer = await waiting
        assert answer.decode.worker_id == "decode-0"
        assert answer.queued_seconds > 0
        status = await stub.GetStatus(pb.GetStatusRequest())
        assert dict(status.refused) == {"OVERLOADED": 1}
        assert status.placed == 3

    async def test_longer_than_any_worker_can_hold(self, impatient, register):
        stub = pb_grpc.CoordinatorServiceStub(impatient)

        async def settled():
            return (await stub.GetStatus(pb.GetStatusRequest())).uptime_seconds > 1.2

        await eventually(settled)
        call = await register(impatient)
        info = await fails(
            stub.Place(want(tokens=512)), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"
        )
        assert info.metadata["allowed"] == "at most 511"
        call.cancel()

    async def test_nobody_to_place_on(self, impatient, register):
        stub = pb_grpc.CoordinatorServiceStub(impatient)
        await fails(stub.Place(want()), grpc.StatusCode.UNAVAILABLE, "NO_WORKERS")
        call = await register(impatient)
        other = stub.Place(pb.PlaceRequest(request_id="r", context_tokens=9, model="gpt"))
        await fails(other, grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
        call.cancel()

    async def test_who_gives_up_leaves_the_queue(self, channel, register):
        await register(channel)
        stub = pb_grpc.CoordinatorServiceStub(channel)
        for name in ("a", "b"):
            await stub.Place(want(name))
        call = stub.Place(want("c"))
        await eventually(lambda: queued(stub, 1))
        call.cancel()
        await eventually(lambda: queued(stub, 0))

    async def test_the_deadline_of_the_call_is_that_of_the_wait(self, channel, register):
        await register(channel)
        stub = pb_grpc.CoordinatorServiceStub(channel)
        for name in ("a", "b"):
            await stub.Place(want(name))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Place(want("c"), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: queued(stub, 0))


class TestRegister:
    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"worker_id": ""}, "hello.info.worker_id"),
            ({"address": ""}, "hello.info.address"),
            ({"kv_layout": ""}, "hello.info.kv_layout"),
            ({"role": pb.WORKER_ROLE_UNSPECIFIED}, "hello.info.role"),
            ({"block_tokens": 0}, "hello.info.block_tokens"),
            ({"max_running": 0}, "hello.info.max_running"),
        ],
    )
    async def test_a_hello_that_can_not_be_used(self, channel, changes, field):
        call = pb_grpc.WorkerRegistryServiceStub(channel).Register()
        await call.write(hello(**{"name": changes.pop("worker_id", "decode-0"), **changes}))
        info = await fails(call.read(), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert info.metadata["field"] == field

    async def test_a_stream_starts_with_hello(self, channel):
        call = pb_grpc.WorkerRegistryServiceStub(channel).Register()
        await call.write(pb.RegisterRequest(heartbeat=pb.Heartbeat()))
        await fails(call.read(), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")

    @pytest.mark.parametrize("events", [{"stored": b"short"}, {"removed": KEY + b"x"}])
    async def test_keys_of_a_wrong_length(self, channel, register, events):
        call = await register(channel)
        message = pb.KvEvents(sequence=1, snapshot=True, **events)
        await call.write(pb.RegisterRequest(kv_events=message))
        await fails(call.read(), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")

    async def test_silence_ends_the_stream_with_a_reason(self, impatient, register):
        call = await register(impatient)
        info = await fails(call.read(), grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        assert info.metadata["worker"] == "decode-0"

    async def test_leaving_in_peace(self, channel, register):
        stub = pb_grpc.CoordinatorServiceStub(channel)
        call = await register(channel)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        assert not (await stub.GetStatus(pb.GetStatusRequest())).workers

    async def test_a_gap_is_answered(self, channel, register):
        call = await register(channel)
        for sequence in (1, 3):
            message = pb.KvEvents(sequence=sequence, snapshot=sequence == 1, stored=KEY)
            await call.write(pb.RegisterRequest(kv_events=message))
        assert (await call.read()).HasField("resync")


async def test_status_and_models(channel, register):
    call = await register(channel)
    await register(channel, "prefill-0", pb.WORKER_ROLE_PREFILL, context_tokens=256)
    message = pb.KvEvents(sequence=1, snapshot=True, stored=KEY)
    await call.write(pb.RegisterRequest(kv_events=message))
    await call.write(pb.RegisterRequest(draining=pb.Draining()))
    stub = pb_grpc.CoordinatorServiceStub(channel)

    async def draining():
        status = await stub.GetStatus(pb.GetStatusRequest())
        return status.workers[0].draining

    await eventually(draining)
    status = await stub.GetStatus(pb.GetStatusRequest())
    decode, prefill = status.workers
    assert (decode.info.worker_id, decode.known_blocks) == ("decode-0", 1)
    assert prefill.info == hello("prefill-0", 1, context_tokens=256, dp_ranks=1).hello.info
    assert prefill.stats.free_blocks == 64
    (model,) = (await stub.GetModels(pb.GetModelsRequest())).models
    assert (model.model, model.kv_layout, model.block_tokens) == ("m", "l", 16)
    assert (model.context_tokens, model.prefill_workers, model.decode_workers) == (256, 1, 0)


async def test_stopping_ends_everyones_wait():
    stop = asyncio.Event()
    async with coordinator(stop, lease_seconds=30.0) as channel:
        worker = pb_grpc.WorkerRegistryServiceStub(channel).Register()
        await worker.write(hello())
        await worker.read()
        stub = pb_grpc.CoordinatorServiceStub(channel)
        for name in ("a", "b"):
            await stub.Place(want(name))
        waiting = asyncio.create_task(
            fails(stub.Place(want("c")), grpc.StatusCode.UNAVAILABLE, "COORDINATOR_UNAVAILABLE")
        )
        ended = asyncio.create_task(
            fails(worker.read(), grpc.StatusCode.UNAVAILABLE, "COORDINATOR_UNAVAILABLE")
        )
        await eventually(lambda: queued(stub, 1))
        stop.set()
        await waiting
        await ended


async def test_an_answer_that_nobody_takes_any_more_books_nothing():
    """The caller gives up in the very moment in which it gets its turn."""
    core = Core(Rules(3.0, 10, 64), 0.0, lambda: 0.0)
    driver = Driver(core, "c", clock=lambda: 1.0)
    info = m.WorkerInfo("decode-0", m.Role.DECODE, "h:1", "m", "l", 16, 64, 1, 512)
    full = m.WorkerStats(running=2, free_blocks=64)
    driver.dispatch(m.WorkerHello(1, info, full))
    want_one = m.PlaceRequest("r", 0, "m", (), 32, 8)
    waiting = asyncio.create_task(driver.place(want_one, None))
    await asyncio.sleep(0)
    assert len(core.desk.queue) == 1
    driver.dispatch(m.WorkerHeartbeat(1, m.WorkerStats(free_blocks=64)))
    assert core.members.get("decode-0").load.requests == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert core.members.get("decode-0").load.requests == 0


@pytest.mark.parametrize(
    ("draining", "words"), [(True, "leaves"), (False, "is gone: its stream broke")]
)
async def test_the_log_tells_a_leave_from_a_stream_that_broke(channel, caplog, draining, words):
    caplog.set_level("INFO", "services.coordinator.service")
    call = pb_grpc.WorkerRegistryServiceStub(channel).Register()
    await call.write(hello())
    await call.read()
    if draining:
        await call.write(pb.RegisterRequest(draining=pb.Draining()))
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pass
    assert f"worker decode-0 {words}" in caplog.messages
