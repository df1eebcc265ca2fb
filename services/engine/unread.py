"""What an engine has said of its requests and nobody has read yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from services.engine.api import StepOutput, TokenOutput


class Unread:
    """Steps in order. For one event loop and one reader at a time."""

    def __init__(self) -> None:
        self._steps: deque[StepOutput] = deque()
        self._ended = False
        self._changed = asyncio.Event()

    def say(self, outputs: Sequence[TokenOutput]) -> None:
        """Everything that one step brought; nothing is no step."""
        if outputs:
            self._steps.append(StepOutput(tuple(outputs)))
            self._changed.set()

    def drop(self, request_id: str) -> None:
        """A request was cancelled: its outputs must not be taken for those of its successor."""
        left = (
            replace(step, outputs=tuple(o for o in step.outputs if o.request_id != request_id))
            for step in self._steps
        )
        self._steps = deque(step for step in left if step.outputs)

    def end(self) -> None:
        """Nothing more is said. Idempotent."""
        self._ended = True
        self._changed.set()

    async def read(self) -> AsyncIterator[StepOutput]:
        """All that is said, until the end."""
        while True:
            while self._steps:
                yield self._steps.popleft()
            if self._ended:
                return
            self._changed.clear()
            await self._changed.wait()
