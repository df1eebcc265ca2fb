"""Answers of a conversation as OpenAI's messages, whole and in pieces.

A piece with text alone, as most are, is one message filled anew: making one costs eight times as
much. gRPC writes it to bytes before the next one is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.frontend.answers.deltas import CallArguments, CallBegins, Content, Delta, Reasoning
from services.frontend.openai.choices import Part
from services.frontend.openai.heading import Heading
from services.frontend.openai.tokens import Spelling
from tandem.openai.v1 import openai_pb2 as pb

Chunk = pb.StreamChatCompletionResponse


def whole(
    parts: Sequence[Part], usage: pb.Usage, heading: Heading, spelling: Spelling, *, logprobs: bool
) -> pb.CreateChatCompletionResponse:
    """The answer to CreateChatCompletion."""
    return pb.CreateChatCompletionResponse(
        id=f"chatcmpl-{heading.name}",
        object="chat.completion",
        created=heading.created,
        model=heading.model,
        system_fingerprint=heading.fingerprint,
        service_tier=heading.tier,
        usage=usage,
        choices=[
            pb.ChatChoice(
                index=part.choice.index,
                message=_message(part, heading),
                logprobs=spelling.chat(part.logprobs) if logprobs else None,
                finish_reason=part.finish_reason,
            )
            for part in parts
        ],
    )


def _message(part: Part, heading: Heading) -> pb.AnswerMessage:
    message = pb.AnswerMessage(role="assistant")
    for delta in part.deltas:
        match delta:
            case Content(text):
                message.content += text
            case Reasoning(text):
                message.reasoning_content += text
            case CallBegins(index, name):
                call = message.tool_calls.add(
                    id=heading.call_id(part.choice.index, index), type="function"
                )
                call.function.name, call.function.arguments = name, ""
            case CallArguments(index, text):
                message.tool_calls[index].function.arguments += text
    if not message.tool_calls:
        # Present, if empty.
        message.content = message.content
    return message


class Stream:
    """Makes the pieces of a request's answers."""

    def __init__(self, heading: Heading, spelling: Spelling, *, logprobs: bool) -> None:
        self._heading = heading
        self._spelling = spelling if logprobs else None
        self._begun: set[int] = set()
        self._message = self._new()
        self._choice = self._message.choices.add(index=0)
        self._delta = self._choice.delta
        self._delta.content = ""

    def pieces(self, part: Part) -> Iterator[Chunk]:
        """Each is to be written before the next one is asked for."""
        index, deltas = part.choice.index, part.deltas
        if index not in self._begun:
            yield self._role(index, deltas)
        if part.logprobs and self._spelling is not None:
            # With the first of what its tokens brought, if they brought anything yet.
            first = self._piece(index, deltas[0] if deltas else None)
            first.choices[0].logprobs.CopyFrom(self._spelling.chat(part.logprobs))
            yield first
            deltas = deltas[1:]
        for delta in deltas:
            if isinstance(delta, Content):
                self._choice.index = index
                self._delta.content = delta.text
                yield self._message
            else:
                yield self._piece(index, delta)
        if part.finish_reason:
            last = self._new()
            last.choices.add(index=index, delta={}, finish_reason=part.finish_reason)
            yield last

    def usage(self, usage: pb.Usage) -> Chunk:
        """The last piece, if it is wanted."""
        message = self._new()
        message.usage.CopyFrom(usage)
        return message

    def _new(self) -> Chunk:
        heading = self._heading
        return Chunk(
            id=f"chatcmpl-{heading.name}",
            object="chat.completion.chunk",
            created=heading.created,
            model=heading.model,
            system_fingerprint=heading.fingerprint,
        )

    def _role(self, index: int, deltas: Sequence[Delta]) -> Chunk:
        """An answer's first piece. It has content, still empty, if that comes next."""
        message = self._new()
        if not self._begun:
            message.service_tier = self._heading.tier
        self._begun.add(index)
        delta = message.choices.add(index=index).delta
        delta.role = "assistant"
        if deltas and isinstance(deltas[0], Content):
            delta.content = ""
        return message

    def _piece(self, index: int, delta: Delta | None) -> Chunk:
        message = self._new()
        said = message.choices.add(index=index, delta={}).delta
        match delta:
            case Content(text):
                said.content = text
            case Reasoning(text):
                said.reasoning_content = text
            case CallBegins(call, name):
                begun = said.tool_calls.add(
                    index=call, id=self._heading.call_id(index, call), type="function"
                )
                begun.function.name, begun.function.arguments = name, ""
            case CallArguments(call, text):
                said.tool_calls.add(index=call).function.arguments = text
        return message
