"""The frontend on real gRPC, between a client and workers and a coordinator that do as told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import grpc
import pytest

from kvtransfer.keys import block_keys, salt
from services.frontend import coordinator as coordinator_module
from services.frontend import workers as workers_module
from services.frontend.app import serve_model
from services.frontend.awake import Awake
from services.frontend.begin import Beginning, Chance
from services.frontend.chat import Chat, Turn
from services.frontend.coordinator import Coordinator
from services.frontend.live import Cluster
from services.frontend.patience import Patience
from services.frontend.service import InferenceServicer
from services.frontend.validate import Prompt
from services.frontend.workers import Workers
from services.runtime.channels import Channels
from services.runtime.directory import StaticDirectory
from services.runtime.errors import (
    EngineFailedError,
    EngineOverloadedError,
    InvalidRequestError,
    NoWorkersError,
    from_rpc,
)
from services.runtime.server import Server
from services.runtime.settings import FrontendProcess, FrontendSettings, ServerSettings
from tandem.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from tandem.decode.v1 import decode_pb2, decode_pb2_grpc
from tandem.generation.v1 import generation_pb2
from tandem.inference.v1 import inference_pb2, inference_pb2_grpc
from tandem.kvtransfer.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc
from tandem.prefill.v1 import prefill_pb2, prefill_pb2_grpc

EOS = 0
VOCABULARY = 27
LAYOUT = "f" * 32
STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
ERROR = generation_pb2.FINISH_REASON_ERROR


def following(tokens: list[int], count: int) -> list[int]:
    """The tokens after these: letters, 1 to 26, that depend on everything before."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append((sum(i * t for i, t in enumerate(tokens, 1)) * 7 + 3) % 26 + 1)
    return tokens[-count:] if count else []


def spelled(tokens: list[int]) -> str:
    return "".join(chr(96 + t) for t in tokens if t)


class Letters:
    """A model whose tokens are letters."""

    name = "letters"
    vocabulary = VOCABULARY
    eos_token_ids = (EOS,)
    tokens = (b"", *(bytes([96 + t]) for t in range(1, VOCABULARY)))
    control_tokens: ClassVar = {EOS: "<|end|>"}

    def __init__(self):
        self.threads: set[int] = set()

    def encode(self, asked):
        self.threads.add(threading.get_ident())
        match asked:
            case Prompt(text):
                return [ord(c) - 96 for c in text]
            case Chat(turns):
                if turns[0].role == "alien":
                    raise InvalidRequestError("chat.messages[0].role", "alien", "user")
                letters = "".join(turn.content or "" for turn in turns).lower()
                return [ord(c) - 96 for c in letters if c.isalpha()]
        return list(asked.token_ids)

    def detokenizer(self):
        return self

    def push(self, token_ids):
        return spelled(token_ids)

    def finish(self):
        return ""


class FakePrefill(
    prefill_pb2_grpc.PrefillServiceServicer, kvtransfer_pb2_grpc.KvTransferServiceServicer
):
    """Answers at once, or when `gate` opens; raises `failure` if set."""

    def __init__(self):
        self.requests: list[prefill_pb2.PrefillRequest] = []
        self.cancelled: list[str] = []
        self.released: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.accepts = asyncio.Event()
        self.accepts.set()
        self.failure: Exception | None = None
        self.finish = 0
        self.moved = asyncio.Condition()

    async def Prefill(self, request, context):  # noqa: N802
        self.requests.append(request)
        name = request.request.request_id
        handed_over = False
        try:
            await self.accepts.wait()
            yield prefill_pb2.PrefillResponse(accepted=prefill_pb2.PrefillAccepted())
            await self.gate.wait()
            if self.failure:
                raise self.failure
            tokens = [*request.request.prompt_token_ids, *request.request.output_token_ids]
            done = prefill_pb2.PrefillDone(
                token_ids=following(tokens, 1),
                handle=b"handle",
                finish_reason=self.finish,
                kv=generation_pb2.KvReport(cached_tokens=2, computed_tokens=len(tokens) - 2),
            )
            yield prefill_pb2.PrefillResponse(done=done)
            handed_over = True
        finally:
            if not handed_over:
                self.cancelled.append(name)

    async def Release(self, request, context):  # noqa: N802
        self.released.append(request.lease_id)
        return kvtransfer_pb2.ReleaseResponse(was_live=True)


@dataclass
class Running:
    request: generation_pb2.TokenRequest
    tokens: list[int]
    task: asyncio.Task | None = None


class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    """One token a frame, up to `pause_at` tokens of the request in all while it is set."""

    def __init__(self):
        self.streams = 0
        self.ended_streams = 0
        self.opened: list[str] = []
        self.starts: list[decode_pb2.Start] = []
        self.proceeds: list[decode_pb2.Proceed] = []
        self.cancels: list[str] = []
        self.running: dict[str, Running] = {}
        self.pause_at: int | None = None
        self.paused = asyncio.Event()
        self._resumed = asyncio.Event()
        self.refusal: tuple[str, str] | None = None
        self.refusals = 1000
        self.frame_tokens = 1
        self.streams_out: list[asyncio.Queue] = []

    def go_on(self, until: int | None = None):
        self.pause_at = until
        self.paused.clear()
        self._resumed.set()
        self._resumed = asyncio.Event()

    async def Decode(self, request_iterator, context):  # noqa: N802
        self.streams += 1
        out: asyncio.Queue = asyncio.Queue()
        self.streams_out.append(out)
        mine: dict[str, Running] = {}
        reader = asyncio.create_task(self._read(request_iterator, out, mine))
        try:
            while (frame := await out.get()) is not None:
                yield frame
        finally:
            reader.cancel()
            for name, running in mine.items():
                if running.task is not None:
                    running.task.cancel()
                self.running.pop(name, None)
            self.ended_streams += 1

    async def _read(self, messages, out, mine):
        first = await anext(messages)
        assert first.WhichOneof("message") == "open"
        self.opened.append(first.open.frontend_id)
        async for message in messages:
            match message.WhichOneof("message"):
                case "start":
                    self._start(message.start, out, mine)
                case "proceed":
                    self.proceeds.append(message.proceed)
                    running = self.running.get(message.proceed.request_id)
                    if running is None:  # refused, with this on its way
                        continue
                    running.tokens += message.proceed.token_ids
                    running.task = asyncio.create_task(self._generate(running, out))
                case "cancel":
                    self.cancels.append(message.cancel.request_id)
                    running = self.running.pop(message.cancel.request_id, None)
                    if running is not None and running.task is not None:
                        running.task.cancel()
        out.put_nowait(None)

    def _start(self, start, out, mine):
        self.starts.append(start)
        name = start.request.request_id
        if self.refusal is not None and len(self.starts) <= self.refusals:
            error = generation_pb2.Error(reason=self.refusal[0], message=self.refusal[1])
            error.metadata["field"] = "request.prompt_token_ids"
            output = decode_pb2.RequestOutput(request_id=name, finish_reason=ERROR, error=error)
            out.put_nowait(decode_pb2.DecodeResponse(outputs=[output]))
            return
        running = Running(start.request, list(start.request.output_token_ids))
        self.running[name] = mine[name] = running
        if not start.HasField("source"):
            running.task = asyncio.create_task(self._generate(running, out))

    async def _generate(self, running, out):
        request, name = running.request, running.request.request_id
        prompt = list(request.prompt_token_ids)
        local = len(running.tokens) == len(request.output_token_ids)
        kv = generation_pb2.KvReport(transport="" if local else "shm", bytes=0 if local else 640)
        kv.cached_tokens = 1 if local else 0
        limit = request.sampling.max_tokens
        while True:
            while self.pause_at is not None and len(running.tokens) >= self.pause_at:
                self.paused.set()
                await self._resumed.wait()
            count = min(self.frame_tokens, limit - len(running.tokens))
            new = following([*prompt, *running.tokens], count)
            running.tokens += new
            output = decode_pb2.RequestOutput(request_id=name, token_ids=new)
            if request.sampling.HasField("logprobs"):
                output.logprobs.extend(
                    generation_pb2.TokenLogprob(
                        token_id=t,
                        logprob=-1.0,
                        top=[generation_pb2.TopLogprob(token_id=t, logprob=-1.0)],
                    )
                    for t in new
                )
            if kv is not None:
                output.kv.CopyFrom(kv)
                kv = None
            if len(running.tokens) >= limit:
                output.finish_reason = LENGTH
                del self.running[name]
            out.put_nowait(decode_pb2.DecodeResponse(outputs=[output]))
            if output.finish_reason:
                return
            await asyncio.sleep(0)


class FakeCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Places on the first workers not excluded; without prefill workers, on decode alone."""

    def __init__(self):
        self.prefill: dict[str, str] = {}
        self.decode: dict[str, str] = {}
        self.places: list[coordinator_pb2.PlaceRequest] = []
        self.reports: list[coordinator_pb2.ReportRequest] = []
        self.failures: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.models = 0
        self.predicted_ttft = 0.0

    async def Place(self, request, context):  # noqa: N802
        self.places.append(request)
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        left = [n for n in self.decode if n not in request.exclude_workers]
        if not left:
            raise NoWorkersError("no decode worker is up", role="decode")
        answer = coordinator_pb2.PlaceResponse(
            reasons=["first one"], predicted_ttft_seconds=self.predicted_ttft
        )
        answer.decode.worker_id, answer.decode.address = left[0], self.decode[left[0]]
        for name in self.prefill:
            if name not in request.exclude_workers:
                answer.prefill.worker_id, answer.prefill.address = name, self.prefill[name]
                break
        return answer

    async def Report(self, request, context):  # noqa: N802
        self.reports.append(request)
        return coordinator_pb2.ReportResponse()

    async def GetModels(self, request, context):  # noqa: N802
        self.models += 1
        model = coordinator_pb2.ServedModel(
            model="letters",
            kv_layout=LAYOUT,
            block_tokens=4,
            context_tokens=64,
            prefill_workers=len(self.prefill),
            decode_workers=len(self.decode),
        )
        other = coordinator_pb2.ServedModel(model="elsewhere", decode_workers=1)
        return coordinator_pb2.GetModelsResponse(models=[model, other] if self.decode else [])


async def listen(*services, port: int = 0) -> tuple[Server, str]:
    server = Server(ServerSettings(port=port), "test")
    for adder, servicer, name in services:
        server.add(adder, servicer, name)
    return server, await server.start()


@dataclass
class World:
    coordinator: FakeCoordinator
    model: Letters
    servers: dict[str, Server] = field(default_factory=dict)
    prefill: dict[str, FakePrefill] = field(default_factory=dict)
    decode: dict[str, FakeDecode] = field(default_factory=dict)
    coordinator_address: str = ""
    address: str = ""
    workers: Workers | None = None
    stub: inference_pb2_grpc.InferenceServiceStub | None = None

    async def add_prefill(self, name: str) -> FakePrefill:
        fake = FakePrefill()
        adders = (
            (prefill_pb2_grpc.add_PrefillServiceServicer_to_server, fake, "p"),
            (kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server, fake, "k"),
        )
        self.servers[name], self.coordinator.prefill[name] = await listen(*adders)
        self.prefill[name] = fake
        return fake

    async def add_decode(self, name: str, port: int = 0) -> FakeDecode:
        fake = FakeDecode()
        adder = (decode_pb2_grpc.add_DecodeServiceServicer_to_server, fake, "d")
        self.servers[name], self.coordinator.decode[name] = await listen(adder, port=port)
        self.decode[name] = fake
        return fake

    async def kill(self, name: str) -> None:
        await self.servers.pop(name).stop(None)

    def stream(self, request: inference_pb2.GenerateRequest, **more):
        message = inference_pb2.StreamGenerateRequest(request=request)
        return self.stub.StreamGenerate(message, **{"timeout": 20, **more})

    async def whole(self, request: inference_pb2.GenerateRequest, **more):
        return await self.stub.Generate(request, **{"timeout": 20, **more})

    async def settled(self) -> None:
        """Every placed attempt is reported, and no worker runs anything."""
        await eventually(lambda: not any(d.running for d in self.decode.values()))
        await eventually(
            lambda: (
                {(r.request_id, r.attempt) for r in self.coordinator.reports}
                == {(p.request_id, p.attempt) for p in self.coordinator.places}
            )
        )
        assert len(self.coordinator.reports) == len(self.coordinator.places)


async def eventually(what, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not what():  # noqa: ASYNC110 - observed from outside, there is no event
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def a_world(coordinator=None, model=None, more=lambda beginning: (), **settings):
    world = World(coordinator or FakeCoordinator(), model or Letters())
    adder = coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server
    world.servers["coordinator"], address = await listen((adder, world.coordinator, "c"))
    world.coordinator_address = address
    clock = time.monotonic
    channels = Channels()
    frontend = FrontendSettings(**settings)
    coordinator = Coordinator(StaticDirectory([address]), channels, "frontend-1", clock)
    world.workers = Workers(channels, "frontend-1", clock)
    patience = Patience(frontend.silence_seconds, frontend.stall_seconds)
    cluster = Cluster(coordinator, world.workers, clock, patience, Awake(clock))
    ids = iter(range(10**6))
    chance = Chance(lambda: f"made-{next(ids)}", lambda: 4711)
    with ThreadPoolExecutor(1) as texts:
        beginning = Beginning(world.model, cluster, frontend, texts, chance)
        servicer = InferenceServicer(beginning)
        adder = inference_pb2_grpc.add_InferenceServiceServicer_to_server
        server, world.address = await listen((adder, servicer, "i"), *more(beginning))
        channel = grpc.aio.insecure_channel(world.address)
        world.stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            yield world
        finally:
            await channel.close()
            await server.stop(0)
            await beginning.close()
            await world.workers.close()
            await coordinator.close()
            await channels.close()
            for other in world.servers.values():
                await other.stop(None)


@pytest.fixture
async def world():
    async with a_world() as it:
        await it.add_prefill("p0")
        await it.add_decode("d0")
        yield it


def ask(prompt: str = "tandem", **fields) -> inference_pb2.GenerateRequest:
    stop = fields.pop("stop", [])
    request_id = fields.pop("request_id", "")
    fields.setdefault("max_tokens", 12)
    sampling = generation_pb2.SamplingParams(**fields)
    return inference_pb2.GenerateRequest(
        prompt=prompt, sampling=sampling, stop=stop, request_id=request_id
    )


def answer_to(prompt: str, count: int) -> list[int]:
    return following([ord(c) - 96 for c in prompt], count)


async def failure(call) -> grpc.aio.AioRpcError:
    ended = collect(call) if hasattr(call, "read") else call
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ended
    return caught.value


async def collect(call) -> list[inference_pb2.StreamGenerateResponse]:
    return [message async for message in call]


def tokens_of(messages) -> list[int]:
    return [t for m in messages for t in m.token_ids]


# The way things should go


async def test_a_stream_from_prompt_to_usage(world):
    messages = await collect(world.stream(ask(request_id="me:1")))
    assert tokens_of(messages) == answer_to("tandem", 12)
    assert "".join(m.text for m in messages) == spelled(answer_to("tandem", 12))
    first, last = messages[0], messages[-1]
    assert (first.model, first.seed) == ("letters", 4711)
    assert all(m.request_id == "me:1" for m in messages)
    assert [m.finish_reason for m in messages[:-1]] == [0] * (len(messages) - 1)
    assert last.finish_reason == LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 12)
    assert last.usage.cached_tokens == 2
    (attempt,) = last.route.attempts
    assert (attempt.prefill_worker, attempt.decode_worker) == ("p0", "d0")
    assert list(attempt.reasons) == ["first one"]
    assert (attempt.tokens, attempt.failure) == (12, "")
    assert (attempt.kv.transport, attempt.kv.bytes) == ("shm", 640)
    assert 0 < last.route.placement_seconds <= last.route.ttft_seconds
    assert last.route.ttft_seconds <= last.route.total_seconds < 30
    await world.settled()


async def test_the_whole_answer_is_the_streams(world):
    answer = await world.whole(ask(seed=5))
    assert list(answer.token_ids) == answer_to("tandem", 12)
    assert answer.text == spelled(answer_to("tandem", 12))
    assert (answer.finish_reason, answer.model, answer.seed) == (LENGTH, "letters", 5)
    assert answer.request_id == "made-0"
    assert answer.usage.completion_tokens == 12
    assert len(answer.route.attempts) == 1


async def test_what_the_coordinator_and_the_workers_are_told(world):
    await world.whole(ask("abcdefghij", temperature=0.5, max_tokens=3, stop_token_ids=[5]))
    prompt = list(range(1, 11))
    (place,) = world.coordinator.places
    assert list(place.block_keys) == block_keys(prompt, 4, salt("letters", LAYOUT))
    assert (place.model, place.kv_layout, place.attempt) == ("letters", LAYOUT, 0)
    assert (place.context_tokens, place.max_tokens) == (10, 3)
    assert place.frontend_id == "frontend-1"
    ((prefill,), (start,)) = world.prefill["p0"].requests, world.decode["d0"].starts
    assert prefill.request == start.request
    request = start.request
    assert list(request.prompt_token_ids) == prompt
    assert request.request_id == "made-0/0"
    # Workers require every field but logprobs to be set.
    unset = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"}
    unset |= {"frequency_penalty", "max_tokens", "min_tokens", "seed"}
    assert all(request.sampling.HasField(name) for name in unset)
    assert list(request.sampling.stop_token_ids) == [5]
    assert (start.source.worker_id, start.source.lease_id) == ("p0", "made-0/0")
    assert start.source.address == world.coordinator.prefill["p0"]
    # gRPC rounds a deadline up to three digits on the wire: 20 s may arrive as 20.1 s.
    assert 15_000 < start.deadline_ms <= 20_100
    (proceed,) = world.decode["d0"].proceeds
    assert (proceed.request_id, proceed.handle) == ("made-0/0", b"handle")
    assert world.decode["d0"].opened == ["frontend-1"]


async def test_without_a_prefill_worker_decode_does_it_all(world):
    world.coordinator.prefill.clear()
    answer = await world.whole(ask())
    assert list(answer.token_ids) == answer_to("tandem", 12)
    assert not world.decode["d0"].starts[0].HasField("source")
    assert answer.route.attempts[0].prefill_worker == ""
    assert answer.usage.cached_tokens == 1


async def test_the_first_token_comes_before_decode_says_anything(world):
    world.decode["d0"].pause_at = 1
    call = world.stream(ask())
    message = await call.read()
    assert tokens_of([message]) == answer_to("tandem", 1)
    call.cancel()
    await world.settled()


async def test_all_requests_share_one_stream(world):
    answers = await asyncio.gather(*(world.whole(ask("a" * (i + 1))) for i in range(20)))
    for i, answer in enumerate(answers):
        assert list(answer.token_ids) == answer_to("a" * (i + 1), 12)
    assert world.decode["d0"].streams == 1
    await world.settled()


async def test_log_probabilities_are_passed_on(world):
    world.coordinator.prefill.clear()
    answer = await world.whole(ask(logprobs=1, max_tokens=3))
    assert [item.token_id for item in answer.logprobs] == list(answer.token_ids)
    assert answer.logprobs[0].top[0].logprob == -1.0
    messages = await collect(world.stream(ask(logprobs=1, max_tokens=3)))
    assert [p.token_id for m in messages for p in m.logprobs] == list(answer.token_ids)


async def test_tokenizing_happens_off_the_event_loop(world):
    await world.whole(ask())
    assert world.model.threads
    assert threading.get_ident() not in world.model.threads


async def test_max_tokens_is_what_the_window_leaves(world):
    answer = await world.whole(ask("a" * 60, max_tokens=1000))
    assert answer.usage.completion_tokens == 4
    assert answer.finish_reason == LENGTH


async def test_chat_and_tokens_are_inputs_too(world):
    chat = inference_pb2.GenerateRequest(sampling=generation_pb2.SamplingParams(max_tokens=3))
    chat.chat.messages.add(role="user", content="abc")
    assert list((await world.whole(chat)).token_ids) == answer_to("abc", 3)
    tokens = inference_pb2.GenerateRequest(sampling=generation_pb2.SamplingParams(max_tokens=3))
    tokens.tokens.token_ids.extend([1, 2, 3])
    assert list((await world.whole(tokens)).token_ids) == answer_to("abc", 3)


async def test_models_are_those_that_can_be_asked_here(world):
    (model,) = (await world.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert (model.name, model.context_tokens, model.block_tokens) == ("letters", 64, 4)
    assert (model.prefill_workers, model.decode_workers) == (1, 1)


async def test_no_text_in_the_logs(world, caplog):
    caplog.set_level(logging.DEBUG)
    world.prefill["p0"].failure = EngineFailedError("broke")
    await world.whole(ask("secretsecret"))
    with contextlib.suppress(grpc.aio.AioRpcError):
        await world.whole(ask("secretsecret" * 10))
    text = caplog.text
    assert "secretsecret" not in text
    assert spelled(answer_to("secretsecret", 12)) not in text


# Stop strings


@pytest.mark.parametrize("frame_tokens", [1, 3, 12])
async def test_a_stop_string_ends_the_text_and_the_work(world, frame_tokens):
    truth = answer_to("tandem", 12)
    stop = spelled(truth[5:8])
    world.decode["d0"].frame_tokens = frame_tokens
    answer = await world.whole(ask(stop=["zzzz", stop], max_tokens=40))
    assert answer.text == spelled(truth[:5])
    assert list(answer.token_ids) == truth[:8]
    assert answer.finish_reason == STOP
    assert answer.usage.completion_tokens == 8
    await world.settled()


async def test_what_may_begin_a_stop_string_is_held_back(world):
    truth = answer_to("tandem", 4)
    world.decode["d0"].pause_at = 4
    call = world.stream(ask(stop=[spelled(truth[2:4]) + "!"]))
    seen: list = []
    while len(tokens_of(seen)) < 4:
        seen.append(await call.read())
    assert "".join(m.text for m in seen) == spelled(truth[:2])
    call.cancel()


# What goes wrong


async def test_a_decode_worker_dies_and_the_stream_goes_on(world):
    await world.add_decode("d1")
    world.decode["d0"].pause_at = 5
    call = world.stream(ask(request_id="x"))
    messages = []
    while len(tokens_of(messages)) < 5:
        messages.append(await call.read())
    await world.kill("d0")
    messages += await collect_rest(call)
    assert tokens_of(messages) == answer_to("tandem", 12)
    assert "".join(m.text for m in messages) == spelled(answer_to("tandem", 12))
    first, second = messages[-1].route.attempts
    assert (first.decode_worker, first.failure, first.tokens) == ("d0", "WORKER_LOST", 5)
    assert (second.decode_worker, second.failure, second.tokens) == ("d1", "", 7)
    assert list(world.coordinator.places[1].exclude_workers) == ["d0"]
    assert (world.coordinator.places[1].context_tokens) == 11
    assert list(world.decode["d1"].starts[0].request.output_token_ids) == answer_to("tandem", 5)
    report = world.coordinator.reports[0]
    assert (report.failed_worker, report.failure, report.unreachable) == ("d0", "WORKER_LOST", True)
    world.decode["d0"].running.clear()
    await world.settled()


async def collect_rest(call) -> list:
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def test_a_prefill_worker_dies_before_its_token(world):
    await world.add_prefill("p1")
    world.prefill["p0"].gate.clear()
    call = world.stream(ask())
    await eventually(lambda: world.prefill["p0"].requests)
    await world.kill("p0")
    messages = await collect(call)
    assert tokens_of(messages) == answer_to("tandem", 12)
    assert [a.prefill_worker for a in messages[-1].route.attempts] == ["p0", "p1"]
    assert "made-0/0" in world.decode["d0"].cancels
    await world.settled()


async def test_a_prefill_worker_that_fails_leaves_decode_to_another_one(world):
    world.prefill["p0"].failure = EngineFailedError("broke")
    answer = await world.whole(ask())
    assert list(answer.token_ids) == answer_to("tandem", 12)
    assert answer.route.attempts[0].failure == "ENGINE_FAILED"
    assert answer.route.attempts[1].prefill_worker == ""
    assert not world.coordinator.reports[0].unreachable


async def test_a_full_worker_is_reported_and_asked_again(world):
    world.decode["d0"].refusal = ("ENGINE_OVERLOADED", "full")
    world.decode["d0"].refusals = 2
    answer = await world.whole(ask())
    assert list(answer.token_ids) == answer_to("tandem", 12)
    assert [a.failure for a in answer.route.attempts] == ["ENGINE_OVERLOADED"] * 2 + [""]
    assert [r.failed_worker for r in world.coordinator.reports[:2]] == ["d0", "d0"]
    assert all(not p.exclude_workers for p in world.coordinator.places)
    await world.settled()


async def test_no_worker_left(world):
    world.decode["d0"].pause_at = 3
    call = world.stream(ask())
    await world.decode["d0"].paused.wait()
    await world.kill("d0")
    error = await failure(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    told = from_rpc(error)
    assert told.reason == "NO_WORKERS"
    assert "WORKER_LOST" in told.message


async def test_attempts_are_bounded(world):
    for i in range(1, 8):
        (await world.add_decode(f"d{i}")).refusal = ("ENGINE_FAILED", "broke")
    world.decode["d0"].refusal = ("ENGINE_FAILED", "broke")
    error = await failure(world.whole(ask()))
    assert from_rpc(error).reason == "ENGINE_FAILED"
    assert len(world.coordinator.places) == 5
    await world.settled()


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("INVALID_REQUEST", grpc.StatusCode.INVALID_ARGUMENT),
        ("GUIDE_FAILED", grpc.StatusCode.INVALID_ARGUMENT),
        ("ADAPTER_FAILED", grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
async def test_what_is_the_requests_own_is_said_at_once_and_blames_no_worker(world, reason, code):
    await world.add_decode("d1")
    world.decode["d0"].refusal = (reason, "as the worker puts it")
    error = await failure(world.whole(ask()))
    assert error.code() is code
    assert error.details() == "as the worker puts it"
    assert from_rpc(error).reason == reason
    assert len(world.coordinator.places) == 1
    await world.settled()
    (report,) = world.coordinator.reports
    assert (report.failed_worker, report.failure) == ("", reason)


def conversation(*texts: str) -> inference_pb2.GenerateRequest:
    turns = [inference_pb2.ChatMessage(role="user", content=text) for text in texts]
    return inference_pb2.GenerateRequest(chat=inference_pb2.ChatInput(messages=turns))


@pytest.mark.parametrize(
    ("asked", "field", "allowed"),
    [
        (ask("a" * 641), "prompt", "frontend.characters_per_token"),
        (conversation("a" * 400, "a" * 241), "chat.messages", "frontend.characters_per_token"),
        (conversation(*9 * [""]), "chat.messages", "at most 8 (frontend.max_messages)"),
    ],
)
async def test_what_can_hardly_fit_is_refused_before_it_is_tokenized(asked, field, allowed):
    async with a_world(characters_per_token=10, max_messages=8) as world:
        await world.add_decode("d0")
        error = from_rpc(await failure(world.whole(asked)))
        assert (error.reason, error.metadata["field"]) == ("INVALID_REQUEST", field)
        assert allowed in error.message
        assert not world.model.threads


async def test_a_first_token_that_ends_the_request_cancels_decode(world):
    world.prefill["p0"].finish = STOP
    answer = await world.whole(ask())
    assert (answer.text, list(answer.token_ids)) == ("", answer_to("tandem", 1))
    assert answer.finish_reason == STOP
    await eventually(lambda: world.decode["d0"].cancels == ["made-0/0"])
    await world.settled()


async def test_one_token_needs_no_decode(world):
    answer = await world.whole(ask(max_tokens=1))
    assert list(answer.token_ids) == answer_to("tandem", 1)
    assert answer.finish_reason == LENGTH
    await eventually(lambda: world.prefill["p0"].released == ["made-0/0"])
    await world.settled()


async def test_the_client_cancels_while_the_prompt_is_computed(world):
    world.prefill["p0"].gate.clear()
    call = world.stream(ask())
    reading = asyncio.ensure_future(call.read())
    await eventually(lambda: world.decode["d0"].starts)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await eventually(lambda: world.prefill["p0"].cancelled == ["made-0/0"])
    await eventually(lambda: world.decode["d0"].cancels == ["made-0/0"])
    await world.settled()


async def test_the_client_cancels_in_mid_stream(world):
    world.decode["d0"].pause_at = 4
    call = world.stream(ask())
    await call.read()
    await world.decode["d0"].paused.wait()
    call.cancel()
    await eventually(lambda: world.decode["d0"].cancels == ["made-0/0"])
    assert world.prefill["p0"].cancelled == []
    await world.settled()


async def test_the_client_cancels_while_it_waits_for_a_place(world):
    world.coordinator.gate.clear()
    call = asyncio.ensure_future(world.whole(ask(request_id="x")))
    await eventually(lambda: world.coordinator.places)
    call.cancel()
    await eventually(lambda: world.coordinator.reports)
    world.coordinator.gate.set()
    assert not world.decode["d0"].starts
    # The name is free again.
    await world.whole(ask(request_id="x"))


async def test_the_clients_deadline_reaches_everyone(world):
    world.decode["d0"].pause_at = 4
    error = await failure(world.stream(ask(), timeout=2.0))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # gRPC rounds a deadline up on the wire, by a hundredth at most.
    assert world.decode["d0"].starts[0].deadline_ms <= 2020
    await eventually(lambda: world.decode["d0"].cancels)
    await world.settled()
    (report,) = world.coordinator.reports
    assert (report.failed_worker, report.failure) == ("", "DEADLINE")


async def test_without_a_client_deadline_the_default_holds():
    async with a_world(default_timeout_seconds=2.0) as world:
        (await world.add_decode("d0")).pause_at = 4
        error = await failure(world.stream(ask(), timeout=None))
        assert from_rpc(error).reason == "DEADLINE"
        assert "4 tokens" in error.details()
        await world.settled()


async def test_a_silent_worker_is_lost_for_its_requests():
    async with a_world(stall_seconds=0.6) as world:
        (await world.add_decode("d0")).pause_at = 4
        await world.add_decode("d1")
        answer = await world.whole(ask())
        assert list(answer.token_ids) == answer_to("tandem", 12)
        first, _ = answer.route.attempts
        assert (first.decode_worker, first.failure) == ("d0", "WORKER_SILENT")
        assert world.decode["d0"].cancels == ["made-0/0"]
        assert not world.coordinator.reports[0].unreachable


async def test_a_silent_prefill_worker_is_lost_too():
    async with a_world(stall_seconds=0.6) as world:
        (await world.add_prefill("p0")).gate.clear()
        await world.add_prefill("p1")
        await world.add_decode("d0")
        answer = await world.whole(ask())
        assert list(answer.token_ids) == answer_to("tandem", 12)
        assert [a.prefill_worker for a in answer.route.attempts] == ["p0", "p1"]
        await eventually(lambda: world.prefill["p0"].cancelled)


async def test_a_worker_that_serves_others_is_not_silent():
    async with a_world(stall_seconds=0.5) as world:
        decode = await world.add_decode("d0")
        decode.pause_at = 4
        call = world.stream(ask())
        await decode.paused.wait()
        decode.pause_at = None
        for _ in range(8):
            await asyncio.sleep(0.1)
            await world.whole(ask())
        assert decode.cancels == []
        call.cancel()


# The coordinator


async def test_streams_outlive_the_coordinator(world):
    world.decode["d0"].frame_tokens = 1
    call = world.stream(ask())
    await call.read()
    await world.kill("coordinator")
    messages = [*(await collect_rest(call))]
    assert messages[-1].finish_reason == LENGTH


async def test_a_request_without_a_coordinator(world, monkeypatch):
    monkeypatch.setattr(coordinator_module, "PATIENCE_SECONDS", 0.3)
    await world.whole(ask())
    await world.kill("coordinator")
    error = await failure(world.whole(ask()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert from_rpc(error).reason == "COORDINATOR_UNAVAILABLE"
    assert world.coordinator_address in error.details()
    error = await failure(world.stub.ListModels(inference_pb2.ListModelsRequest()))
    assert from_rpc(error).reason == "COORDINATOR_UNAVAILABLE"


async def test_a_coordinator_that_comes_back_before_its_workers_is_waited_for(world):
    await world.whole(ask())
    port = int(world.coordinator_address.rpartition(":")[2])
    await world.kill("coordinator")
    call = asyncio.ensure_future(world.whole(ask()))
    await asyncio.sleep(0.1)
    world.coordinator.failures += [NoWorkersError("nobody yet")] * 2
    adder = coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server
    world.servers["coordinator"], _ = await listen((adder, world.coordinator, "c"), port=port)
    assert list((await call).token_ids) == answer_to("tandem", 12)


async def test_no_workers_is_final_while_the_coordinator_is_well(world):
    await world.whole(ask())
    world.coordinator.failures.append(NoWorkersError("none", role="decode"))
    error = await failure(world.whole(ask()))
    assert from_rpc(error).reason == "NO_WORKERS"
    assert len(world.coordinator.places) == 2


async def test_a_refusal_reaches_the_client_whole(world):
    world.coordinator.failures.append(EngineOverloadedError("full", retry_seconds=7.5))
    error = await failure(world.whole(ask()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert from_rpc(error).retry_seconds == 7.5


async def test_before_any_worker_is_up():
    async with a_world() as world:
        error = await failure(world.whole(ask()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert from_rpc(error).reason == "NO_WORKERS"
        await world.add_decode("d0")
        assert (await world.whole(ask())).finish_reason == LENGTH


async def test_models_are_asked_for_now_and_then_not_each_time(world):
    for _ in range(20):
        await world.whole(ask(max_tokens=2))
    assert world.coordinator.models <= 2


# Links


async def test_a_worker_that_comes_back_at_its_address_gets_a_new_stream(world):
    await world.whole(ask())
    port = int(world.coordinator.decode["d0"].rpartition(":")[2])
    await world.kill("d0")
    await world.add_decode("d0", port)
    answer = await world.whole(ask(), timeout=10)
    assert list(answer.token_ids) == answer_to("tandem", 12)
    assert world.decode["d0"].opened == ["frontend-1"]


async def test_idle_streams_are_closed_and_opened_again(world, monkeypatch):
    await world.whole(ask())
    await world.workers.close_idle()
    assert world.decode["d0"].ended_streams == 0
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", 0.0)
    await world.workers.close_idle()
    await eventually(lambda: world.decode["d0"].ended_streams == 1)
    assert list((await world.whole(ask())).token_ids) == answer_to("tandem", 12)
    assert world.decode["d0"].streams == 2


async def test_a_stream_in_use_is_not_idle(world, monkeypatch):
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", 0.0)
    world.decode["d0"].pause_at = 4
    call = world.stream(ask())
    await world.decode["d0"].paused.wait()
    await world.workers.close_idle()
    assert world.decode["d0"].ended_streams == 0
    call.cancel()


# Documentation


async def test_the_client_in_the_docs_works_as_pasted(world, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "127.0.0.1:7400" in block
    script = tmp_path / "client.py"
    script.write_text(block.replace("127.0.0.1:7400", world.address))
    client = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    out, _ = await asyncio.wait_for(client.communicate(), 30)
    assert client.returncode == 0
    expected = following(world.model.encode(Chat((Turn("", "What is the capital of Japan?"),))), 48)
    room = 64 - len("WhatisthecapitalofJapan")
    first, second = out.decode().splitlines()
    assert first == spelled(expected[:room])
    assert second.startswith(f"{room} tokens")


# The process


async def test_on_stop_running_requests_finish_and_new_ones_are_refused(world):
    world.decode["d0"].pause_at = 4
    process = FrontendProcess(
        server=ServerSettings(port=0, drain_seconds=10),
        frontend=FrontendSettings(coordinator=world.coordinator_address),
    )
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve_model(world.model, process, ready=address.set_result, stop=stop)
    )
    async with grpc.aio.insecure_channel(await address) as channel:
        world.stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = world.stream(ask())
        messages = [await call.read()]
        await world.decode["d0"].paused.wait()
        stop.set()
        await eventually(lambda: channel.get_state() is not grpc.ChannelConnectivity.READY)
        assert (await failure(world.whole(ask()))).code() is grpc.StatusCode.UNAVAILABLE
        world.decode["d0"].go_on()
        messages += await collect_rest(call)
        assert tokens_of(messages) == answer_to("tandem", 12)
        await asyncio.wait_for(serving, 10)
    await eventually(lambda: world.decode["d0"].ended_streams == 1)


# Bad input


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"request_id": "a b"}, "request_id"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 64}, "prompt"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_bad_fields_are_named(world, change, field, streamed):
    request = ask(**change)
    call = world.stream(request) if streamed else world.whole(request)
    error = await failure(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    told = from_rpc(error)
    assert (told.reason, told.metadata["field"]) == ("INVALID_REQUEST", field)
    assert not world.coordinator.places


async def test_a_template_that_refuses(world):
    request = inference_pb2.GenerateRequest()
    request.chat.messages.add(role="alien", content="x")
    error = await failure(world.whole(request))
    assert from_rpc(error).metadata["field"] == "chat.messages[0].role"


async def test_an_unknown_model_lists_what_there_is(world):
    request = ask()
    request.model = "gpt-17"
    error = await failure(world.whole(request))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "gpt-17" in error.details()
    assert "letters" in error.details()


async def test_a_request_id_is_taken_while_its_request_lives(world):
    world.decode["d0"].pause_at = 4
    call = world.stream(ask(request_id="x"))
    await world.decode["d0"].paused.wait()
    error = await failure(world.whole(ask(request_id="x")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    call.cancel()
    world.decode["d0"].pause_at = None
    await world.settled()
    assert (await world.whole(ask(request_id="x"))).finish_reason == LENGTH


async def test_a_bug_in_one_request_spares_the_others(world, monkeypatch):
    world.decode["d0"].pause_at = 4
    good, bad = world.stream(ask("good")), world.stream(ask("bad", request_id="bad"))
    await good.read()
    await bad.read()

    def broken(token_ids):
        raise ZeroDivisionError

    await eventually(lambda: len(world.decode["d0"].running) == 2)
    world.decode["d0"].pause_at = None
    monkeypatch.setattr(world.model, "push", broken)
    restarted = world.stream(ask("bad"))
    error = await failure(restarted)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "incident" in error.details()
    monkeypatch.undo()
    assert (await world.whole(ask())).finish_reason == LENGTH
    good.cancel()
    bad.cancel()
    await world.settled()
