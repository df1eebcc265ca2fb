"""OpenAIService: what OpenAI's clients call, by the gateway or by gRPC itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from services.frontend import validate
from services.frontend.begin import Beginning, Context
from services.frontend.chat import Chat
from services.frontend.openai import chat, completion, models
from services.frontend.openai.asking import Bounds, named_as
from services.frontend.openai.serving import Serving, Target
from services.frontend.openai.turns import functions_of, turns_of
from services.frontend.openai.usage import usage_of
from services.frontend.openai.wire import NAMES, chat_from, completion_from
from services.frontend.validate import Input, Prompt
from services.runtime.errors import InvalidRequestError, UnknownModelError
from tandem.openai.v1 import openai_pb2 as pb
from tandem.openai.v1 import openai_pb2_grpc


class OpenAIServicer(openai_pb2_grpc.OpenAIServiceServicer):
    """Serves one model and its adapters. `now`: Unix time in seconds."""

    def __init__(self, beginning: Beginning, now: Callable[[], float]) -> None:
        self._beginning = beginning
        self._clock = beginning.cluster.clock
        self._serving = Serving(beginning, now)
        self._spelling = self._serving.spelling
        self._started = int(now())
        settings = beginning.settings
        self._bounds = Bounds(
            messages=settings.max_messages,
            tools=settings.max_tools,
            tools_bytes=settings.tools_bytes,
            choices=settings.max_choices,
        )

    async def CreateChatCompletion(  # noqa: N802
        self, request: pb.CreateChatCompletionRequest, context: Context
    ) -> pb.CreateChatCompletionResponse:
        """The whole answer; see openai.proto."""
        arrived = self._clock()
        target = await self._serving.target(request.model)
        asking = chat_from(request, self._bounds, stream=False)
        async with self._serving.answers(asking, target, context, arrived) as answers:
            parts = await answers.choices.whole()
            await answers.say_id(context)
            usage, heading = usage_of(answers.choices), answers.heading
            return chat.whole(parts, usage, heading, self._spelling, logprobs=request.logprobs)

    async def StreamChatCompletion(  # noqa: N802
        self, request: pb.StreamChatCompletionRequest, context: Context
    ) -> AsyncIterator[pb.StreamChatCompletionResponse]:
        """The answer as it comes; see openai.proto."""
        arrived, asked = self._clock(), request.request
        target = await self._serving.target(asked.model)
        asking = chat_from(asked, self._bounds, stream=True)
        async with (
            self._serving.answers(asking, target, context, arrived) as answers,
            aclosing(answers.choices.parts()) as parts,
        ):
            stream = chat.Stream(answers.heading, self._spelling, logprobs=asked.logprobs)
            first = True
            async for part in parts:
                if first:
                    await answers.say_id(context)
                    first = False
                for piece in stream.pieces(part):
                    yield piece
            if asking.include_usage:
                yield stream.usage(usage_of(answers.choices))

    async def CreateCompletion(  # noqa: N802
        self, request: pb.CreateCompletionRequest, context: Context
    ) -> pb.CreateCompletionResponse:
        """The whole continuation; see openai.proto."""
        arrived = self._clock()
        target = await self._serving.target(request.model)
        most = target.served.context_tokens
        asking = completion_from(request, self._bounds, most, stream=False)
        async with self._serving.answers(asking, target, context, arrived) as answers:
            parts = await answers.choices.whole()
            echoes = await self._serving.echoes(asking, answers)
            await answers.say_id(context)
            return completion.whole(
                parts,
                usage_of(answers.choices),
                answers.heading,
                self._spelling,
                logprobs=request.HasField("logprobs"),
                echoes=echoes,
            )

    async def StreamCompletion(  # noqa: N802
        self, request: pb.StreamCompletionRequest, context: Context
    ) -> AsyncIterator[pb.StreamCompletionResponse]:
        """The continuation as it comes; see openai.proto."""
        arrived, asked = self._clock(), request.request
        target = await self._serving.target(asked.model)
        most = target.served.context_tokens
        asking = completion_from(asked, self._bounds, most, stream=True)
        async with (
            self._serving.answers(asking, target, context, arrived) as answers,
            aclosing(answers.choices.parts()) as parts,
        ):
            stream = completion.Stream(
                answers.heading,
                self._spelling,
                logprobs=asked.HasField("logprobs"),
                echoes=await self._serving.echoes(asking, answers),
            )
            first = True
            async for part in parts:
                if first:
                    await answers.say_id(context)
                    first = False
                for piece in stream.pieces(part):
                    yield piece
            if asking.include_usage:
                yield stream.usage(usage_of(answers.choices))

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """What can be asked for now; see openai.proto."""
        return pb.ListModelsResponse(object="list", data=await self._models())

    async def RetrieveModel(  # noqa: N802
        self, request: pb.RetrieveModelRequest, context: Context
    ) -> pb.RetrieveModelResponse:
        """One of them. Raises UnknownModelError."""
        found = await self._models()
        for model in found:
            if model.id == request.model:
                fields = {field.name: value for field, value in model.ListFields()}
                return pb.RetrieveModelResponse(**fields)
        served, shown = ", ".join(model.id for model in found), validate.cut(request.model)
        raise UnknownModelError(
            f"model {shown!r} is not served; served: {served or 'none now'}",
            field="model",
            model=shown,
            served=served,
        )

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        """Tokens of a text or a conversation; see openai.proto."""
        target = await self._serving.target(request.model)
        with named_as(NAMES):
            given = self._to_tokenize(request, target)
            tokens = await self._beginning.off_loop(self._beginning.model.encode, given)
        return pb.TokenizeResponse(
            count=len(tokens),
            max_model_len=target.served.context_tokens,
            tokens=tokens,
            token_strs=map(self._spelling.text_of, tokens) if request.return_token_strs else (),
        )

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        """Text of tokens; see openai.proto."""
        await self._serving.target(request.model)
        tokens = list(request.tokens)
        validate.check_vocabulary("tokens", tokens, self._beginning.model.vocabulary)
        text = await self._beginning.off_loop(self._serving.decoded, tokens)
        return pb.DetokenizeResponse(prompt=text)

    def _to_tokenize(self, request: pb.TokenizeRequest, target: Target) -> Input:
        """Raises InvalidRequestError."""
        given: Input
        if request.HasField("prompt") == bool(request.messages):
            raise InvalidRequestError("prompt", request.prompt, "either prompt or messages")
        if request.messages:
            bounds = self._bounds
            tools = functions_of(request.tools, bounds.tools, bounds.tools_bytes)
            given = Chat(turns_of(request.messages, bounds.messages), tools)
        elif request.tools:
            raise InvalidRequestError("tools", f"{len(request.tools)} tools", "with messages only")
        else:
            special = request.add_special_tokens or not request.HasField("add_special_tokens")
            given = Prompt(request.prompt, special)
        most = self._beginning.settings.characters_per_token
        validate.check_length(given, target.served.context_tokens, most)
        return given

    async def _models(self) -> list[pb.Model]:
        own = self._beginning.model.name
        served = await self._beginning.cluster.coordinator.list_models()
        return [
            pb.Model(
                id=name,
                object="model",
                created=self._started,
                owned_by=models.OWNER,
                max_model_len=model.context_tokens,
                parent=parent or None,
            )
            for model in served
            if model.name == own
            for name, parent in models.named(model)
        ]
