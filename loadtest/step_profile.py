"""Where an engine step's time goes: `tandem bench profile`.

The whole engine runs, requests and all, on its own step thread. What it calls to compute is wrapped
while the profile is taken, and untouched otherwise: so nothing is paid for it in serving. What no
wrapper accounts for is Python: planning, arrays, bookkeeping, calls, and waiting for the GIL.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from services.engine.stepped import choosing
from services.engine.stepped.drafts import Drafting
from services.engine.stepped.step import Stepper
from services.engine.torch.kernels.int4 import Int4Linear
from services.engine.torch.kernels.linear import Linear
from services.engine.torch.kernels.team import Call
from services.engine.torch.parallel.mesh import Mesh

PYTHON = "Python"
LINEAR, ATTENTION, EXPERTS, ROWS = "linear layers", "attention", "experts", "norms, activations"
EXCHANGE, SAMPLING, DRAFTS = "all-to-all", "sampling", "drafts"
PARTS = (LINEAR, ATTENTION, EXPERTS, ROWS, EXCHANGE, SAMPLING, DRAFTS, PYTHON)

# Kernels by the module they stand in; any other is of rows.
_KERNELS = {"attention": ATTENTION, "experts": EXPERTS, "route": EXPERTS}


@dataclass(slots=True)
class Step:
    """One turn of the step thread's loop; seconds by part."""

    sequences: int = 0
    rows: int = 0
    longest: int = 0
    """Rows of the sequence with most."""
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def python(self) -> float:
        """What no part accounts for."""
        return self.seconds - sum(self.parts.values())


class Recorder:
    """Collects steps. Called on the step thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps: list[Step] = []
        self._clock = clock
        self._began = 0.0
        self._step = Step()
        self._within = ""
        self._timing = False

    def begin(self) -> None:
        """A turn begins, so the one before has ended; one without work is dropped."""
        now = self._clock()
        if self._step.sequences:
            self._step.seconds = now - self._began
            self.steps.append(self._step)
        self._step, self._began = Step(), now

    def planned(self, counts: list[int]) -> None:
        """What the step computes: rows of each sequence."""
        if counts:
            self._step.sequences, self._step.rows = len(counts), sum(counts)
            self._step.longest = max(counts)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, its time booked on the part, or on the stage that it is called within."""

        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._timing:  # a part of a part
                return call(*args, **kwargs)
            self._timing, start = True, self._clock()
            try:
                return call(*args, **kwargs)
            finally:
                self._step.parts[self._within or part] += self._clock() - start
                self._timing = False

        return wrapped

    def stage(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call; whatever is timed within it is booked on the stage, the rest is Python."""

        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            outer, self._within = self._within, self._within or part
            try:
                return call(*args, **kwargs)
            finally:
                self._within = outer

        return wrapped

    def kernel(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Call.run, booked by the kernel's module."""
        by_part = {part: self.timed(part, run) for part in (ATTENTION, EXPERTS, ROWS)}

        @functools.wraps(run)
        def wrapped(call: Call, threads: int) -> None:
            latent = call.module.startswith("latent")
            part = ATTENTION if latent else _KERNELS.get(call.module, ROWS)
            by_part[part](call, threads)

        return wrapped


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Wraps what an engine of this process calls. Models loaded before are measured too."""

    def begun(plan: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(stepper: Stepper) -> Any:
            recorder.begin()
            found = plan(stepper)
            recorder.planned([work.rows for work in found.work])
            return found

        return wrapped

    with ExitStack() as ends:

        def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
            was = getattr(owner, name)
            ends.callback(setattr, owner, name, was)
            setattr(owner, name, make(was))

        replace(Stepper, "plan", begun)
        for name in ("choose", "token_of"):
            replace(choosing, name, functools.partial(recorder.timed, SAMPLING))
        replace(Drafting, "draft", functools.partial(recorder.stage, DRAFTS))
        replace(Linear, "__call__", functools.partial(recorder.timed, LINEAR))
        replace(Int4Linear, "__call__", functools.partial(recorder.timed, LINEAR))
        replace(Mesh, "exchange", functools.partial(recorder.timed, EXCHANGE))
        replace(Call, "run", recorder.kernel)
        yield
