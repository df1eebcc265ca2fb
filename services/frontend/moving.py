"""Moving a request that runs to another worker without a gap in its stream. Pure.

A worker that leaves says so (`moving`) and goes on. Meanwhile the request is placed a second time,
and a successor begins on another decode worker:

 1. It takes the KV from the old worker, which has all of it: as a prefix, straight, so that no
    prefill worker is needed. What does not come it computes.
 2. When its first token is there, so is its KV; but the old worker has generated on. If that is
    more than CLOSE tokens, it begins anew on the same worker with all tokens known by then: all
    but the last of them it finds in its cache, so this round is one step. Each round leaves it
    less behind; after ROUNDS of them it is taken as it is.
 3. Then its tokens count and the old worker is told to stop. Tokens are a function of seed and
    position, so those that both generated are equal, and dropped by position.
 4. Should two not be equal (workers whose numerics differ), the client has the old one's: the
    successor begins anew behind it, or is dropped.
 5. If the old worker dies or hands the request back, the successor takes over as it is. If the
    successor fails, the old one goes on, and after RETRY_SECONDS there is another.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import replace

from services.engine.api import KvPrefix
from services.frontend.events import Placement, Worker

CLOSE = 3
"""Tokens behind that are made good faster by generating them than by another round."""
ROUNDS = 4
RETRY_SECONDS = 1.0


class Step(enum.Enum):
    """What to do about tokens of a worker that may be behind."""

    TAKE = "take what is new of them"
    AGAIN = "begin anew with all that is known"
    DROP = "give it up"


def judge(
    known: Sequence[int],
    at: int,
    token_ids: Sequence[int],
    ended: bool,
    *,
    rounds: int,
    alone: bool,
) -> Step:
    """Of tokens for the places from `at` on, where the client has `known`.

    `ended`: they are its last. `alone`: nobody else generates, so there is no falling behind.
    """
    behind = len(known) - at - len(token_ids)
    agrees = list(known[at : at + len(token_ids)]) == list(token_ids[: len(known) - at])
    if ended and (behind > 0 or not agrees):
        return Step.DROP
    if agrees and behind <= CLOSE:
        return Step.TAKE
    if alone or rounds < ROUNDS:
        return Step.AGAIN
    return Step.TAKE if agrees else Step.DROP


def handover(placement: Placement, old: Worker, tokens: int) -> Placement:
    """The placement of a successor, which takes the KV of `tokens` tokens from the old worker."""
    return replace(
        placement,
        prefill=None,
        prefix=KvPrefix(old.worker_id, old.address, tokens),
        reasons=(*placement.reasons, f"moves away from {old.worker_id}, which has its KV"),
    )
