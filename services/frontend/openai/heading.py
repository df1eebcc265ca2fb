"""What all messages of an answer say of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heading:
    """`name`: the request's id. `created`: Unix time, seconds. `tier`: as served."""

    name: str
    created: int
    model: str
    fingerprint: str
    tier: str = ""

    def call_id(self, choice: int, call: int) -> str:
        """Of the call-th call of an answer: no other call of any request has it."""
        return f"call_{self.name}_{choice}_{call}"
