"""A request on its way through the engine: its tokens, its blocks, how far they are computed."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvtransfer.keys import KeyChain
from services.engine.api import FinishReason, KvPrefix, KvSource, Request
from services.engine.stepped.phases import Event, Phase, after


class Role(enum.Enum):
    """What is wanted of a sequence."""

    PREFILL = "prefill"
    """The prompt's KV, under a lease, and the first token."""
    DECODE = "decode"
    """Tokens until it finishes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a generation, apart from the request's own limits."""

    context_tokens: int
    eos_token_ids: frozenset[int]


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; belongs to the step thread.

    `tokens` is all that is known, prompt first; KV stands in `blocks` for the first `computed`
    of them. With `held_back`, the next token comes from prefill by proceed(), not from here.
    `deadline`: when it must be done, by the engine's clock, seconds.
    `context_keys` are the keys of all blocks of the request's tokens, an incomplete last one
    included: what a sink fetches. `cached_tokens` of these tokens had KV here on arrival,
    `fetched_tokens` got it from a source. `prefix` is a worker that may hold some of it, until one
    has been asked, for `fetch_timeout` seconds at most. A fetch fills `blocks` up to `fetch_until`.
    With a draft layer, its KV stands for the first `drafted` tokens: as many as `computed`, or one
    more. `drafts` are tokens that may follow; what KV stands for them will be written again.
    """

    serial: int
    request: Request
    role: Role
    chain: KeyChain
    source: KvSource | None = None
    prefix: KvPrefix | None = None
    phase: Phase = Phase.WAITING
    held_back: bool = False
    deadline: float = math.inf
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    drafted: int = 0
    drafts: tuple[int, ...] = ()
    context_keys: tuple[bytes, ...] = ()
    cached_tokens: int = 0
    fetched_tokens: int = 0
    fetch_until: int = 0
    fetch_timeout: float | None = None
    preemptions: int = 0

    @classmethod
    def of(
        cls,
        serial: int,
        request: Request,
        role: Role,
        chain: KeyChain,
        source: KvSource | None,
        prefix: KvPrefix | None = None,
    ) -> Sequence:
        """A new one, waiting. `chain` is empty yet and salted for the request's tenant."""
        sequence = cls(serial, request, role, chain, source, prefix, held_back=source is not None)
        sequence.append(request.token_ids)
        tail = chain.partial_key()
        sequence.context_keys = tuple(chain.keys) + ((tail,) if tail else ())
        return sequence

    @property
    def remaining(self) -> int:
        """Known tokens whose KV is missing."""
        return len(self.tokens) - self.computed

    @property
    def context(self) -> int:
        """Tokens known when the request came; the rest was generated (or given) since."""
        return len(self.request.prompt_token_ids) + len(self.request.output_token_ids)

    @property
    def outputs(self) -> int:
        """Tokens generated, by this attempt and earlier ones."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def left(self, limits: Limits) -> int:
        """Most tokens that may still be generated."""
        sampling = self.request.sampling
        return min(sampling.max_tokens - self.outputs, limits.context_tokens - len(self.tokens))

    def append(self, tokens: Seq[int]) -> None:
        """Adds known tokens; keys of blocks they complete follow."""
        self.tokens.extend(tokens)
        self.chain.extend(tokens)

    def move(self, event: Event) -> None:
        """Enters the phase that the table gives. Raises ValueError."""
        self.phase = after(self.phase, event)

    def finished(self, limits: Limits) -> FinishReason | None:
        """Whether the last token ends the request."""
        sampling = self.request.sampling
        if self.outputs > 0:
            last = self.tokens[-1]
            ends = last in limits.eos_token_ids and not sampling.ignore_eos
            if ends and sampling.guide is not None:
                return FinishReason.STOP  # it comes where the form is complete, or nothing else can
            if (ends or last in sampling.stop_token_ids) and self.outputs > sampling.min_tokens:
                return FinishReason.STOP
        if self.outputs >= sampling.max_tokens or len(self.tokens) >= limits.context_tokens:
            return FinishReason.LENGTH
        return None
