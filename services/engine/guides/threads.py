"""Threads for what llguidance does."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from services.engine.guides.guided import Guided, Masks

STACK_BYTES = 2**29
"""The library follows references by recursion, and a stack that is too small ends the process: this
is enough for any that MAX_TEXT_BYTES hold. Memory is taken as it is used."""

_starting = threading.Lock()


def deep_thread(name: str) -> ThreadPoolExecutor:
    """One thread with a stack of STACK_BYTES, which has begun."""
    executor = ThreadPoolExecutor(1, name)
    with _starting:
        before = threading.stack_size(STACK_BYTES)
        try:
            executor.submit(lambda: None).result()
        finally:
            threading.stack_size(before)
    return executor


class MaskThread:
    """Computes masks beside the forward pass. The library lets go of the interpreter lock.

    Guided.masks() may compile its guide again, so it is called on a thread as the first time.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    def begin(
        self, wanted: Iterable[tuple[int, Guided, tuple[int, ...]]]
    ) -> Future[Mapping[int, Masks]]:
        """For each (serial, guided, drafts) its masks, by serial.

        Until they are there nothing else may be done with these sequences.
        """
        asked = list(wanted)
        if asked:
            return self._deep().submit(_masks, asked)
        nothing: Future[Mapping[int, Masks]] = Future()
        nothing.set_result({})
        return nothing

    def now(self, guided: Guided, drafts: tuple[int, ...] = ()) -> Masks:
        """Those of one, waited for."""
        return self._deep().submit(guided.masks, drafts).result()

    def _deep(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = deep_thread("guide-masks")
        return self._executor


def _masks(asked: list[tuple[int, Guided, tuple[int, ...]]]) -> dict[int, Masks]:
    return {serial: guided.masks(drafts) for serial, guided, drafts in asked}
