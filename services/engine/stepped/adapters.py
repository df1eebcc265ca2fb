"""LoRA adapters of a stepped engine: the event loop's side.

Files are read and made into weights on a thread of their own; the step thread takes the weights in
and drops them between two steps, by commands in the inbox. So whoever is submitted after an adapter
was taken in finds it there, and whoever was cancelled before it is dropped is gone by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.engine.adapters import (
    LINGER_SECONDS,
    Adapter,
    AdapterBooks,
    AdapterFiles,
    AdapterLimits,
    AdapterStatus,
    check_name,
    folder_within,
    named_paths,
    read_files,
)
from services.engine.models.errors import UnsupportedAdapterError
from services.engine.stepped.batch import Adapters
from services.engine.stepped.inbox import ChangeAdapter, Inbox
from services.runtime.settings import EngineSettings

log = logging.getLogger(__name__)


class EngineAdapters:
    """`model` is where weights go; None: the model takes no adapters."""

    def __init__(
        self, model: Adapters | None, settings: EngineSettings, clock: Callable[[], float]
    ) -> None:
        self._model = model
        self._settings = settings
        self._clock = clock
        self._limits = AdapterLimits.of(settings)
        self._books = AdapterBooks(self._limits)
        self._one_by_one = asyncio.Lock()

    def load_first(self) -> None:
        """Those that the settings name, before any step. Raises as load() does."""
        for name, folder in named_paths(self._settings.adapters, self._settings.adapter_folder):
            files = read_files(check_name(name), folder, self._limits)
            adapter, weights = self._read(files)
            self._books.load(adapter, self._clock())
            self._of_model().put(adapter.id, weights)
            log.info("LoRA adapter %s: rank %d, %d bytes", *_said(adapter))

    def begin(self, inbox: Inbox) -> None:
        """The step thread is about to run. Call on the event loop."""
        self._inbox = inbox
        self._loop = asyncio.get_running_loop()

    async def load(self, name: str, path: str) -> Adapter:
        """See api.Engine. One at a time.

        What has begun goes on to its end though the caller is cancelled: a thread can't be, and
        what it holds must be gone before the next one reads.
        """
        check_name(name)
        folder = folder_within(self._settings.adapter_folder, path or name)
        await self._one_by_one.acquire()
        self._loading = asyncio.create_task(self._load(name, folder))
        self._loading.add_done_callback(self._loaded)
        return await asyncio.shield(self._loading)

    async def _load(self, name: str, folder: Path) -> Adapter:
        within = self._settings.adapter_folder
        files = await asyncio.to_thread(read_files, name, folder, self._limits, within)
        known = self._books.get(files.id)
        if known is None:
            adapter, weights = await asyncio.to_thread(self._read, files)
        else:
            adapter, weights = known, None
        self._books.load(adapter, self._clock())
        if weights is not None:
            self._inbox.put(ChangeAdapter(adapter.id, weights))
        self._loop.call_later(LINGER_SECONDS + 0.1, self._sweep)
        log.info("LoRA adapter %s: rank %d, %d bytes", *_said(adapter))
        return adapter

    def _loaded(self, loading: asyncio.Task[Adapter]) -> None:
        if not loading.cancelled():
            loading.exception()  # The caller may not be there to be told.
        self._one_by_one.release()

    def unload(self, name: str) -> list[AdapterStatus]:
        """See api.Engine."""
        leaving = self._books.unload(name)
        self._sweep()
        return leaving

    def check(self, adapter_id: str) -> None:
        """Raises AdapterNotLoadedError for one that a request can't have; none is always there."""
        if adapter_id:
            self._books.check(adapter_id)

    def use(self, adapter_id: str) -> None:
        """A request that was checked has it from now on."""
        if adapter_id:
            self._books.begin(adapter_id)

    def end(self, adapter_id: str) -> None:
        """A request has it no more; the step thread knows, or was told."""
        if adapter_id:
            self._books.end(adapter_id)
            self._sweep()

    @property
    def listed(self) -> tuple[str, ...]:
        """See EngineStats.adapters."""
        return self._books.listed

    def status(self) -> list[AdapterStatus]:
        """See api.Engine."""
        return self._books.status()

    def _sweep(self) -> None:
        for adapter_id in self._books.take_gone(self._clock()):
            self._inbox.put(ChangeAdapter(adapter_id, None))
            log.info("LoRA adapter %s is gone", adapter_id)

    def _read(self, files: AdapterFiles) -> tuple[Adapter, Any]:
        """Any thread. Raises UnsupportedAdapterError, AdapterLimitError."""
        return self._of_model().read(files, self._limits)

    def _of_model(self) -> Adapters:
        if self._model is None:
            raise UnsupportedAdapterError("this engine takes no LoRA adapters")
        return self._model


def _said(adapter: Adapter) -> tuple[str, int, int]:
    return adapter.id, adapter.rank, adapter.bytes
