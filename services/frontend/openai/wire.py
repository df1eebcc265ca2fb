"""From OpenAI's messages to what is asked; every field is used, or refused by its path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from services.engine.api import Guide, GuideKind
from services.frontend.chat import Calling, Chat
from services.frontend.openai.asking import TIERS, Asking, Bounds, Names
from services.frontend.openai.forms import Request, form_of
from services.frontend.openai.turns import functions_of, tool_choice_of, turns_of
from services.frontend.openai.values import Json, json_of, object_of, prompts_of, stops_of
from services.frontend.validate import AskedSampling, Input, Prompt, Tokens
from services.runtime.errors import InvalidRequestError
from tandem.openai.v1 import openai_pb2 as pb

MAX_LOGPROBS = 5
"""Of completions, as OpenAI has it."""
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512
"""Of metadata."""
COMPLETION_TOKENS = 16
"""Default of max_tokens of a completion."""
EFFORTS = ("none", "minimal", "low", "medium", "high")
OURS = frozenset({"messages", "tools", "add_generation_prompt", "documents"})
"""What templates have under these names is the request's own."""
MAX_VARIABLES = 64
_MASK64 = 2**64 - 1

NAMES: Names = (
    ("sampling.", ""),
    ("service_level.", ""),
    ("chat.messages", "messages"),
    ("chat.tools", "tools"),
    ("chat", "messages"),
    ("tokens.token_ids", "prompt"),
    ("session", "user"),
    ("adapter", "model"),
    ("request_id", "x-request-id"),
)
"""What validate.py and others call fields, and the client does."""

_SAMPLING = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
)


def chat_from(message: pb.CreateChatCompletionRequest, bounds: Bounds, *, stream: bool) -> Asking:
    """A conversation. `stream`: what the method is. Raises InvalidRequestError."""
    _check_stream(message, stream=stream)
    _check_pairs(message.metadata)
    if message.store:
        raise InvalidRequestError("store", True, "false: nothing is stored")
    if message.HasField("top_logprobs") and not message.logprobs:
        allowed = "only with logprobs"
        raise InvalidRequestError("top_logprobs", message.top_logprobs, allowed)
    most, limit = _most(message)
    guide, form = form_of(message)
    tools = functions_of(message.tools, bounds.tools, bounds.tools_bytes)
    choice = tool_choice_of(json_of(message.tool_choice), tools)
    if guide is not None and choice.calling is not Calling.NONE:
        allowed = f'not with tools that may be called (tool_choice "none" keeps {form})'
        raise InvalidRequestError(form, "a form", allowed)
    turns = turns_of(message.messages, bounds.messages)
    chat = Chat(turns, tools, _variables(message))
    logprobs = message.top_logprobs if message.logprobs else None
    return _asking(
        message,
        (chat,),
        _sampling(message, guide, max_tokens=most, logprobs=logprobs),
        bounds,
        (
            ("sampling.max_tokens", limit),
            ("sampling.logprobs", "top_logprobs"),
            *_form(form or "tools"),
            *NAMES,
        ),
        tools=tools,
        choice=choice,
        parallel=message.parallel_tool_calls or not message.HasField("parallel_tool_calls"),
    )


def completion_from(
    message: pb.CreateCompletionRequest, bounds: Bounds, most_tokens: int, *, stream: bool
) -> Asking:
    """A text, or several. `most_tokens`: that the context window holds.

    Raises InvalidRequestError.
    """
    _check_stream(message, stream=stream)
    if message.suffix:
        allowed = "empty: this model continues texts and does not fill in"
        raise InvalidRequestError("suffix", message.suffix, allowed)
    if message.HasField("best_of") and message.best_of != (message.n or 1):
        raise InvalidRequestError("best_of", message.best_of, "n: the best of more is not chosen")
    logprobs = message.logprobs if message.HasField("logprobs") else None
    if logprobs is not None and logprobs > MAX_LOGPROBS:
        raise InvalidRequestError("logprobs", logprobs, f"0 to {MAX_LOGPROBS}")
    if logprobs is not None and message.echo:
        allowed = "not with echo: log-probabilities are computed of what is generated"
        raise InvalidRequestError("logprobs", logprobs, allowed)
    prompts = prompts_of(json_of(message.prompt), bounds.choices, most_tokens)
    inputs = tuple(Prompt(p) if isinstance(p, str) else Tokens(p) for p in prompts)
    guide, form = form_of(message)
    most = message.max_tokens if message.HasField("max_tokens") else COMPLETION_TOKENS
    return _asking(
        message,
        inputs,
        _sampling(message, guide, max_tokens=most, logprobs=logprobs),
        bounds,
        (*_form(form), *NAMES),
        echo=message.echo,
    )


def _asking(
    message: Request,
    inputs: tuple[Input, ...],
    sampling: AskedSampling,
    bounds: Bounds,
    names: Names,
    **more: Any,
) -> Asking:
    """What both kinds of request have."""
    n = message.n if message.HasField("n") else 1
    if not 1 <= n <= bounds.choices:
        raise InvalidRequestError("n", n, f"1 to {bounds.choices} (frontend.max_choices)")
    if n * len(inputs) > bounds.choices:
        allowed = f"{bounds.choices} (frontend.max_choices) choices at most, n for each prompt"
        raise InvalidRequestError("prompt", f"{len(inputs)} prompts", allowed)
    tier = message.service_tier or "auto"
    if tier not in TIERS:
        raise InvalidRequestError("service_tier", tier, f"one of {', '.join(TIERS)}")
    for name in ("ttft_seconds", "itl_seconds"):
        if not 0 <= getattr(message, name) < math.inf:
            raise InvalidRequestError(name, getattr(message, name), "a number of seconds")
    return Asking(
        model=message.model,
        inputs=inputs,
        sampling=sampling,
        stop=stops_of(json_of(message.stop)),
        n=n,
        tier=tier,
        priority=message.priority if message.HasField("priority") else TIERS[tier],
        session=message.user,
        ttft_seconds=message.ttft_seconds,
        itl_seconds=message.itl_seconds,
        include_usage=message.stream_options.include_usage,
        names=names,
        **more,
    )


def _sampling(
    message: Request, guide: Guide | None, *, max_tokens: int | None, logprobs: int | None
) -> AskedSampling:
    present = {field.name: value for field, value in message.ListFields()}
    given = {name: present[name] for name in _SAMPLING if name in present}
    return AskedSampling(
        max_tokens=max_tokens,
        logprobs=logprobs,
        seed=message.seed & _MASK64 if message.HasField("seed") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=_bias(message.logit_bias),
        guide=guide,
        **given,
    )


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for token, value in given.items():
        # Of "1" and "01" one would be lost.
        if not token.isascii() or not token.isdigit() or str(int(token[:20])) != token:
            raise InvalidRequestError(f"logit_bias.{token[:40]}", value, "a token's id as the key")
        bias[int(token)] = value
    return bias


def _most(message: pb.CreateChatCompletionRequest) -> tuple[int | None, str]:
    """Tokens to generate, and by which field."""
    new = message.max_completion_tokens if message.HasField("max_completion_tokens") else None
    if not message.HasField("max_tokens"):
        return new, "max_completion_tokens"
    if new is not None and new != message.max_tokens:
        allowed = f"not with another max_completion_tokens, which is {new}"
        raise InvalidRequestError("max_tokens", message.max_tokens, allowed)
    return message.max_tokens, "max_tokens"


def _variables(message: pb.CreateChatCompletionRequest) -> dict[str, Json]:
    """For the template. What the client says itself goes before what reasoning_effort says."""
    found: dict[str, Json] = {}
    if message.HasField("reasoning_effort"):
        effort = message.reasoning_effort
        if effort not in EFFORTS:
            raise InvalidRequestError("reasoning_effort", effort, f"one of {', '.join(EFFORTS)}")
        found["reasoning_effort"] = effort
        # What models that can be asked to think call it, in their templates.
        found["enable_thinking"] = found["thinking"] = effort != "none"
    path = "chat_template_kwargs"
    given = object_of(message.chat_template_kwargs)
    if len(given) > MAX_VARIABLES:
        raise InvalidRequestError(path, f"{len(given)} variables", f"at most {MAX_VARIABLES}")
    for name in given:
        if name in OURS or not name.isidentifier():
            allowed = f"a variable's name, and none of {', '.join(sorted(OURS))}"
            raise InvalidRequestError(f"{path}.{name[:40]}", name, allowed)
    return found | given


def _form(path: str) -> Names:
    """A guide's faults are those of the field that asks for it, whatever they name inside."""
    if not path:
        return ()
    return (
        *((f"sampling.guide.{kind.value}", path) for kind in GuideKind),
        ("sampling.guide", path),
    )


def _check_stream(message: Request, *, stream: bool) -> None:
    if message.stream and not stream:
        allowed = "false, or a call of the streaming method"
        raise InvalidRequestError("stream", True, allowed)
    if message.HasField("stream_options") and not stream:
        raise InvalidRequestError("stream_options", "options", "only with stream")


def _check_pairs(pairs: Mapping[str, str]) -> None:
    if len(pairs) > MAX_PAIRS:
        raise InvalidRequestError("metadata", f"{len(pairs)} pairs", f"at most {MAX_PAIRS}")
    for key, value in pairs.items():
        if len(key) > MAX_KEY or len(value) > MAX_VALUE:
            allowed = f"keys of at most {MAX_KEY} characters, values of at most {MAX_VALUE}"
            raise InvalidRequestError(f"metadata.{key[:40]}", value, allowed)
