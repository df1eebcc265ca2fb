"""What became of one request, as the client saw it, and the latencies that follow from it.

Times are seconds of one clock of this process. docs/loadtest.md defines the terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

OK = ""
"""The reason of a request that ended well."""

UNFINISHED = "UNFINISHED"
"""Still running when the run's time to finish was over."""
INTERRUPTED = "INTERRUPTED"
"""Still running when a person ended the run; not counted as an error."""
TRUNCATED = "TRUNCATED"
"""The stream ended with status OK and yet without an answer's end."""
WRONG_COUNT = "WRONG_COUNT"
"""Other than as many tokens came as usage says, or as were asked for with ignore_eos."""


@dataclass(frozen=True, slots=True)
class Served:
    """What the server's last message says about the request."""

    completion_tokens: int
    cached_tokens: int
    attempts: int
    """Placements; more than one if a worker was lost on the way."""
    local_prefill: bool
    """The decode worker computed the prompt itself in the last attempt."""
    kv_bytes: Mapping[str, int]
    """KV bytes fetched, by transport."""
    kv_seconds: float
    """Of fetching."""
    kv_exposed_seconds: float
    """Of it, what was left when prefill had ended."""
    lost_fetches: int = 0
    """Fetches that did not bring all that they were for; the rest was computed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, ended."""

    index: int
    intended: float
    """When it should have begun; latencies count from here."""
    sent: float
    """When it did."""
    ended: float
    prompt_tokens: int
    arrivals: tuple[tuple[float, int], ...]
    """(time, tokens) of each message that brought tokens."""
    reason: str = OK
    """Reason code of the failure, or OK."""
    served: Served | None = None

    @property
    def ok(self) -> bool:
        """It ended well."""
        return self.reason == OK

    @property
    def lateness(self) -> float:
        """How late the load generator was to send it."""
        return self.sent - self.intended

    @property
    def output_tokens(self) -> int:
        """Tokens that came."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float | None:
        """Time to first token; None if none came."""
        return self.arrivals[0][0] - self.intended if self.arrivals else None

    @property
    def e2e(self) -> float:
        """From the intended start to the end of the stream."""
        return self.ended - self.intended

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: between messages that brought tokens, one after the other."""
        return [after - before for (before, _), (after, _) in pairwise(self.arrivals)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first message; None where no token followed it."""
        if not self.arrivals:
            return None
        later = self.output_tokens - self.arrivals[0][1]
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None


@dataclass(slots=True)
class Progress:
    """A request under way; whoever runs it fills this in, and an Outcome is made at the end."""

    index: int
    intended: float
    prompt_tokens: int
    sent: float | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    served: Served | None = None

    def end(self, now: float, reason: str) -> Outcome:
        """The request as it stands."""
        sent = now if self.sent is None else self.sent
        arrivals = tuple(self.arrivals)
        return Outcome(
            self.index, self.intended, sent, now, self.prompt_tokens, arrivals, reason, self.served
        )
