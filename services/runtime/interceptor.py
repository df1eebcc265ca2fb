"""Around every handler: errors become statuses, bytes that are no message become errors.

Handlers raise TandemError or a kvtransfer error. Anything else is a bug: the client gets INTERNAL
with an incident id, and the log has the rest under that id.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from services.runtime import incident, parsing
from services.runtime.errors import StatusError, TandemError, to_status

log = logging.getLogger(__name__)

_Handler = Any
_Context = grpc.aio.ServicerContext[Any, Any]


class _Incoming:
    """A request stream that raises for what can't be parsed and remembers its last message."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self.last: Any = None
        self._messages = messages

    def __aiter__(self) -> _Incoming:
        return self

    async def __anext__(self) -> Any:
        self.last = _parsed(await anext(self._messages))
        return self.last


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """See the module's docstring. `incident_id` makes the ids."""

    def __init__(self, incident_id: Callable[[], str]) -> None:
        self._incident_id = incident_id
        self._running: set[asyncio.Task[Any]] = set()
        self._ended: TandemError | None = None

    def end_calls(self, why: TandemError) -> None:
        """Ends the calls that run; their clients get this error."""
        self._ended = why
        for task in self._running:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Wraps the handler of a call of any of the four kinds."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        wrap = self._streaming if handler.response_streaming else self._single
        behavior = wrap(getattr(handler, kind), handler_call_details.method)
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            behavior,
            request_deserializer=_checked(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _single(self, behavior: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def call(request: Any, context: _Context) -> Any:
            request = _accept(request)
            try:
                with self._counted():
                    return await behavior(_parsed(request), context)
            except (Exception, asyncio.CancelledError) as error:
                await self._abort(self._why(error), request, context, method)

        return call

    def _streaming(self, behavior: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def call(request: Any, context: _Context) -> None:
            request = _accept(request)
            try:
                with self._counted():
                    await self._write_all(behavior, request, context)
            except (Exception, asyncio.CancelledError) as error:
                await self._abort(self._why(error), request, context, method)

        return call

    async def _write_all(
        self, behavior: Callable[..., Any], request: Any, context: _Context
    ) -> None:
        if not inspect.isasyncgenfunction(behavior):
            await behavior(_parsed(request), context)
            return
        # Written here and not yielded on: when the call is cancelled in the middle of a
        # write, the handler's own cleanup has run before the call counts as over.
        async with contextlib.aclosing(behavior(_parsed(request), context)) as responses:
            async for response in responses:
                await context.write(response)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            yield
        finally:
            self._running.discard(task)

    def _why(self, error: Exception | asyncio.CancelledError) -> Exception:
        """What ended a call; raises the cancellation again if it was not end_calls()."""
        if not isinstance(error, asyncio.CancelledError):
            return error
        if self._ended is None:
            raise error
        return self._ended

    async def _abort(self, error: Exception, request: Any, context: _Context, method: str) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if context.cancelled() or context.done():
            # Nobody is left to tell; writing to a call that is over raises in odd ways.
            raise asyncio.CancelledError from error
        answer: StatusError
        if isinstance(error, StatusError):
            log.debug("%s ends with %s", method, error.reason)
            answer = error
        else:
            answer = self._unexpected(error, request, method)
        await context.abort_with_status(to_status(answer))

    def _unexpected(self, error: Exception, request: Any, method: str) -> TandemError:
        name = self._incident_id()
        if isinstance(request, _Incoming):
            request = request.last
        log.error("incident %s in %s\n%s", name, method, incident.report(error, request))
        return TandemError(
            f"unexpected {type(error).__name__} in this process; its log has more under "
            f"incident {name}",
            incident=name,
        )


def _checked(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """The deserializer of a generated handler, made to explain what it can't parse."""
    descriptor = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
    if parse is None or descriptor is None:
        return parse
    return parsing.deserializer(parse, descriptor)


def _accept(request: Any) -> Any:
    return _Incoming(request) if isinstance(request, AsyncIterator) else request


def _parsed(request: Any) -> Any:
    if isinstance(request, parsing.Unparsable):
        raise request.error
    return request
