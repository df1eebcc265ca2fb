"""A worker's two services over its engine, as services/prefill and services/decode are."""

from __future__ import annotations

from services.engine.api import FinishReason, FirstTokens, Hold, KvSource
from services.runtime.errors import DuplicateRequestError, TandemError, by_reason


class PrefillService:
    """One call a prompt."""

    def __init__(self, worker):
        self.worker, self.engine = worker, worker.engine
        self.waiting: dict[str, tuple[object, object]] = {}
        self.drains = None

    @property
    def live(self):
        return len(self.waiting)

    def start(self, stream, call, request, prefix):
        """`call` is the caller's side of it."""
        name = request.request_id
        try:
            if self.drains is not None:
                raise self.drains
            if name in self.waiting:
                raise DuplicateRequestError(f"request {name} is already here")
            self.engine.prefill(request, Hold(self.worker.shape.lease_seconds), prefix)
        except TandemError as error:
            stream.send(0, call.failed, error)
            return
        self.waiting[name] = (stream, call)
        stream.lost[1] = lambda: self.gone(name)
        stream.send(0, call.accepted)

    def gone(self, name):
        """Nobody waits for it: there is no decode worker that will come for the KV."""
        if self.waiting.pop(name, None) is not None:
            self.engine.cancel(name)

    def deliver(self, outputs):
        for output in outputs:
            name = output.request_id
            ended = output.prefill_done or output.finish_reason is not None
            if name not in self.waiting or not ended:
                continue
            stream, call = self.waiting.pop(name)
            stream.lost[1] = None
            if output.error is not None:
                stream.send(0, call.failed, error_of(output.error))
            else:
                stream.send(0, call.done, output)
            if output.finish_reason is not None:
                self.engine.cancel(name)

    def open(self):
        self.drains = None

    def drain(self, why):
        self.drains = why

    def hand_back(self, why):
        for name, (stream, call) in list(self.waiting.items()):
            stream.send(0, call.failed, why)
            self.gone(name)


class DecodeStream:
    """A frontend's Decode stream as the worker sees it; `sink` is the frontend's side."""

    def __init__(self, service, stream, sink):
        self.service, self.stream, self.sink = service, stream, sink
        self.requests: dict[str, None] = {}
        self.frame: list = []
        stream.lost[1] = self.gone

    def put(self, name, **fields):
        """Goes out with all else that comes at the same moment."""
        if not self.frame:
            self.service.worker.after(0.0, self.flush)
        self.frame.append((name, fields))

    def flush(self):
        frame, self.frame = self.frame, []
        self.stream.send(0, self.sink.frame, frame)

    def gone(self):
        """The frontend is gone or wants no more."""
        del self.service.streams[self.stream]
        for name in list(self.requests):
            self.service.cancel(self, name)


class DecodeService:
    """One stream a frontend, one frame a step."""

    def __init__(self, worker):
        self.worker, self.engine = worker, worker.engine
        self.owner: dict[str, DecodeStream] = {}
        self.streams: dict[object, DecodeStream] = {}
        self.moving: set[str] = set()
        self.drains = None

    @property
    def live(self):
        return len(self.owner)

    def open_stream(self, stream, sink):
        self.streams[stream] = DecodeStream(self, stream, sink)

    def said(self, stream, what, *args):
        """A message on a stream: start, proceed or cancel."""
        getattr(self, what)(self.streams[stream], *args)

    def start(self, owner, request, source, prefix, left):
        name = request.request_id
        try:
            if self.drains is not None:
                raise self.drains
            if name in self.owner:
                raise DuplicateRequestError(f"request {name} is already here")
            where = source and KvSource(source.worker_id, source.address, name)
            self.engine.decode(request, where, prefix)
        except TandemError as error:
            owner.put(name, finish_reason=FinishReason.ERROR, error=error)
            return
        self.owner[name] = owner
        owner.requests[name] = None
        self.worker.after(left, self.expire, owner, name)

    def proceed(self, owner, name, token_ids, handle):
        if name in owner.requests:
            self.engine.proceed(name, FirstTokens(token_ids, handle))

    def cancel(self, owner, name):
        if name in owner.requests:
            self.forget(name)
            self.engine.cancel(name)

    def expire(self, owner, name):
        if name in owner.requests:
            self.give_up(name, by_reason("DEADLINE", "the request's deadline has passed", {}))

    def give_up(self, name, why):
        owner = self.owner[name]
        self.cancel(owner, name)
        owner.put(name, finish_reason=FinishReason.ERROR, error=why)

    def forget(self, name):
        self.owner.pop(name).requests.pop(name, None)
        self.moving.discard(name)

    def deliver(self, outputs):
        for output in outputs:
            name = output.request_id
            owner = self.owner.get(name)
            if owner is None:
                continue
            owner.put(
                name,
                token_ids=output.token_ids,
                finish_reason=output.finish_reason,
                error=None if output.error is None else error_of(output.error),
                kv=output.kv,
            )
            if output.finish_reason is not None:
                self.forget(name)

    def open(self):
        self.drains = None
        self.moving.clear()

    def drain(self, why):
        self.drains = why
        for name, owner in self.owner.items():
            if name not in self.moving:
                self.moving.add(name)
                owner.put(name, moving=True)

    def hand_back(self, why):
        for name in list(self.owner):
            self.give_up(name, why)


def error_of(fault):
    """As the other side of the wire makes it."""
    return by_reason(fault.reason, fault.message, fault.metadata)
