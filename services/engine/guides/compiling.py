"""Compiles the guides of an engine's requests, off its step thread and off the event loop."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from services.engine.api import Guide, Request
from services.engine.guides.guided import Guided
from services.engine.guides.threads import deep_threads
from services.engine.guides.turns import Turns
from services.engine.guides.vocabulary import Vocabulary
from services.runtime.errors import InvalidRequestError

Tokens = Callable[[], Sequence[bytes]]
"""The bytes of every token by id, none for control tokens. Slow: a tokenizer's file is read."""

AT_ONCE = 4
"""Guides that are compiled at a time. A slow one takes a core for as long as frontends allow it
(frontend.guide_seconds)."""
KEPT_BYTES = 2**19
"""Of texts of guides that stay compiled, the last ones used: most requests have one of few. What
is compiled takes some 70 times as much."""
LEAST_BYTES = 2**11
"""That a guide counts for."""


class Guides:
    """Of one model. The vocabulary is built with the first guide: most engines never see one.

    `size`: logits that a position has. No `tokens`: the engine has no tokenizer, and refuses
    guides. Belongs to the event loop.
    """

    def __init__(self, tokens: Tokens | None, size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokens = tokens
        self._size = size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        """Of the next two."""
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[Guide, Guided] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._turns = Turns(AT_ONCE)

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
        await self._turn(request.tenant)
        if self._threads is None:
            self._threads = deep_threads("guides", AT_ONCE)
        working = asyncio.get_running_loop().run_in_executor(self._threads, self._begin, request)
        # Cancelled or not, the place is taken until the thread is free again.
        working.add_done_callback(functools.partial(self._done, request.tenant))
        return await asyncio.shield(working)

    def close(self) -> None:
        """Lets go of the threads, once they have done what they are at."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, tenant: str) -> None:
        """Waits for one; whoever has it says _done()."""
        come = asyncio.get_running_loop().create_future()

        def begin() -> None:
            if not come.done():  # cancelled, of which the waiting one is not told yet
                come.set_result(None)

        self._turns.take(tenant, begin)
        try:
            await come
        except asyncio.CancelledError:
            if not self._turns.drop(tenant, begin):
                self._turns.done(tenant)
            raise

    def _done(self, tenant: str, working: asyncio.Future[Guided]) -> None:
        if not working.cancelled():
            working.exception()  # Nobody else may ask for it.
        self._turns.done(tenant)

    def _begin(self, request: Request) -> Guided:
        guide = request.sampling.guide
        assert guide is not None
        with self._lock:
            vocabulary = self._of_model()
            kept = self._kept.get(guide)
        form = Guided(vocabulary, guide) if kept is None else kept
        self._keep(guide, form)
        guided, ends = form.again(), vocabulary.eos_token_ids
        if request.output_token_ids and request.output_token_ids[-1] not in ends:
            guided.accept(request.output_token_ids)
            guided.masks()
        if guided.failure is not None:
            raise guided.failure
        return guided

    def _of_model(self) -> Vocabulary:
        if self._vocabulary is None:
            assert self._tokens is not None
            self._vocabulary = Vocabulary(self._tokens(), self._size, self._eos_token_ids)
        return self._vocabulary

    def _keep(self, guide: Guide, form: Guided) -> None:
        """Puts it in front of those kept, and drops the last ones beyond KEPT_BYTES."""
        with self._lock:
            self._kept[guide] = form
            self._kept.move_to_end(guide)
            while sum(map(_bytes, self._kept)) > KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)


def _bytes(guide: Guide) -> int:
    return LEAST_BYTES + sum(map(len, guide.texts))
