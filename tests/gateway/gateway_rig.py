"""A gateway, really built and run, before an OpenAIService that does what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.runtime.errors import TandemError, to_status
from tandem.openai.v1 import openai_pb2 as pb
from tandem.openai.v1 import openai_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "deploy" / "gateway" / "build.py"
SERVICE = "tandem.openai.v1.OpenAIService"
CANT = 3
BUILD_SECONDS = 900
"""A first build takes minutes on a busy machine."""


def run_build(*arguments: str) -> str:
    """What build.py prints. Skips where Go can't be had, which CI must."""
    done = subprocess.run(
        [sys.executable, BUILD, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode == CANT and not os.environ.get("CI"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@functools.cache
def program() -> str:
    """Path of the gateway."""
    return run_build()


def chat(index: int = 0, **delta: str) -> pb.StreamChatCompletionResponse:
    """A piece of an answer."""
    choice = pb.ChunkChoice(index=index, delta=pb.DeltaMessage(**delta))
    return pb.StreamChatCompletionResponse(
        id="chatcmpl-1", object="chat.completion.chunk", created=7, model="m", choices=[choice]
    )


class Backend(openai_pb2_grpc.OpenAIServiceServicer):
    """A frontend. Tests replace what it does; it keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.metadata: list[dict[str, str]] = []
        self.remaining: list[float | None] = []
        self.arrived = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.error: TandemError | None = None
        self.health = health.aio.HealthServicer()
        self.address = ""
        self.server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        openai_pb2_grpc.add_OpenAIServiceServicer_to_server(self, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        await self.set_health(health_pb2.HealthCheckResponse.SERVING)

    async def set_health(self, status) -> None:
        await self.health.set(SERVICE, status)

    async def stop(self) -> None:
        await self.server.stop(0)

    @contextlib.asynccontextmanager
    async def _seen(self, request, context):
        self.asked.append(request)
        self.metadata.append({str(k): str(v) for k, v in context.invocation_metadata()})
        self.remaining.append(context.time_remaining())
        self.arrived.set()
        try:
            if self.error is not None:
                await context.abort_with_status(to_status(self.error))
            yield
        except grpc.aio.AbortError:
            raise
        except BaseException:  # a call that was ended while it wrote has another error
            self.cancelled.set()
            raise

    async def pieces(self, request) -> AsyncIterator[pb.StreamChatCompletionResponse]:
        yield chat(role="assistant", content="")
        yield chat(content="hi")

    async def whole(self, request) -> pb.CreateChatCompletionResponse:
        return pb.CreateChatCompletionResponse(
            id="chatcmpl-1",
            object="chat.completion",
            created=7,
            model=request.model,
            choices=[
                pb.ChatChoice(
                    index=0,
                    message=pb.AnswerMessage(role="assistant", content="hi"),
                    finish_reason="stop",
                )
            ],
        )

    async def CreateChatCompletion(self, request, context):  # noqa: N802
        async with self._seen(request, context):
            return await self.whole(request)

    async def StreamChatCompletion(self, request, context):  # noqa: N802
        async with self._seen(request, context):
            async for piece in self.pieces(request.request):
                yield piece

    async def CreateCompletion(self, request, context):  # noqa: N802
        async with self._seen(request, context):
            return pb.CreateCompletionResponse(
                object="text_completion", choices=[pb.CompletionChoice(index=0, text="hi")]
            )

    async def StreamCompletion(self, request, context):  # noqa: N802
        async with self._seen(request, context):
            yield pb.StreamCompletionResponse(choices=[pb.CompletionChoice(index=0, text="hi")])

    async def ListModels(self, request, context):  # noqa: N802
        async with self._seen(request, context):
            return pb.ListModelsResponse(object="list")

    async def RetrieveModel(self, request, context):  # noqa: N802
        async with self._seen(request, context):
            return pb.RetrieveModelResponse(id=request.model, object="model", created=0)

    async def Tokenize(self, request, context):  # noqa: N802
        async with self._seen(request, context):
            return pb.TokenizeResponse(count=0, max_model_len=8, tokens=[])

    async def Detokenize(self, request, context):  # noqa: N802
        async with self._seen(request, context):
            return pb.DetokenizeResponse(prompt="x" * len(request.tokens))


@dataclasses.dataclass
class Answer:
    """An HTTP answer, whole. `head` names are in lower case."""

    status: int
    head: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """Of OpenAI's shape, all four fields there."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert self.head["content-type"] == "application/json"
        return error

    @property
    def events(self) -> list[str]:
        """Of a stream: what stands behind "data: "."""
        assert self.head["content-type"] == "text/event-stream"
        text = self.body.decode()
        assert text.endswith("\n\n")
        events = text.removesuffix("\n\n").split("\n\n")
        assert all(event.startswith("data: ") for event in events)
        return [event.removeprefix("data: ") for event in events]


class Connection:
    """HTTP/1.1 by hand, so that tests see and send every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def close(self) -> None:
        self.writer.transport.abort()

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def ask(self, method: str, path: str, body: bytes = b"", **head: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "host: gateway"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in head.items()]
        if body or method == "POST":
            lines.append(f"content-length: {len(body)}")
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode().strip().split("\r\n")
        found: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(": ")
            name = name.lower()
            found[name] = f"{found[name]}, {value}" if name in found else value
        return int(first.split()[1]), found

    async def piece(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        data = await self.reader.readexactly(size)
        assert await self.reader.readexactly(2) == b"\r\n"
        return data

    async def answer(self) -> Answer:
        status, head = await self.head()
        if "content-length" in head:
            body = await self.reader.readexactly(int(head["content-length"]))
        elif head.get("transfer-encoding") == "chunked":
            body = b""
            while piece := await self.piece():
                body += piece
        else:
            body = b"" if status == 204 else await self.reader.read()
        return Answer(status, head, body)


class Gateway:
    """A running gateway."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, log: Path) -> None:
        self.process, self.address, self.log = process, address, log

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def connect(self) -> Connection:
        host, _, port = self.address.rpartition(":")
        return Connection(*await asyncio.open_connection(host, int(port), limit=2**20))

    async def ask(self, method: str, path: str, body: bytes = b"", **head: str) -> Answer:
        """One request on a connection of its own."""
        connection = await self.connect()
        try:
            await connection.ask(method, path, body, **head)
            return await connection.answer()
        finally:
            connection.close()

    async def post(self, path: str, body: object, **head: str) -> Answer:
        head.setdefault("content_type", "application/json")
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.ask("POST", path, raw, **head)

    async def chat(self, **body: object) -> Answer:
        asked = {"model": "m", "messages": [{"role": "user", "content": "x"}]} | body
        return await self.post("/v1/chat/completions", asked)

    async def metric(self, name: str) -> float:
        """Of the lines that begin so, the sum."""
        text = (await self.ask("GET", "/metrics")).body.decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def lines(self) -> list[dict[str, object]]:
        """The access log."""
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in found if line["msg"] == "request"]


@contextlib.asynccontextmanager
async def gateway(*frontends: str, flags: tuple[str, ...] = ()) -> AsyncIterator[Gateway]:
    """Runs one; on leaving it must end in good order."""
    # A build may take minutes, in which the loop has other work.
    built = await asyncio.to_thread(program)
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output, os.fdopen(read, "rb") as ready:
            process = await asyncio.create_subprocess_exec(
                built,
                *("--listen", "127.0.0.1:0", "--frontends", ",".join(frontends), "--log", "json"),
                *("--ready-fd", str(write), *flags),
                stderr=output,
                pass_fds=(write,),
            )
            os.close(write)
            line = await asyncio.to_thread(ready.readline)
        assert line, log.read_text()
        try:
            yield Gateway(process, json.loads(line)["address"], log)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(30):
                    code = await process.wait()
            except TimeoutError:
                process.kill()
                raise
        assert code == 0, log.read_text()


@contextlib.asynccontextmanager
async def behind(*flags: str) -> AsyncIterator[tuple[Gateway, Backend]]:
    """A gateway and the one backend behind it."""
    backend = Backend()
    await backend.start()
    try:
        async with gateway(backend.address, flags=flags) as running:
            yield running, backend
    finally:
        await backend.stop()


async def until(condition, seconds: float = 30) -> None:
    """Waits until something that gives no event holds."""
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.02)
