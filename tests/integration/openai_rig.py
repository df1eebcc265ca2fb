"""OpenAIService on real gRPC, before a worker that says what a script tells it to.

The model's tokens are bytes. Its answers think between [ and ], and call as {name(arguments)}.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
from collections.abc import Callable, Iterable
from typing import ClassVar

import grpc

from services.engine.api import Guide, GuideKind
from services.frontend.answers.deltas import CallArguments, CallBegins, Content, Reasoning
from services.frontend.chat import Calling, Chat
from services.frontend.openai.service import OpenAIServicer
from services.frontend.validate import Prompt
from services.runtime.errors import InvalidRequestError, from_rpc
from tandem.coordinator.v1 import coordinator_pb2
from tandem.decode.v1 import decode_pb2
from tandem.generation.v1 import generation_pb2
from tandem.openai.v1 import openai_pb2 as pb
from tandem.openai.v1 import openai_pb2_grpc
from tests.integration.test_frontend import LAYOUT, FakeCoordinator, FakeDecode, World, a_world

EOS = 256
CONTEXT = 512


class Brackets:
    """A parser of answers.format; `thinking` from the start if the prompt opened a thought."""

    def __init__(self, thinking: bool):
        self.thinking = thinking
        self.calls = 0
        self._name = ""
        self._inside = ""

    def push(self, text):
        return [delta for character in text for delta in self._step(character)]

    def finish(self):
        return [Content("{" + self._name)] if self._inside == "name" else []

    def _step(self, c):
        if self.thinking:
            self.thinking = c != "]"
            return [Reasoning(c)] if self.thinking else []
        if self._inside == "name":
            if c != "(":
                self._name += c
                return []
            self._inside = "arguments"
            self.calls += 1
            return [CallBegins(self.calls - 1, self._name)]
        if self._inside == "arguments":
            if c == ")":
                self._inside = "after"
                return []
            return [CallArguments(self.calls - 1, c)]
        if self._inside == "after" and c == "}":
            self._inside = ""
            return []
        if c == "[":
            self.thinking = True
            return []
        if c == "{":
            self._inside, self._name = "name", ""
            return []
        return [Content(c)]


class BracketFormat:
    name = "brackets"
    takes_tools = True
    thinks = True

    def thinks_after(self, tail):
        return tail.endswith("[")

    def after_thought(self, guide, thinking_open):
        return guide

    def parser(self, tools, choice, thinking_open, guided=False):
        return Brackets(thinking_open)

    def guide(self, tools, choice, parallel, thinking_open):
        if choice.calling in (Calling.REQUIRED, Calling.NAMED):
            names = [choice.name] if choice.name else [f.name for f in tools]
            return Guide(GuideKind.REGEX, (rf"\{{({'|'.join(names)})\(.*\)\}}",))
        return None


class Decoded:
    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids):
        return self._decoder.decode(bytes(t for t in token_ids if t < 256))

    def finish(self):
        return self._decoder.decode(b"", True)


class Bytes:
    """A model whose tokens are bytes, with one that ends an answer."""

    name = "bytes"
    vocabulary = 258
    eos_token_ids = (EOS,)
    tokens = (*(bytes([i]) for i in range(256)), b"", b"")
    control_tokens: ClassVar = {256: "<|end|>", 257: "<|turn|>"}

    def __init__(self, answers=None):
        self.answers = answers or BracketFormat()
        self.encoded = 0

    def encode(self, asked):
        self.encoded += 1
        match asked:
            case Prompt(text, special):
                return [*([257] if special else []), *text.encode()]
            case Chat(turns):
                if turns[0].role == "tool":
                    raise InvalidRequestError("chat.messages", ["tool"], "a user before it")
                said = (f"{t.role}:{t.content}{list(t.calls) or ''}\n" for t in turns)
                tools = "".join(tool.name for tool in asked.tools)
                return list((tools + "".join(said)).encode())
        return list(asked.token_ids)

    def thinks_after(self, prompt):
        return self.answers.thinks_after(bytes(t for t in prompt[-9:] if t < 256).decode("latin1"))

    def detokenizer(self, marked=False):
        return Decoded()


Script = Callable[[generation_pb2.TokenRequest], bytes]


def refusal(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """Reason and field."""
    told = from_rpc(error)
    assert told is not None
    return told.reason, told.metadata.get("field", "")


def say(text: str) -> Script:
    return lambda request: text.encode()


class Speaker(FakeDecode):
    """Says what `script` tells it to, then the end of the sequence."""

    def __init__(self, script: Script):
        super().__init__()
        self.script = script

    def break_off(self, name):
        """Ends an attempt, with an error that no other worker could help."""
        self.running.pop(name).task.cancel()
        error = generation_pb2.Error(reason="DEADLINE", message="too late")
        output = decode_pb2.RequestOutput(
            request_id=name, finish_reason=generation_pb2.FINISH_REASON_ERROR, error=error
        )
        self.streams_out[-1].put_nowait(decode_pb2.DecodeResponse(outputs=[output]))

    async def _generate(self, running, out):
        request, name = running.request, running.request.request_id
        spoken = [*self.script(request), EOS]
        sampling = request.sampling
        done = len(running.tokens)
        kv = generation_pb2.KvReport(cached_tokens=3)
        while True:
            while self.pause_at is not None and len(running.tokens) >= self.pause_at:
                self.paused.set()
                await self._resumed.wait()
            done = len(running.tokens)
            new = (spoken[done:] or [EOS])[: min(self.frame_tokens, sampling.max_tokens - done)]
            if EOS in new and len(running.tokens) + new.index(EOS) < sampling.min_tokens:
                new = [ord(".")]
            running.tokens += new
            output = decode_pb2.RequestOutput(request_id=name, token_ids=new)
            if sampling.HasField("logprobs"):
                output.logprobs.extend(logprob_of(t, sampling.logprobs) for t in new)
            if kv is not None:
                output.kv.CopyFrom(kv)
                kv = None
            if new[-1] == EOS and not sampling.ignore_eos:
                output.finish_reason = generation_pb2.FINISH_REASON_STOP
            elif len(running.tokens) >= sampling.max_tokens:
                output.finish_reason = generation_pb2.FINISH_REASON_LENGTH
            if output.finish_reason:
                del self.running[name]
            out.put_nowait(decode_pb2.DecodeResponse(outputs=[output]))
            if output.finish_reason:
                return
            await asyncio.sleep(0)


def logprob_of(token: int, rivals: int) -> generation_pb2.TokenLogprob:
    top = [
        generation_pb2.TopLogprob(token_id=(token + i) % 257, logprob=-(i + 1) / 8)
        for i in range(rivals)
    ]
    return generation_pb2.TokenLogprob(token_id=token, logprob=-0.125, top=top)


class OneModel(FakeCoordinator):
    """Serves `bytes`, with an adapter."""

    numerics = ("n1",)
    context = CONTEXT

    async def GetModels(self, request, context):  # noqa: N802
        model = coordinator_pb2.ServedModel(
            model="bytes",
            kv_layout=LAYOUT,
            block_tokens=4,
            context_tokens=self.context,
            decode_workers=len(self.decode),
            numerics=self.numerics,
        )
        model.adapters.add(id="pirate@0a", decode_workers=1, current_workers=1)
        return coordinator_pb2.GetModelsResponse(models=[model] if self.decode else [])


class OpenAIWorld:
    def __init__(self, world: World, model: Bytes, stub):
        self.world = world
        self.model = model
        self.stub = stub
        self.coordinator = world.coordinator

    async def add(self, name: str, script: Script | None = None) -> Speaker:
        """A decode worker that says what this script tells it to, or the others' one."""
        await self.world.add_decode(name)
        fake = self.world.decode[name]
        fake.__class__ = Speaker
        fake.script = script or say("hello")
        return fake

    def chat(self, request: pb.CreateChatCompletionRequest, **more):
        return self.stub.CreateChatCompletion(request, **{"timeout": 20, **more})

    async def chat_stream(self, request: pb.CreateChatCompletionRequest, **more):
        message = pb.StreamChatCompletionRequest(request=request)
        call = self.stub.StreamChatCompletion(message, **{"timeout": 20, **more})
        return [piece async for piece in call]

    def complete(self, request: pb.CreateCompletionRequest, **more):
        return self.stub.CreateCompletion(request, **{"timeout": 20, **more})

    async def complete_stream(self, request: pb.CreateCompletionRequest, **more):
        message = pb.StreamCompletionRequest(request=request)
        call = self.stub.StreamCompletion(message, **{"timeout": 20, **more})
        return [piece async for piece in call]


@contextlib.asynccontextmanager
async def an_openai_world(script: Script | None = None, answers=None, now=lambda: 1e9, **settings):
    model, coordinator = Bytes(answers), OneModel()

    def more(beginning):
        adder = openai_pb2_grpc.add_OpenAIServiceServicer_to_server
        return [(adder, OpenAIServicer(beginning, now), "o")]

    async with (
        a_world(coordinator, model, more, **settings) as world,
        grpc.aio.insecure_channel(world.address) as channel,
    ):
        openai = OpenAIWorld(world, model, openai_pb2_grpc.OpenAIServiceStub(channel))
        await openai.add("d0", script)
        yield openai


def user(text: str, **fields) -> pb.CreateChatCompletionRequest:
    """A request with one message."""
    request = pb.CreateChatCompletionRequest(model="bytes", **fields)
    request.messages.add(role="user").content.string_value = text
    return request


def tool(name: str, parameters: str = '{"type": "object"}') -> pb.Tool:
    return pb.Tool(
        type="function", function=pb.FunctionDefinition(name=name, parameters=parameters)
    )


def joined(pieces: Iterable[pb.StreamChatCompletionResponse]) -> list[pb.ChatChoice]:
    """The choices that a stream's pieces come to, as a client appends them."""
    choices: dict[int, pb.ChatChoice] = {}
    for piece in pieces:
        for part in piece.choices:
            choice = choices.setdefault(part.index, pb.ChatChoice(index=part.index))
            delta, message = part.delta, choice.message
            if delta.HasField("role"):
                assert not message.role
                message.role = delta.role
            if delta.HasField("content"):
                message.content += delta.content
            if delta.HasField("reasoning_content"):
                message.reasoning_content += delta.reasoning_content
            for call in delta.tool_calls:
                if call.HasField("id"):
                    assert call.index == len(message.tool_calls)
                    assert (call.type, call.function.arguments) == ("function", "")
                    message.tool_calls.add(id=call.id, type=call.type, function=call.function)
                else:
                    message.tool_calls[call.index].function.arguments += call.function.arguments
            choice.logprobs.content.extend(part.logprobs.content)
            if part.HasField("finish_reason"):
                assert not choice.finish_reason
                choice.finish_reason = part.finish_reason
    for choice in choices.values():
        if not choice.logprobs.content:
            choice.ClearField("logprobs")
    return [choices[index] for index in sorted(choices)]
