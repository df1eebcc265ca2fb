"""Guides are tried before anything else is asked for a request."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from services.engine.api import Guide
from services.engine.guides.grammar import FIELDS, check_size
from services.engine.guides.trial import Trial
from services.frontend.model import Model
from services.runtime.errors import InvalidRequestError

REMEMBERED = 256
"""Guides that were found good: many requests come with the same ones."""


class Guides:
    """Of one model. Guides are tried one after the other, in another process.

    `most_bytes`: of a guide's texts. `seconds`: what one may take.
    """

    def __init__(self, model: Model, most_bytes: int, seconds: float) -> None:
        self._model = model
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._good: OrderedDict[Guide, None] = OrderedDict()
        self._trial: Trial | None = None
        self._thread = ThreadPoolExecutor(1, "guides")

    async def check(self, guide: Guide) -> None:
        """Raises InvalidRequestError for a guide that can't be enforced, or takes too much."""
        if guide not in self._good:
            check_size(guide)
            size = sum(len(text.encode()) for text in guide.texts)
            if size > self._most_bytes:
                allowed = f"at most {self._most_bytes} bytes (frontend.guide_bytes)"
                raise InvalidRequestError(FIELDS[guide.kind], f"{size} bytes", allowed)
            await asyncio.get_running_loop().run_in_executor(self._thread, self._try, guide)
        self._good[guide] = None
        self._good.move_to_end(guide)
        if len(self._good) > REMEMBERED:
            self._good.popitem(last=False)

    async def close(self) -> None:
        """Ends the process that guides are tried in."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _try(self, guide: Guide) -> None:
        if self._trial is None:
            model = self._model
            if not model.eos_token_ids:
                allowed = "this model has no end-of-sequence token to end with"
                raise InvalidRequestError("sampling.guide", "a guide", allowed)
            self._trial = Trial(model.tokens, model.vocabulary, model.eos_token_ids, self._seconds)
        self._trial.check(guide)

    def _close(self) -> None:
        if self._trial is not None:
            self._trial.close()
