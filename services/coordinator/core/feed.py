"""Following one worker's KV events: which message is the next one, and what a gap leads to.

gRPC keeps a stream's order, so a gap means that the worker (or what stands between) lost something.
Then a snapshot is asked for, and whatever arrives before it is void.

| state     | message                           | verdict | then      |
|-----------|-----------------------------------|---------|-----------|
| any       | a snapshot that starts anew (1)   | REPLACE | FOLLOWING |
| AWAITING  | anything else                     | IGNORE  | AWAITING  |
| FOLLOWING | a sequence seen already           | IGNORE  | FOLLOWING |
| FOLLOWING | a later snapshot, gap or none     | REPLACE | FOLLOWING |
| FOLLOWING | the next changes                  | APPLY   | FOLLOWING |
| FOLLOWING | later changes                     | RESYNC  | AWAITING  |

While AWAITING, another snapshot than the one asked for is void too: it was on its way before the
worker started its numbers anew, and following those old numbers would lead astray.

While AWAITING, the snapshot is asked for again every `patience` seconds: the question may have been
lost.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Verdict(enum.Enum):
    """What to do with a message."""

    REPLACE = "forget what was known, then apply"
    APPLY = "apply"
    IGNORE = "ignore"
    RESYNC = "ignore, and ask for a snapshot"


@dataclass(slots=True)
class KvFeed:
    """One worker's stream of KV events, from its Hello on."""

    patience: float
    asked: float
    """When a snapshot was asked for last; a Hello is such a question."""
    sequence: int | None = None
    """Of the last message applied; None: AWAITING a snapshot."""

    def accept(self, sequence: int, snapshot: bool, now: float) -> Verdict:
        """Judges a message, by the table above."""
        if snapshot and sequence == 1:
            self.sequence = 1
            return Verdict.REPLACE
        if self.sequence is None or sequence <= self.sequence:
            return Verdict.IGNORE
        if snapshot:
            self.sequence = sequence
            return Verdict.REPLACE
        if sequence == self.sequence + 1:
            self.sequence = sequence
            return Verdict.APPLY
        self.sequence, self.asked = None, now
        return Verdict.RESYNC

    def overdue(self, now: float) -> bool:
        """Whether it is time to ask again; if so, takes it that the caller does."""
        if self.sequence is None and now - self.asked >= self.patience:
            self.asked = now
            return True
        return False
