"""How long a worker may be silent while it owes something, by what it has done so far. Pure.

Two silences are told apart, because they say different things:

    of the process   nothing at all came over the connection, not even the answer to a ping: it is
                     stopped, starved or cut off. `silence_seconds`, with the ping sent halfway.
    of the engine    pings are answered and no token comes. K times what it takes otherwise: from
                     token to token as measured on that connection, or by the prompt tokens that it
                     was seen to compute a second, or as the coordinator predicted, whichever is
                     longest. At least LEAST_ROUNDS times silence_seconds, since a step with a long
                     prompt of somebody else may take that; at most `stall_seconds`, and the
                     time that the prompt takes at SLOWEST_PREFILL. Where nothing is measured or
                     predicted, that most.

What a connection brings for one request says that its engine moves, and counts for all of them.
Time in which this process itself did not run counts for nobody (`awake_since`).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from services.frontend.events import Role, Worker

K = 10.0
LEAST_ROUNDS = 2.5

PASSED_OVER = 4.0
"""Times stall_seconds that a stream may stand still while its worker goes on with others: it may be
preempted, but not forgotten."""

SLOWEST_PREFILL = 200.0
"""Tokens a second."""

_WEIGHT = 0.1
_DEVIATIONS = 4.0
_PEAK_SHARE = 0.5
_PEAK_HALVES_IN = 60.0
_SHORT_PROMPT = 128
"""Computed tokens below which a prompt says what the way there takes, not what its tokens do."""
_SOON = 0.01


class Owed(enum.Enum):
    """What a worker owes a request."""

    ACCEPTANCE = "an answer to a prompt"
    PROMPT = "a prompt's first token"
    FIRST_TOKEN = "its first token"
    TOKEN = "its next token"
    KV = "a prompt's KV"


@dataclass(frozen=True, slots=True)
class Debt:
    """What a worker owes an attempt since `since`, seconds.

    `tokens`: those it may have to compute first. `predicted`: seconds it was to take; 0: unknown.
    """

    attempt: int
    role: Role
    worker: Worker
    owed: Owed
    since: float
    tokens: int = 0
    predicted: float = 0.0


@dataclass(slots=True)
class Rhythm:
    """Seconds from token to token: a moving average, its mean deviation, the longest of late."""

    mean: float = 0.0
    deviation: float = 0.0
    _peak: float = 0.0
    _peak_at: float = 0.0

    def note(self, seconds: float, now: float) -> None:
        """A step that took this long has just ended."""
        if not self.mean:
            self.mean = seconds
        self.deviation += _WEIGHT * (abs(seconds - self.mean) - self.deviation)
        self.mean += _WEIGHT * (seconds - self.mean)
        self._peak, self._peak_at = max(seconds, self._faded(now)), now

    def expected(self, now: float) -> float:
        """What the next one may well take; 0 before the first."""
        return max(self.mean + _DEVIATIONS * self.deviation, _PEAK_SHARE * self._faded(now))

    def _faded(self, now: float) -> float:
        return self._peak * math.exp2((self._peak_at - now) / _PEAK_HALVES_IN)


@dataclass(slots=True)
class Pace:
    """Seconds that prompts take, waiting included: rises at once, falls slowly."""

    _base: float = 0.0
    _per_token: float = 0.0

    def note(self, computed_tokens: int, seconds: float) -> None:
        """A prompt of which so many tokens were computed took this long."""
        if computed_tokens < _SHORT_PROMPT:
            self._base = _followed(self._base, seconds)
        else:
            self._per_token = _followed(self._per_token, seconds / computed_tokens)

    def expected(self, tokens: int) -> float:
        """What a prompt with so many tokens to compute may well take; 0 before one like it."""
        if tokens >= _SHORT_PROMPT and not self._per_token:
            return 0.0
        if not self._base:
            return self._per_token * max(tokens, _SHORT_PROMPT)
        return self._base + self._per_token * tokens


def _followed(value: float, seen: float) -> float:
    return seen if seen > value else value + _WEIGHT * (seen - value)


@dataclass(slots=True)
class Heard:
    """What a connection to a worker has brought, and when; seconds."""

    at: float = -math.inf
    """Anything."""
    moved_at: float = -math.inf
    """Something that only a running engine gives."""
    pinged_at: float = -math.inf
    rhythm: Rhythm = field(default_factory=Rhythm)
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True, slots=True)
class Verdict:
    """About one debt. `silent`: in words, why the worker is given up; empty: it is not.

    `unreachable`: its process does not answer either.
    """

    again_at: float
    silent: str = ""
    unreachable: bool = False
    ping: bool = False


@dataclass(frozen=True, slots=True)
class Patience:
    """The bounds; seconds."""

    silence_seconds: float
    stall_seconds: float

    @property
    def look_seconds(self) -> float:
        """How often to look at least, while something may be owed."""
        return min(self.silence_seconds, self.stall_seconds) / 2

    def judge(self, debt: Debt, heard: Heard, awake_since: float, now: float) -> Verdict:
        """Whether the worker is to be waited for, and until when without another look."""
        begun = max(debt.since, awake_since)
        moved = max(begun, self._moved_at(debt, heard))
        stuck_at = moved + self.bound(debt, heard, now)
        if debt.owed is Owed.TOKEN and begun + PASSED_OVER * self.stall_seconds < stuck_at:
            moved, stuck_at = begun, begun + PASSED_OVER * self.stall_seconds
        quiet_since = max(begun, heard.at)
        half = self.silence_seconds / 2
        pinged = heard.pinged_at >= quiet_since
        dead_at = max(quiet_since + 2 * half, heard.pinged_at + half) if pinged else math.inf
        who = debt.worker.worker_id
        if now >= dead_at:
            words = f"{who} owes {debt.owed.value} and answers nothing for"
            return Verdict(now, f"{words} {now - quiet_since:.1f} s", unreachable=True)
        if now >= stuck_at:
            words = f"{who} is there and owes {debt.owed.value} for"
            return Verdict(now, f"{words} {now - moved:.1f} s")
        ping = not pinged and now >= quiet_since + half
        look = now + half if ping else dead_at if pinged else quiet_since + half
        return Verdict(max(min(look, stuck_at), now + _SOON), ping=ping)

    def bound(self, debt: Debt, heard: Heard, now: float) -> float:
        """Seconds that an engine may bring nothing although its process is there."""
        most = self.stall_seconds
        least = min(LEAST_ROUNDS * self.silence_seconds, most)
        match debt.owed:
            case Owed.KV:
                # Whether KV moves is for the sink to see; who is to send it has to be there.
                return math.inf
            case Owed.ACCEPTANCE:
                return least
            case Owed.FIRST_TOKEN:
                # It may have gigabytes to fetch first, of which nothing is known here.
                return most
            case Owed.PROMPT:
                most += debt.tokens / SLOWEST_PREFILL
                expected = heard.pace.expected(debt.tokens)
            case Owed.TOKEN:
                expected = heard.rhythm.expected(now)
        expected = max(expected, debt.predicted)
        return min(max(K * expected, least), most) if expected else most

    def _moved_at(self, debt: Debt, heard: Heard) -> float:
        # A prompt is taken on by the process, whatever its engine does.
        return -math.inf if debt.owed is Owed.ACCEPTANCE else heard.moved_at
