"""What can happen to a request, and what is to be done about it: the core's whole vocabulary."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from services.engine.api import FinishReason, KvPrefix, KvReport, TokenLogprob
from services.runtime.errors import CancelledError, TandemError


class Role(enum.Enum):
    """Which of an attempt's two workers."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as the coordinator named it. `cached_tokens`: what it is thought to hold."""

    worker_id: str
    address: str
    cached_tokens: int = 0
    dp_rank: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an attempt runs. Without a prefill worker the decode worker computes the prompt.

    `prefix` is a worker that holds more of the prompt than the one that computes it. What is
    predicted is in seconds, to the first token and from token to token; 0: nothing was.
    """

    decode: Worker
    prefill: Worker | None = None
    reasons: tuple[str, ...] = ()
    prefix: KvPrefix | None = None
    predicted_ttft_seconds: float = 0.0
    predicted_itl_seconds: float = 0.0


# Events. `attempt` is whose they are: the number of a placement (0, 1, 2...), or the one under
# which an attempt was begun anew on the worker that it was placed on. No number is used twice.


@dataclass(frozen=True, slots=True)
class Placed:
    """The coordinator chose."""

    attempt: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class Unplaced:
    """The coordinator refused, or could not be asked for as long as we wait for it."""

    attempt: int
    error: TandemError


@dataclass(frozen=True, slots=True)
class PrefillAccepted:
    """The prompt is in the prefill worker's queue, its lease exists."""

    attempt: int


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt is computed."""

    attempt: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    handle: bytes = b""
    kv: KvReport | None = None


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """The decode worker's new tokens; `error` comes with FinishReason.ERROR.

    `moving`: the worker wants to be rid of the request, and goes on with it meanwhile.
    """

    attempt: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: TandemError | None = None
    kv: KvReport | None = None
    moving: bool = False


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """A worker will do no more for this attempt: it refused, broke, died or went silent.

    `unreachable`: it could not be reached, or its stream broke. `ended`: it holds nothing for the
    attempt any more; false for a silent one, which has to be told.
    """

    attempt: int
    role: Role
    error: TandemError
    unreachable: bool = False
    ended: bool = True


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The client cancelled or disconnected; any other reason code: the frontend gave it up."""

    reason: str = CancelledError.reason


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The request's time is up."""


Event = (
    Placed
    | Unplaced
    | PrefillAccepted
    | PrefillDone
    | DecodeOutput
    | WorkerFailed
    | ClientGone
    | DeadlinePassed
)


# Commands, to be carried out in order.


@dataclass(frozen=True, slots=True)
class Place:
    """Ask the coordinator; answer with Placed or Unplaced."""

    attempt: int
    exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CancelPlace:
    """Nobody waits for that placement any more."""

    attempt: int


@dataclass(frozen=True, slots=True)
class StartPrefill:
    """Run prompt and tokens so far on this worker; it may take their start from `prefix`."""

    attempt: int
    worker: Worker
    prefix: KvPrefix | None = None


@dataclass(frozen=True, slots=True)
class StartDecode:
    """Have this worker generate, its KV coming from `source` (under the attempt's lease).

    Without a source it computes the prompt, and may take its start from `prefix`.
    """

    attempt: int
    worker: Worker
    source: Worker | None
    prefix: KvPrefix | None = None


@dataclass(frozen=True, slots=True)
class Proceed:
    """Tell the decode worker what prefill found."""

    attempt: int
    worker: Worker
    token_ids: tuple[int, ...]
    handle: bytes


@dataclass(frozen=True, slots=True)
class CancelPrefill:
    """End the prefill call."""

    attempt: int


@dataclass(frozen=True, slots=True)
class CancelDecode:
    """Tell the decode worker to drop the attempt."""

    attempt: int
    worker: Worker


@dataclass(frozen=True, slots=True)
class Release:
    """Let the prefill worker drop the attempt's lease: perhaps no sink will come for it."""

    attempt: int
    worker: Worker


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the coordinator that a placement's attempt is over.

    With no `failed_worker`, none failed it, and `failure` is why the attempt ended early, if it
    did: the client's deadline, the client gone, its worker leaving. `ttft_seconds`: from the
    placement; 0: no token came. `computed_tokens`: of the context, by whichever worker.
    """

    attempt: int
    failed_worker: str = ""
    failure: str = ""
    unreachable: bool = False
    generated_tokens: int = 0
    ttft_seconds: float = 0.0
    computed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Emit:
    """Give the client these tokens and this text. Either may be empty."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The request is complete."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ends with this error."""

    error: TandemError


Command = (
    Place
    | CancelPlace
    | StartPrefill
    | StartDecode
    | Proceed
    | CancelPrefill
    | CancelDecode
    | Release
    | Report
    | Emit
    | Finish
    | Fail
)
