"""What a load test is told: everything that a report must repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loadtest.measures import Slo
from loadtest.workload import SamplingSpec

Loop = Literal["open", "closed"]
ArrivalProcess = Literal["poisson", "constant", "trace"]


@dataclass(frozen=True, slots=True)
class Load:
    """When requests start, and when the run ends."""

    loop: Loop = "closed"
    users: int = 4
    """Closed loop: requests under way at once."""
    think_seconds: float = 0.0
    """Closed loop: mean pause of a user between answer and next request."""
    arrivals: ArrivalProcess = "poisson"
    """Open loop."""
    rate: float = 0.0
    """Open loop, not trace: requests a second."""
    speed: float = 1.0
    """Open loop, trace: 2 plays it in half the time."""
    jitter_seconds: float = 0.0
    """Open loop, trace: spreads coarse timestamps."""
    requests: int = 200
    seconds: float = 60.0
    finish_seconds: float = 60.0
    timeout_seconds: float = 120.0
    """Deadline of one request."""
    warmup: int = 4
    """Requests made one after another before anything is measured."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What requests ask; lengths as loadtest.lengths.parse reads them."""

    input_tokens: str = "256"
    output_tokens: str = "64"
    prefix_share: float = 0.0
    prefix_tokens: int = 0
    prefixes: int = 1
    trace: str = ""
    """File whose lengths and shared prefixes are used instead."""
    scale: float = 1.0
    max_input: int | None = None
    max_output: int | None = None
    first_token: int = 100
    end_token: int = 30_000
    sampling: SamplingSpec = field(default_factory=SamplingSpec)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """One load test."""

    address: str
    """host:port of the frontend."""
    seed: int
    model: str = ""
    load: Load = field(default_factory=Load)
    prompts: Prompts = field(default_factory=Prompts)
    slo: Slo | None = None
    pids: Mapping[str, int] = field(default_factory=dict)
    """Processes whose CPU time and memory are measured, by name."""
    rows: bool = False
    """Keep one row for each request in the report."""
