"""Tokens counted over all choices: a prompt once, however many answers it has."""

from __future__ import annotations

from services.frontend.openai.choices import Choices
from services.frontend.usage import cached_tokens
from tandem.openai.v1 import openai_pb2 as pb


def usage_of(choices: Choices) -> pb.Usage:
    """Of a request whose answers have all ended."""
    prompt = cached = completion = thought = 0
    for choice in choices.firsts:
        core = choice.live.core
        tokens = core.limits.prompt_tokens
        prompt += tokens
        cached += cached_tokens(tokens, core.attempts)
    for choice in choices.all:
        completion += len(choice.live.core.output)
        thought += choice.text.thought_tokens if choice.text is not None else 0
    return pb.Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=pb.PromptTokensDetails(cached_tokens=cached),
        completion_tokens_details=pb.CompletionTokensDetails(reasoning_tokens=thought),
    )
