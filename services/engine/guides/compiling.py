"""Compiles the guides of an engine's requests, off its step thread and off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from services.engine.api import Request
from services.engine.guides.guided import Guided
from services.engine.guides.threads import deep_thread
from services.engine.guides.vocabulary import Vocabulary
from services.runtime.errors import InvalidRequestError

Tokens = Callable[[], Sequence[bytes]]
"""The bytes of every token by id, none for control tokens. Slow: a tokenizer's file is read."""


class Guides:
    """Of one model. The vocabulary is built with the first guide: most engines never see one.

    `size`: logits that a position has. No `tokens`: the engine has no tokenizer, and refuses
    guides.
    """

    def __init__(self, tokens: Tokens | None, size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokens = tokens
        self._size = size
        self._eos_token_ids = eos_token_ids
        self._vocabulary: Vocabulary | None = None
        self._thread: ThreadPoolExecutor | None = None

    def check(self, request: Request) -> None:
        """Whether a request's guide may be asked for here. Raises InvalidRequestError."""
        if request.sampling.guide is None:
            return
        if self._tokens is None:
            raise InvalidRequestError("sampling.guide", "a guide", "this engine has no tokenizer")
        if request.sampling.ignore_eos:
            raise InvalidRequestError("sampling.ignore_eos", True, "not with a guide")

    async def begin(self, request: Request) -> Guided:
        """The request's form, its earlier output followed.

        Raises InvalidRequestError for a guide that can't be enforced, GuideFailedError for output
        that does not have the form, and what reading the tokenizer raises.
        """
        if self._thread is None:
            self._thread = deep_thread("guides")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._begin, request)

    def close(self) -> None:
        """Lets go of the thread, once it has done what it is at."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, request: Request) -> Guided:
        assert self._tokens is not None
        assert request.sampling.guide is not None
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._tokens(), self._size, self._eos_token_ids)
        guided = Guided(self._vocabulary, request.sampling.guide)
        ends = self._vocabulary.eos_token_ids
        if request.output_token_ids and request.output_token_ids[-1] not in ends:
            guided.accept(request.output_token_ids)
            guided.masks()
        if guided.failure is not None:
            raise guided.failure
        return guided
