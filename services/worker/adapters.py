"""AdapterService: a worker's LoRA adapters, loaded and unloaded while it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from services.engine.adapters import AdapterStatus
from services.engine.api import Engine
from tandem.adapters.v1 import adapters_pb2, adapters_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """`on_change` is called when requests can be placed with another set of adapters."""

    def __init__(self, engine: Engine) -> None:
        self.on_change: Callable[[], None] = _nobody_cares
        self._engine = engine

    async def LoadAdapter(  # noqa: N802
        self, request: adapters_pb2.LoadAdapterRequest, context: _Context
    ) -> adapters_pb2.LoadAdapterResponse:
        """See adapters.proto."""
        loaded = await self._engine.load_adapter(request.name, request.path)
        self.on_change()
        (status,) = (s for s in self._engine.adapters() if s.adapter.id == loaded.id)
        return adapters_pb2.LoadAdapterResponse(adapter=_adapter_to(status))

    async def UnloadAdapter(  # noqa: N802
        self, request: adapters_pb2.UnloadAdapterRequest, context: _Context
    ) -> adapters_pb2.UnloadAdapterResponse:
        """See adapters.proto."""
        leaving = self._engine.unload_adapter(request.name)
        self.on_change()
        return adapters_pb2.UnloadAdapterResponse(adapters=map(_adapter_to, leaving))

    async def ListAdapters(  # noqa: N802
        self, request: adapters_pb2.ListAdaptersRequest, context: _Context
    ) -> adapters_pb2.ListAdaptersResponse:
        """See adapters.proto."""
        return adapters_pb2.ListAdaptersResponse(adapters=map(_adapter_to, self._engine.adapters()))


def _nobody_cares() -> None:
    """Before the worker has told anybody of itself."""


def _adapter_to(status: AdapterStatus) -> adapters_pb2.Adapter:
    adapter = status.adapter
    return adapters_pb2.Adapter(
        id=adapter.id,
        name=adapter.name,
        rank=adapter.rank,
        bytes=adapter.bytes,
        requests=status.requests,
        leaving=status.leaving,
    )
