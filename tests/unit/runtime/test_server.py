"""A real server on loopback: statuses, health, reflection, ports, limits, cleanup."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import sys
import textwrap
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from kvtransfer.errors import LayoutMismatchError
from services.runtime.channels import Channels
from services.runtime.errors import (
    DrainingError,
    InvalidRequestError,
    OverloadedError,
    from_rpc,
)
from services.runtime.server import ListenError, Server
from services.runtime.settings import ServerSettings
from tandem.decode.v1 import decode_pb2, decode_pb2_grpc
from tandem.inference.v1 import inference_pb2, inference_pb2_grpc

SERVICE = "tandem.inference.v1.InferenceService"
SECRET = "the secret of the prompt"


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Does what the prompt says."""

    def __init__(self) -> None:
        self.cleaned = asyncio.Event()
        self.started = asyncio.Event()

    async def Generate(self, request, context):  # noqa: N802
        match request.prompt.split(":")[0]:
            case "invalid":
                raise InvalidRequestError("sampling.top_p", 1.5, "must be in (0, 1]")
            case "overloaded":
                raise OverloadedError("the queue is full", retry_seconds=2.5, limit=9)
            case "layout":
                raise LayoutMismatchError("layouts differ", field="layers")
            case "bug":
                raise ValueError(f"can't have {request.prompt}")
            case "chain":
                try:
                    raise KeyError(request.prompt)
                except KeyError:
                    raise RuntimeError("harmless words") from None
            case "abort":
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, "its own words")
            case "wait":
                self.started.set()
                try:
                    await asyncio.sleep(60)
                finally:
                    self.cleaned.set()
        return inference_pb2.GenerateResponse(text="fine")

    async def StreamGenerate(self, request, context):  # noqa: N802
        try:
            while True:
                yield inference_pb2.StreamGenerateResponse(text="x" * 1000)
                if request.request.prompt == "bug":
                    raise ValueError("after the first")
        finally:
            self.cleaned.set()


class Decode(decode_pb2_grpc.DecodeServiceServicer):
    """Answers every message, and fails for a cancel."""

    async def Decode(self, request_iterator, context):  # noqa: N802
        async for message in request_iterator:
            if message.WhichOneof("message") == "cancel":
                raise ValueError(message.cancel.request_id)
            yield decode_pb2.DecodeResponse()


@pytest.fixture
async def inference():
    return Inference()


@pytest.fixture
async def server(inference):
    server = Server(ServerSettings(max_message_bytes=2**20), "test", incident_id=lambda: "i-1")
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, inference, SERVICE)
    server.add(
        decode_pb2_grpc.add_DecodeServiceServicer_to_server,
        Decode(),
        "tandem.decode.v1.DecodeService",
    )
    server.address = await server.start()
    yield server
    await server.stop(0)


@pytest.fixture
async def channel(server):
    channels = Channels()
    yield channels.get(server.address)
    await channels.close()


@pytest.fixture
async def stub(channel):
    return inference_pb2_grpc.InferenceServiceStub(channel)


async def fails(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def ask(prompt: str) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt=prompt)


def details(error: grpc.aio.AioRpcError) -> dict[str, object]:
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
    )
    found = {}
    for packed in rpc_status.from_call(error).details:
        for kind in kinds:
            message = kind()
            if packed.Unpack(message):
                found[kind.__name__] = message
    return found


@pytest.mark.parametrize("grace", [0.0, 0.2])
async def test_who_runs_longer_than_a_drain_is_told_why_it_ends(server, stub, inference, grace):
    waits = stub.Generate(ask("wait"))
    streams = stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=ask("")))
    await streams.read()
    await inference.started.wait()
    stopping = asyncio.create_task(server.stop(grace, DrainingError("it goes", retry_seconds=2.5)))

    async def read_on():
        while True:
            assert await streams.read() is not grpc.aio.EOF

    for call in (waits, read_on()):
        error = await fails(call)
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "it goes")
        found = details(error)
        assert found["ErrorInfo"].reason == "DRAINING"
        assert found["RetryInfo"].retry_delay.ToMicroseconds() == 2_500_000
    await stopping
    assert inference.cleaned.is_set()


async def test_an_invalid_field(stub):
    error = await fails(stub.Generate(ask("invalid")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "sampling.top_p: 1.5 is not allowed; must be in (0, 1]"
    found = details(error)
    assert found["ErrorInfo"].reason == "INVALID_REQUEST"
    assert found["ErrorInfo"].domain == "tandem"
    assert found["BadRequest"].field_violations[0].field == "sampling.top_p"
    assert "RetryInfo" not in found


async def test_an_error_that_a_retry_may_help(stub):
    error = await fails(stub.Generate(ask("overloaded")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["RetryInfo"].retry_delay.ToMilliseconds() == 2500
    known = from_rpc(error)
    assert isinstance(known, OverloadedError)
    assert (known.retry_seconds, known.metadata) == (2.5, {"limit": "9"})


async def test_an_error_of_kvtransfer_keeps_its_reason_on_the_other_side(stub):
    error = await fails(stub.Generate(ask("layout")))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    known = from_rpc(error)
    assert (known.reason, known.code) == ("LAYOUT_MISMATCH", "FAILED_PRECONDITION")
    assert known.metadata == {"field": "layers"}


async def test_a_bug_is_an_incident_and_its_log_has_no_text(stub, caplog):
    error = await fails(stub.Generate(ask(f"bug:{SECRET}")))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "i-1" in error.details()
    assert details(error)["ErrorInfo"].metadata == {"incident": "i-1"}
    assert SECRET not in error.details()
    assert "incident i-1" in caplog.text
    assert "ValueError" in caplog.text
    assert "test_server.py" in caplog.text  # the traceback
    assert SECRET not in caplog.text


async def test_words_that_quote_nothing_are_logged(stub, caplog):
    await fails(stub.Generate(ask(f"chain:{SECRET}")))
    assert "RuntimeError: harmless words" in caplog.text
    assert SECRET not in caplog.text


async def test_abort_in_a_handler_is_its_own(stub, caplog):
    error = await fails(stub.Generate(ask("abort")))
    assert (error.code(), error.details()) == (grpc.StatusCode.ALREADY_EXISTS, "its own words")
    assert "incident" not in caplog.text


async def test_a_bug_in_the_middle_of_a_stream(stub, inference):
    request = inference_pb2.StreamGenerateRequest(request=ask("bug"))
    call = stub.StreamGenerate(request)
    assert (await call.read()).text
    error = await fails(call.read())
    assert error.code() is grpc.StatusCode.INTERNAL
    await asyncio.wait_for(inference.cleaned.wait(), 30)


async def test_a_bug_in_a_two_way_stream(channel, caplog):
    call = decode_pb2_grpc.DecodeServiceStub(channel).Decode()
    await call.write(decode_pb2.DecodeRequest(open=decode_pb2.Open(frontend_id="f")))
    await call.read()
    await call.write(decode_pb2.DecodeRequest(cancel=decode_pb2.Cancel(request_id=SECRET)))
    error = await fails(call.read())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in caplog.text


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
async def test_bytes_that_are_not_utf8(channel, kind):
    method = {"unary_unary": "Generate", "unary_stream": "StreamGenerate"}[kind]
    data = ask("@@").SerializeToString()
    if kind == "unary_stream":
        data = inference_pb2.StreamGenerateRequest(request=ask("@@")).SerializeToString()
    call = getattr(channel, kind)(f"/{SERVICE}/{method}")(data.replace(b"@@", b"\xff\xfe"))
    error = await fails(call if kind == "unary_unary" else call.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    field = details(error)["BadRequest"].field_violations[0].field
    assert field == ("prompt" if kind == "unary_unary" else "request.prompt")


async def test_bytes_that_are_not_utf8_in_the_middle_of_a_stream(channel):
    call = channel.stream_stream("/tandem.decode.v1.DecodeService/Decode")()
    await call.write(b"")
    await call.read()
    cancel = decode_pb2.DecodeRequest(cancel=decode_pb2.Cancel(request_id="@@"))
    await call.write(cancel.SerializeToString().replace(b"@@", b"\xff\xfe"))
    error = await fails(call.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)["BadRequest"].field_violations[0].field == "cancel.request_id"


async def test_bytes_that_are_no_message(channel, stub):
    error = await fails(channel.unary_unary(f"/{SERVICE}/Generate")(b"\xff\xff\xff\xff"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "are not a tandem.inference.v1.GenerateRequest" in error.details()
    assert (await stub.Generate(ask("ok"))).text == "fine"


@pytest.mark.parametrize("size", [2**20 + 1, 100 * 2**20])
async def test_a_message_over_the_limit_names_both_sizes(stub, size):
    error = await fails(stub.Generate(ask("x" * size)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    sizes = [int(number) for number in re.findall(r"\d+", error.details())]
    assert sizes[-1] == 2**20
    assert size <= sizes[-2] <= size + 16
    assert (await stub.Generate(ask("ok"))).text == "fine"


async def test_a_message_over_the_limit_in_a_stream(channel, stub):
    call = decode_pb2_grpc.DecodeServiceStub(channel).Decode()
    await call.write(decode_pb2.DecodeRequest(cancel=decode_pb2.Cancel(request_id="x" * 2**21)))
    error = await fails(call.read())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(2**20) in error.details()


async def test_cancelling_reaches_a_waiting_handler(stub, inference, caplog):
    call = stub.Generate(ask("wait"))
    waiting = asyncio.ensure_future(call)
    await inference.started.wait()
    call.cancel()
    await asyncio.wait_for(inference.cleaned.wait(), 30)
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert "incident" not in caplog.text


async def test_cancelling_reaches_a_handler_in_the_middle_of_a_write(stub, inference, caplog):
    """The client reads nothing, so the handler hangs in a write: flow control holds it there."""
    caplog.set_level(logging.ERROR)
    call = stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=ask("go")))
    await call.read()
    call.cancel()
    await asyncio.wait_for(inference.cleaned.wait(), 30)
    assert "incident" not in caplog.text


async def test_a_deadline_ends_the_handler(stub, inference):
    error = await fails(stub.Generate(ask("wait"), timeout=0.2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(inference.cleaned.wait(), 30)


async def test_health(server, channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE, "tandem.decode.v1.DecodeService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    error = await fails(health.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    stopping = asyncio.create_task(server.stop(5))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    await stopping


async def test_reflection(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {SERVICE, "tandem.decode.v1.DecodeService", "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} is taken"):
            await Server(ServerSettings(port=port), "test").start()


async def test_two_servers_do_not_share_a_port(server):
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ListenError, match=f"port {port} is taken"):
        await Server(ServerSettings(port=port), "test").start()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_listening_beyond_loopback_is_refused(host):
    with pytest.raises(ListenError, match=r"server\.allow_unauthenticated_remote"):
        await Server(ServerSettings(host=host), "test").start()


async def test_a_server_on_every_address_advertises_this_machine():
    """Not started, since tests stay on loopback."""
    settings = ServerSettings(host="0.0.0.0", allow_unauthenticated_remote=True)
    assert Server(settings, "test")._advertised(5) == f"{socket.gethostname()}:5"


@pytest.mark.parametrize(("advertise", "shown"), [("me:1", "me:1"), ("me:0", r"me:[1-9]\d*")])
async def test_what_is_advertised(advertise, shown):
    server = Server(ServerSettings(advertise=advertise), "test")
    assert re.fullmatch(shown, await server.start())
    await server.stop(0)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
async def test_other_names_of_loopback(host):
    server = Server(ServerSettings(host=host), "test")
    assert (await server.start()).startswith(f"{host}:")
    await server.stop(0)


async def test_a_host_that_does_not_exist():
    with pytest.raises(ListenError, match=r"can't listen on no-such-host\.invalid:0"):
        await Server(ServerSettings(host="no-such-host.invalid"), "test").start()


SILENT = """
    import asyncio
    from services.runtime.server import Server
    from services.runtime.settings import ServerSettings
    from tandem.decode.v1 import decode_pb2, decode_pb2_grpc

    class Decode(decode_pb2_grpc.DecodeServiceServicer):
        async def Decode(self, request_iterator, context):
            yield decode_pb2.DecodeResponse()
            await asyncio.Event().wait()

    async def main():
        server = Server(ServerSettings(), "silent")
        adder = decode_pb2_grpc.add_DecodeServiceServicer_to_server
        server.add(adder, Decode(), "tandem.decode.v1.DecodeService")
        print(await server.start(), flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())
"""


async def test_a_stopped_peer_is_noticed_in_ten_seconds():
    """SIGSTOP leaves the connection open: only pings that nobody answers tell."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(SILENT), stdout=asyncio.subprocess.PIPE
    )
    channels = Channels()
    try:
        address = (await process.stdout.readline()).decode().strip()
        call = decode_pb2_grpc.DecodeServiceStub(channels.get(address)).Decode()
        await call.read()
        process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        error = await fails(call.read())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - start < 25
    finally:
        process.kill()
        await process.wait()
        await channels.close()


ASKING = """
    import asyncio, sys
    from services.runtime.channels import Channels
    from tandem.inference.v1 import inference_pb2, inference_pb2_grpc

    async def main():
        stub = inference_pb2_grpc.InferenceServiceStub(Channels().get(sys.argv[1]))
        await stub.Generate(inference_pb2.GenerateRequest(prompt="wait"))

    asyncio.run(main())
"""


async def test_a_stopped_client_is_noticed_too(server, inference):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(ASKING), server.address
    )
    try:
        await inference.started.wait()
        process.send_signal(signal.SIGSTOP)
        await asyncio.wait_for(inference.cleaned.wait(), 25)
    finally:
        process.kill()
        await process.wait()


async def test_pings_every_second_are_welcome(server):
    """No GOAWAY (too_many_pings): the stream lives on, and so does the connection."""
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_time_between_pings_ms", 100),
    ]
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        call = decode_pb2_grpc.DecodeServiceStub(channel).Decode()
        await call.write(decode_pb2.DecodeRequest())
        await call.read()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        await call.write(decode_pb2.DecodeRequest())
        await call.read()
        call.cancel()
