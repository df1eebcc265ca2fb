"""What a client may ask: every field checked, every default filled in. Pure.

Paths in errors are those of GenerateRequest ("sampling.top_p", "stop[2]").
"""

from __future__ import annotations

import math
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.engine.api import Guide, Sampling
from services.frontend.chat import Chat, Turn
from services.runtime.errors import InvalidRequestError, UnknownModelError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 64
# Less would push logits out of float32.
LEAST_REPETITION_PENALTY = 0.001
MAX_ID_CHARACTERS = 128
MAX_PRIORITY = 100
MAX_BIASES = 300
MAX_BIAS = 100
LEAST_TTFT_SECONDS = 0.001
"""What is asked for when the time to the first token is over: 0 would ask for none."""

_FLOAT32 = 3.4e38
"""Numbers beyond this are no float32, infinities and NaN among them."""

_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[0-9a-f]{1,64})?", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9\-_.:]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class AskedSampling:
    """SamplingParams as the client sent them; None is absent."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    guide: Guide | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Raw text. `special`: with the tokens that the model wants at its ends."""

    text: str
    special: bool = True


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt that the client tokenized."""

    token_ids: tuple[int, ...]


Input = Prompt | Chat | Tokens


@dataclass(frozen=True, slots=True)
class Asked:
    """GenerateRequest as the client sent it."""

    model: str
    input: Input | None
    sampling: AskedSampling
    stop: tuple[str, ...]
    request_id: str
    priority: int = 0
    session: str = ""
    ttft_seconds: float = 0.0
    itl_seconds: float = 0.0
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What of a request decides where it goes; fields as in coordinator.proto."""

    tenant: str = ""
    priority: int = 0
    session: str = ""
    region: str = ""
    allowed_regions: tuple[str, ...] = ()
    ttft_seconds: float = 0.0
    itl_seconds: float = 0.0
    adapter: str = ""

    def left(self, tokens: int, waited: float) -> Wishes:
        """Those of a placement when so many tokens are out, `waited` seconds after arrival.

        A stream that has begun is not ended for being slow.
        """
        if tokens:
            return replace(self, ttft_seconds=0.0, itl_seconds=0.0)
        if not self.ttft_seconds:
            return self
        return replace(self, ttft_seconds=max(LEAST_TTFT_SECONDS, self.ttft_seconds - waited))


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What bounds requests for one model. `context_tokens`: prompt and output together."""

    name: str
    context_tokens: int
    vocabulary: int
    default_max_tokens: int


def check_model(asked: str, own: str, served: Iterable[str]) -> None:
    """The model asked for is `own`, the one whose tokenizer is here. Raises UnknownModelError."""
    if asked in ("", own):
        return
    names = sorted(set(served) & {own}) or [f"none now ({own} when its workers are up)"]
    raise UnknownModelError(
        f"model {cut(asked)!r} is not served; served: {', '.join(names)}",
        model=cut(asked),
        served=", ".join(names),
    )


def check_request_id(request_id: str) -> None:
    """Letters, digits and "-_.:". Raises InvalidRequestError."""
    if len(request_id) > MAX_ID_CHARACTERS or not _ID.fullmatch(request_id):
        allowed = f'at most {MAX_ID_CHARACTERS} letters, digits and "-_.:"'
        raise InvalidRequestError("request_id", request_id, allowed)


def check_input(asked: Input | None, vocabulary: int) -> Input:
    """There is something to go on. Raises InvalidRequestError."""
    match asked:
        case None:
            raise InvalidRequestError("input", None, "one of prompt, chat and tokens must be set")
        case Prompt(text):
            if not text:
                raise InvalidRequestError("prompt", text, "at least one character")
        case Chat(turns):
            if not turns:
                raise InvalidRequestError("chat.messages", [], "at least one message")
            for i, turn in enumerate(turns):
                if not turn.role:
                    allowed = 'a role of the model\'s chat template, like "user"'
                    raise InvalidRequestError(f"chat.messages[{i}].role", turn.role, allowed)
        case Tokens(token_ids):
            if not token_ids:
                raise InvalidRequestError("tokens.token_ids", [], "at least one token")
            check_vocabulary("tokens.token_ids", token_ids, vocabulary)
    return asked


def check_messages(field: str, count: int, most: int) -> None:
    """Of a conversation, before any of it is looked at. Raises InvalidRequestError."""
    if count > most:
        allowed = f"at most {most} (frontend.max_messages)"
        raise InvalidRequestError(field, f"{count} messages", allowed)


def check_length(asked: Input, context_tokens: int, characters_per_token: int) -> None:
    """Text that can hardly fit is not tokenized to find out. Raises InvalidRequestError."""
    match asked:
        case Prompt(text):
            field, size = "prompt", len(text)
        case Chat(turns):
            field, size = "chat.messages", sum(map(_characters, turns))
        case Tokens(token_ids):
            if len(token_ids) >= context_tokens:
                room_for_output(asked, len(token_ids), context_tokens)
            return
    most = context_tokens * characters_per_token
    if size > most:
        allowed = (
            f"at most {most}, which is {characters_per_token} (frontend.characters_per_token) for "
            f"each token of the context window of {context_tokens}"
        )
        raise InvalidRequestError(field, f"{size} characters", allowed)


def _characters(turn: Turn) -> int:
    names = len(turn.role) + len(turn.name) + len(turn.call_id)
    calls = sum(len(call.id) + len(call.name) + len(call.arguments) for call in turn.calls)
    return len(turn.content or "") + len(turn.reasoning or "") + names + calls


def check_priority(priority: int) -> None:
    """Raises InvalidRequestError."""
    if abs(priority) > MAX_PRIORITY:
        raise InvalidRequestError("priority", priority, f"{-MAX_PRIORITY} to {MAX_PRIORITY}")


def check_session(session: str) -> None:
    """Raises InvalidRequestError."""
    if len(session) > MAX_ID_CHARACTERS or not _shows(session):
        allowed = f"at most {MAX_ID_CHARACTERS} characters, no control characters"
        raise InvalidRequestError("session", session, allowed)


def check_service_level(ttft_seconds: float, itl_seconds: float) -> None:
    """Seconds, 0 for no limit. Raises InvalidRequestError."""
    for name, value in (("ttft_seconds", ttft_seconds), ("itl_seconds", itl_seconds)):
        if not 0 <= value < math.inf:
            allowed = "a number of seconds, or 0 for no limit"
            raise InvalidRequestError(f"service_level.{name}", value, allowed)


def check_adapter(adapter: str) -> None:
    """A name, or name@digest. Raises InvalidRequestError."""
    if not _ADAPTER.fullmatch(adapter):
        raise InvalidRequestError(
            "adapter", adapter, "a name, or name@digest, as ListModels has it"
        )


def check_tenant(metadata: str, values: Sequence[str]) -> str:
    """The tenant that a request's metadata of this name gives. Raises InvalidRequestError.

    There is no default: a request that its proxy forgot to mark must not share KV with others.
    """
    if len(values) != 1 or not 1 <= len(values[0]) <= MAX_ID_CHARACTERS or not _shows(values[0]):
        allowed = (
            f"one value of 1 to {MAX_ID_CHARACTERS} characters, no control characters, which "
            "names the tenant"
        )
        raise InvalidRequestError(f"metadata {metadata}", values, allowed)
    return values[0]


def check_stops(stops: Sequence[str]) -> None:
    """Few and short enough to be watched for. Raises InvalidRequestError."""
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError("stop", f"{len(stops)} strings", f"at most {MAX_STOPS} strings")
    for i, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            allowed = f"1 to {MAX_STOP_CHARACTERS} characters, and it has {len(stop)}"
            raise InvalidRequestError(f"stop[{i}]", stop, allowed)


def check_sampling(
    asked: AskedSampling, limits: ModelLimits, draw_seed: Callable[[], int]
) -> Sampling:
    """Sampling with every field set; `draw_seed` gives 64 random bits if the client gave none.

    Of a guide only that it can be one here: whether it is one, compiling shows.

    Raises InvalidRequestError.
    """
    max_tokens = asked.max_tokens
    if max_tokens is None:
        max_tokens = limits.default_max_tokens
    if max_tokens < 1:
        raise InvalidRequestError("sampling.max_tokens", max_tokens, "at least 1")
    min_tokens = asked.min_tokens or 0
    if min_tokens > max_tokens:
        whose = "" if asked.max_tokens is not None else " by default"
        allowed = f"at most sampling.max_tokens, which is {max_tokens}{whose}"
        raise InvalidRequestError("sampling.min_tokens", min_tokens, allowed)
    if asked.logprobs is not None and asked.logprobs > MAX_LOGPROBS:
        raise InvalidRequestError("sampling.logprobs", asked.logprobs, f"0 to {MAX_LOGPROBS}")
    if len(asked.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidRequestError(
            "sampling.stop_token_ids",
            f"{len(asked.stop_token_ids)} ids",
            f"at most {MAX_STOP_TOKENS}",
        )
    if asked.guide is not None and asked.ignore_eos:
        allowed = "with a guide the end-of-sequence token says that the form is complete"
        raise InvalidRequestError("sampling.ignore_eos", True, allowed)
    check_vocabulary("sampling.stop_token_ids", asked.stop_token_ids, limits.vocabulary)
    top_k = asked.top_k or 0
    return Sampling(
        temperature=_number("temperature", asked.temperature, 1.0, 0.0, 2.0),
        top_k=top_k if top_k < limits.vocabulary else 0,
        top_p=_number("top_p", asked.top_p, 1.0, 0.0, 1.0, above=True),
        min_p=_number("min_p", asked.min_p, 0.0, 0.0, 1.0),
        repetition_penalty=_number(
            "repetition_penalty", asked.repetition_penalty, 1.0, LEAST_REPETITION_PENALTY, 10.0
        ),
        presence_penalty=_number("presence_penalty", asked.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_number("frequency_penalty", asked.frequency_penalty, 0.0, -2.0, 2.0),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=tuple(dict.fromkeys(asked.stop_token_ids)),
        seed=draw_seed() if asked.seed is None else asked.seed,
        logprobs=asked.logprobs,
        ignore_eos=asked.ignore_eos,
        guide=asked.guide,
        logit_bias=_bias(asked.logit_bias, limits.vocabulary),
    )


def room_for_output(asked: Input, tokens: int, context_tokens: int) -> int:
    """Tokens that the context window leaves after a prompt of `tokens`, at least 1.

    Raises InvalidRequestError if the prompt is empty or leaves none.
    """
    match asked:
        case Chat():
            field = "chat"
        case Tokens():
            field = "tokens.token_ids"
        case Prompt():
            field = "prompt"
    if tokens == 0:
        raise InvalidRequestError(field, "0 tokens", "it must come to at least one token")
    if tokens >= context_tokens:
        allowed = (
            f"at most {context_tokens - 1} tokens, as the context window of {context_tokens} "
            "holds prompt and output"
        )
        raise InvalidRequestError(field, f"{tokens} tokens", allowed)
    return context_tokens - tokens


def _number(
    name: str, value: float | None, default: float, low: float, high: float, *, above: bool = False
) -> float:
    """A finite number in [low, high], or (low, high] with `above`."""
    if value is None:
        return default
    # NaN fails the first comparison, infinities one of the bounds.
    if not low <= value <= high or (above and value == low):
        allowed = f"above {low:g}, at most {high:g}" if above else f"{low:g} to {high:g}"
        raise InvalidRequestError(f"sampling.{name}", _shortest(value), allowed)
    return value


def _bias(asked: Mapping[int, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    if len(asked) > MAX_BIASES:
        allowed = f"at most {MAX_BIASES}"
        raise InvalidRequestError("sampling.logit_bias", f"{len(asked)} tokens", allowed)
    for token_id, value in asked.items():
        name = f"sampling.logit_bias[{token_id}]"
        if token_id >= vocabulary:
            allowed = f"ids are 0 to {vocabulary - 1}, the model's vocabulary"
            raise InvalidRequestError(name, token_id, allowed)
        if not -MAX_BIAS <= value <= MAX_BIAS:
            raise InvalidRequestError(name, _shortest(value), f"{-MAX_BIAS} to {MAX_BIAS}")
    return tuple(sorted(asked.items()))


def check_vocabulary(field: str, token_ids: Sequence[int], vocabulary: int) -> None:
    """Raises InvalidRequestError naming the first that is none of the model's."""
    if max(token_ids, default=0) < vocabulary:
        return
    for i, token_id in enumerate(token_ids):
        if token_id >= vocabulary:
            allowed = f"0 to {vocabulary - 1}, the model's vocabulary"
            raise InvalidRequestError(f"{field}[{i}]", token_id, allowed)


def _shortest(value: float) -> float:
    """What the client wrote: the shortest decimal that is the same float32 (2.1, not 2.0999999)."""
    if not abs(value) < _FLOAT32:
        return value
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        if struct.pack("f", float(text)) == struct.pack("f", value):
            return float(text)
    return value


def _shows(name: str) -> bool:
    """It has nothing of Unicode's category C: names end up in logs and on terminals."""
    return not any(unicodedata.category(c).startswith("C") for c in name)


def cut(text: str) -> str:
    """Short enough to be shown."""
    return text if len(text) <= 60 else text[:57] + "..."
