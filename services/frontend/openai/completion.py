"""Continuations of texts as OpenAI's messages, whole and in pieces; see chat.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.frontend.answers.deltas import Content
from services.frontend.openai.choices import Part
from services.frontend.openai.heading import Heading
from services.frontend.openai.tokens import Offsets, Spelling
from tandem.openai.v1 import openai_pb2 as pb

Chunk = pb.StreamCompletionResponse


def text_of(part: Part) -> str:
    """What a part says."""
    return "".join(delta.text for delta in part.deltas if isinstance(delta, Content))


def whole(
    parts: Sequence[Part],
    usage: pb.Usage,
    heading: Heading,
    spelling: Spelling,
    *,
    logprobs: bool,
    echoes: Sequence[str],
) -> pb.CreateCompletionResponse:
    """The answer to CreateCompletion. `echoes`: the prompts' texts, empty if not asked for."""
    return pb.CreateCompletionResponse(
        id=f"cmpl-{heading.name}",
        object="text_completion",
        created=heading.created,
        model=heading.model,
        system_fingerprint=heading.fingerprint,
        usage=usage,
        choices=[
            pb.CompletionChoice(
                index=part.choice.index,
                text=echoes[part.choice.prompt] + text_of(part),
                logprobs=Offsets(spelling).completion(part.logprobs) if logprobs else None,
                finish_reason=part.finish_reason,
            )
            for part in parts
        ],
    )


class Stream:
    """Makes the pieces of a request's continuations."""

    def __init__(
        self, heading: Heading, spelling: Spelling, *, logprobs: bool, echoes: Sequence[str]
    ) -> None:
        self._heading = heading
        self._spelling = spelling if logprobs else None
        self._echoes = echoes
        self._begun: set[int] = set()
        self._offsets: dict[int, Offsets] = {}
        self._message = self._new()
        self._choice = self._message.choices.add(index=0, text="")

    def pieces(self, part: Part) -> Iterator[Chunk]:
        """Each is to be written before the next one is asked for."""
        index, text = part.choice.index, text_of(part)
        if index not in self._begun:
            self._begun.add(index)
            text = self._echoes[part.choice.prompt] + text
        logprobs = bool(part.logprobs) and self._spelling is not None
        if part.finish_reason or logprobs:
            message = self._new()
            choice = message.choices.add(index=index, text=text)
            if part.finish_reason:
                choice.finish_reason = part.finish_reason
            if part.logprobs and self._spelling is not None:
                offsets = self._offsets.setdefault(index, Offsets(self._spelling))
                choice.logprobs.CopyFrom(offsets.completion(part.logprobs))
            yield message
        elif text:
            self._choice.index, self._choice.text = index, text
            yield self._message

    def usage(self, usage: pb.Usage) -> Chunk:
        """The last piece, if it is wanted."""
        message = self._new()
        message.usage.CopyFrom(usage)
        return message

    def _new(self) -> Chunk:
        heading = self._heading
        return Chunk(
            id=f"cmpl-{heading.name}",
            object="text_completion",
            created=heading.created,
            model=heading.model,
            system_fingerprint=heading.fingerprint,
        )
