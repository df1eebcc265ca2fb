"""What came of a fetch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.errors import CorruptBlockError

Progress = Callable[[int], None]
"""Called on the event loop with the index of each key whose block is complete and verified."""


@dataclass(frozen=True, slots=True)
class FetchReport:
    """A fetch that ended with every block complete or corrupt. Times by the endpoint's clock.

    The part of it that a request waited for is what lay after its prefill had ended: exposed =
    max(0, ended - the time when prefill was known to have ended).
    """

    transport: str
    why: str
    """Why this transport, in words."""
    bytes: int
    """Bytes verified and in place."""
    complete: tuple[bool, ...]
    """Per key: the block arrived whole and verified. False: its bytes were corrupt, twice."""
    corrupt_blocks: int
    started: float
    first_bytes: float | None
    """When the first piece was verified; None if there was none."""
    ended: float
    """When the last piece was verified."""

    @property
    def blocks(self) -> int:
        """Blocks complete."""
        return sum(self.complete)

    @property
    def seconds(self) -> float:
        """From the request to the last verified piece."""
        return self.ended - self.started

    def require_sound(self) -> None:
        """For who has no other way to the content. Raises CorruptBlockError that names blocks."""
        if self.corrupt_blocks:
            wrong = [i for i, whole in enumerate(self.complete) if not whole]
            raise CorruptBlockError(
                f"{len(wrong)} of {len(self.complete)} blocks were corrupt, twice over",
                indices=",".join(map(str, wrong)),
                transport=self.transport,
            )
