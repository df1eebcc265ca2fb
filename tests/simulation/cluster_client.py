"""A client: what it asks for, every token it has to get, and whether its end is justified."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from services.engine.api import FinishReason, Sampling
from services.frontend.validate import Wishes
from tests.simulation.cluster_engine import token_after

NEVER = frozenset({"DUPLICATE_REQUEST", "UNKNOWN_MODEL", "INTERNAL", "CANCELLED", "DRAINING"})
"""No client may ever see these here."""


class StopAt:
    """A text whose stop string is complete with the n-th token."""

    def __init__(self, n):
        self.left = n
        self.stopped = False

    def push(self, token_ids):
        if self.stopped or len(token_ids) < self.left:
            self.left -= len(token_ids)
            return len(token_ids), ""
        self.stopped = True
        return self.left, ""

    def finish(self):
        return ""


@dataclass(eq=False)
class Client:
    """One request. `deadline`: on the world's clock."""

    world: object
    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    deadline: float
    stop_at: int = 1 << 30
    wishes: Wishes = field(default_factory=Wishes)
    asked: float = 0.0
    got: int = 0
    ended: str = ""
    told: bool = False
    """Its frontend says that it ended."""
    frontend: object = None
    expected: list[int] = field(default_factory=list)
    reason: FinishReason = FinishReason.LENGTH

    def __post_init__(self):
        sampling, at, token = self.sampling, len(self.prompt), self.prompt[-1]
        for count in range(1, sampling.max_tokens + 1):
            token = token_after(sampling.seed, at, token)
            at += 1
            self.expected.append(token)
            if token in sampling.stop_token_ids or count == self.stop_at:
                self.reason = FinishReason.STOP
                break
        self.text = partial(StopAt, self.stop_at)

    def tokens(self, token_ids):
        """Tokens arrive."""
        assert not self.told, f"{self.id} gets tokens after its end ({self.ended})"
        new = list(token_ids)
        have, self.got = self.got, self.got + len(new)
        assert self.expected[have : self.got] == new, f"{self.id}: wrong tokens from {have} on"
        self.world.count["tokens checked"] += len(new)

    def finished(self, reason):
        """The end, as it should be."""
        self._end("finished")
        assert self.got == len(self.expected), f"{self.id} has {self.got} of {len(self.expected)}"
        assert reason is self.reason, f"{self.id} ends with {reason}"

    def failed(self, error, live):
        """The end, as it may be if there is a good reason."""
        self._end(f"failed: {error.reason}")
        self.world.note(self.id, "fails:", error.reason, error.message)
        why = self.world.unjustified(self, error, live)
        assert not why, f"{self.id} fails with {error.reason} ({error.message}): {why}"

    def cut_off(self):
        """Its frontend died."""
        self._end("cut off")

    def cancel(self):
        """It goes away."""
        if not self.ended and self.frontend is not None:
            self._end("cancelled")
            self.frontend.after(0.001, self.frontend.client_gone, self)

    def _end(self, how):
        assert not self.told, f"{self.id} ends twice: {self.ended}, then {how}"
        self.told = how != "cancelled"
        if self.ended:
            return  # It had gone away, and its frontend did not know yet.
        self.ended = how
        self.world.count[f"requests {how}"] += 1
        self.world.ended(self)
