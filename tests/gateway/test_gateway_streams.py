"""Streams: their bytes, and what becomes of them when either side goes, is slow, or has to end."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest
from grpc_health.v1 import health_pb2

from services.runtime.errors import InvalidRequestError, WorkerLostError, to_status
from tandem.openai.v1 import openai_pb2 as pb
from tests.gateway.gateway_rig import (
    BUILD_SECONDS,
    Backend,
    behind,
    chat,
    gateway,
    until,
)

pytestmark = pytest.mark.timeout(BUILD_SECONDS)

CHAT = "/v1/chat/completions"
STREAM = b'{"model":"m","stream":true}'
HEAD = '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m","choices":'
FIRST = HEAD + (
    '[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
)
SECOND = HEAD + '[{"index":0,"delta":{"content":"hi"},"logprobs":null,"finish_reason":null}]'


async def test_the_bytes_of_a_stream():
    async with behind() as (gateway, _):
        answer = await gateway.post(CHAT, STREAM)
        assert answer.status == 200
        assert answer.head["content-type"] == "text/event-stream"
        assert answer.head["cache-control"] == "no-cache"
        want = f"data: {FIRST}}}\n\ndata: {SECOND}}}\n\ndata: [DONE]\n\n"
        assert answer.body.decode() == want
        answer = await gateway.post("/v1/completions", {"prompt": "x", "stream": True})
        choice = '{"index":0,"text":"hi","logprobs":null,"finish_reason":null}'
        assert answer.events == [f'{{"choices":[{choice}]}}', "[DONE]"]


async def test_usage_is_null_until_it_comes():
    async with behind() as (gateway, backend):

        async def pieces(request):
            yield chat(content="hi")
            yield pb.StreamChatCompletionResponse(usage=pb.Usage(total_tokens=3))

        backend.pieces = pieces
        asked = {"stream": True, "stream_options": {"include_usage": True}}
        first, last, done = (await gateway.chat(**asked)).events
        assert json.loads(first)["usage"] is None
        assert json.loads(last) == {"choices": [], "usage": {"total_tokens": 3}}
        assert done == "[DONE]"


async def test_every_piece_is_sent_at_once():
    async with behind() as (gateway, backend):
        go = asyncio.Queue()

        async def pieces(request):
            while (text := await go.get()) is not None:
                yield chat(content=text)

        backend.pieces = pieces
        connection = await gateway.connect()
        await connection.ask("POST", CHAT, STREAM)
        for i, text in enumerate(("a", "é\u2028", "😀")):
            go.put_nowait(text)
            if i == 0:
                status, _ = await connection.head()
                assert status == 200
            piece = await connection.piece()
            assert json.loads(piece.removeprefix(b"data: "))["choices"][0]["delta"] == {
                "content": text
            }
        go.put_nowait(None)
        assert await connection.piece() == b"data: [DONE]\n\n"
        assert await connection.piece() == b""
        connection.close()


async def test_an_error_before_the_first_piece_has_its_status_and_a_later_one_ends_the_stream():
    async with behind() as (gateway, backend):
        backend.error = InvalidRequestError("n", 500, "1 to 128")
        answer = await gateway.chat(stream=True)
        assert (answer.status, answer.error["param"]) == (400, "n")

        class Breaks(Backend):
            async def StreamChatCompletion(self, request, context):  # noqa: N802
                yield chat(content="hi")
                lost = WorkerLostError("decode-0 died", worker="decode-0")
                await context.abort_with_status(to_status(lost))

    other = Breaks()
    await other.start()
    async with gateway_to(other) as running:
        answer = await running.chat(stream=True)
        assert answer.status == 200
        piece, error = answer.events
        assert json.loads(piece)["choices"][0]["delta"] == {"content": "hi"}
        assert json.loads(error) == {
            "error": {
                "message": "decode-0 died",
                "type": "server_error",
                "param": None,
                "code": "worker_lost",
            }
        }
        await until(lambda: running.lines())
        assert running.lines()[0]["error"] == "worker_lost"
    await other.stop()


def gateway_to(*backends: Backend, flags: tuple[str, ...] = ()):
    return gateway(*(backend.address for backend in backends), flags=flags)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_the_call(stream):
    async with behind() as (gateway, backend):

        async def pieces(request):
            yield chat(content="hi")
            await asyncio.Event().wait()

        async def whole(request):
            await asyncio.Event().wait()

        backend.pieces, backend.whole = pieces, whole
        connection = await gateway.connect()
        await connection.ask("POST", CHAT, json.dumps({"stream": stream}).encode())
        if stream:
            await connection.head()
        await asyncio.wait_for(backend.arrived.wait(), 60)
        assert not backend.cancelled.is_set()
        connection.close()
        await asyncio.wait_for(backend.cancelled.wait(), 60)
        await until(lambda: gateway.lines())


async def test_a_hundred_streams_at_once():
    async with behind() as (gateway, backend):
        together = asyncio.Barrier(100)

        async def pieces(request):
            await together.wait()  # all are there
            for i in range(20):
                yield chat(content=f"{request.user}:{i} ")

        backend.pieces = pieces
        answers = await asyncio.gather(
            *(gateway.chat(stream=True, user=f"u{n}") for n in range(100))
        )
        for n, answer in enumerate(answers):
            *got, done = answer.events
            text = "".join(json.loads(e)["choices"][0]["delta"]["content"] for e in got)
            assert text == "".join(f"u{n}:{i} " for i in range(20))
            assert done == "[DONE]"
        await until(lambda: len(gateway.lines()) == 100)
        assert await gateway.metric("tandem_gateway_streams_in_flight") == 0


PIECES, PIECE_BYTES = 1500, 32_768


async def test_a_slow_reader_holds_the_frontend_back():
    async with behind() as (gateway, backend):
        sent = 0

        async def pieces(request):
            nonlocal sent
            for _ in range(PIECES):
                yield chat(content="x" * PIECE_BYTES)
                sent += 1

        backend.pieces = pieces
        connection = await gateway.connect()
        await connection.ask("POST", CHAT, STREAM)
        await connection.head()
        before = -1
        while sent != before:  # until it is held back
            before = sent
            await asyncio.sleep(0.5)
        assert sent < PIECES, "everything was taken from the frontend"
        assert await gateway.metric("process_resident_memory_bytes") < 150e6
        got = 0
        while piece := await connection.piece():
            got += len(piece)
        assert got > PIECES * PIECE_BYTES
        connection.close()


async def test_a_client_that_takes_nothing_is_given_up():
    async with behind("--stall-timeout", "300ms") as (gateway, backend):

        async def pieces(request):
            while True:
                yield chat(content="x" * PIECE_BYTES)

        backend.pieces = pieces
        connection = await gateway.connect()
        await connection.ask("POST", CHAT, STREAM)
        await connection.head()
        connection.reader._transport.pause_reading()
        await asyncio.wait_for(backend.cancelled.wait(), 60)
        connection.close()


async def test_half_a_body():
    async with behind("--body-timeout", "300ms") as (gateway, backend):
        connection = await gateway.connect()
        await connection.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
        )
        answer = await connection.answer()
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        assert answer.head["connection"] == "close"
        connection.close()
        connection = await gateway.connect()
        await connection.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"
        )
        connection.close()
        await until(lambda: len(gateway.lines()) == 2)
        assert gateway.lines()[1]["status"] in (408, 499)
        # The time for the body is over when it has come: a stream may last longer than that.
        go = asyncio.Event()

        async def pieces(request):
            yield chat(content="hi")
            await go.wait()

        backend.pieces = pieces
        asyncio.get_running_loop().call_later(0.6, go.set)
        assert (await gateway.chat(stream=True)).events[-1] == "[DONE]"


async def test_limits_on_what_runs_at_once():
    async with behind("--max-requests", "2", "--max-streams", "1") as (gateway, backend):
        go = asyncio.Event()

        async def pieces(request):
            yield chat(content="hi")
            await go.wait()

        backend.pieces = pieces
        connection = await gateway.connect()
        await connection.ask("POST", CHAT, STREAM)
        await connection.head()
        refused = await gateway.chat(stream=True)
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert refused.head["retry-after"] == "1"
        backend.whole = lambda request: go.wait()
        other = await gateway.connect()
        await other.ask("POST", CHAT, b"{}")
        await until(lambda: len(backend.asked) == 2)
        refused = await gateway.chat()
        assert (refused.status, refused.error["type"]) == (429, "rate_limit_error")
        assert (await gateway.ask("GET", "/healthz")).status == 200
        assert await gateway.metric("tandem_gateway_refused_total") == 2
        go.set()
        connection.close()
        other.close()


async def test_what_runs_may_end_after_sigterm():
    async with behind("--drain-delay", "1h") as (gateway, backend):
        go = asyncio.Event()

        async def pieces(request):
            yield chat(content="hi")
            await go.wait()
            yield chat(content="there")

        backend.pieces = pieces
        connection = await gateway.connect()
        await connection.ask("POST", CHAT, STREAM)
        await connection.head()
        gateway.process.send_signal(signal.SIGTERM)

        async def draining():
            return (await gateway.ask("GET", "/healthz")).status == 503

        await until(draining)  # and connections are still taken, until balancers have seen it
        assert (await gateway.chat()).status == 200
        gateway.process.send_signal(signal.SIGTERM)  # they have

        async def closed():
            try:
                (await gateway.connect()).close()
            except OSError:
                return True
            return False

        await until(closed)
        go.set()
        text = b""
        while piece := await connection.piece():
            text += piece
        assert b"there" in text
        assert text.endswith(b"data: [DONE]\n\n")
        connection.close()
        assert await asyncio.wait_for(gateway.process.wait(), 30) == 0


async def test_what_does_not_end_in_time_is_told_so():
    async with behind("--drain", "200ms") as (gateway, backend):

        async def pieces(request):
            yield chat(content="hi")
            await asyncio.Event().wait()

        backend.pieces = pieces
        connection = await gateway.connect()
        await connection.ask("POST", CHAT, STREAM)
        await connection.head()
        gateway.process.send_signal(signal.SIGTERM)
        text = b""
        while piece := await connection.piece():
            text += piece
        event = json.loads(text.decode().removesuffix("\n\n").rpartition("data: ")[2])
        assert event["error"]["code"] == "draining"
        assert await asyncio.wait_for(gateway.process.wait(), 30) == 0
        await asyncio.wait_for(backend.cancelled.wait(), 30)


async def test_frontends_take_turns_and_stand_in_for_each_other():
    backends = [Backend(), Backend(), Backend()]
    for backend in backends:
        await backend.start()
    first, second, third = backends
    await third.set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    async with gateway_to(*backends) as running:

        async def both():
            await running.chat()
            return first.asked and second.asked

        await until(both)
        counts = len(first.asked), len(second.asked)
        for _ in range(10):
            assert (await running.chat()).status == 200
        assert (len(first.asked) - counts[0], len(second.asked) - counts[1]) == (5, 5)
        await first.stop()

        async def served():
            return (await running.chat()).status == 200

        await until(served)
        before = len(second.asked)
        for _ in range(5):
            assert (await running.chat()).status == 200
        assert len(second.asked) == before + 5
        assert third.asked == []
        await third.set_health(health_pb2.HealthCheckResponse.SERVING)
        await until(lambda: asked(running, third))
    await second.stop()
    await third.stop()


async def asked(running, backend: Backend) -> bool:
    await running.chat()
    return bool(backend.asked)
