"""A frontend process: the real request machine, its patience, and calls as live.py makes them."""

from __future__ import annotations

import math

from kvtransfer.keys import block_keys, salt
from services.coordinator.core import messages as m
from services.engine.api import Request as EngineRequest
from services.frontend import events as e
from services.frontend.attempt import State
from services.frontend.output import Limits
from services.frontend.patience import Heard, Patience
from services.frontend.request import Request
from services.runtime.errors import (
    CoordinatorUnavailableError,
    DeadlineError,
    WorkerLostError,
    by_reason,
)
from tests.simulation.cluster_engine import BLOCK
from tests.simulation.cluster_net import Process, Stream

PATIENCE_SECONDS = 3.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.05, 0.5
LATE_SECONDS = 0.25
EMPTY_VIEW = frozenset({"NO_WORKERS", "UNKNOWN_MODEL"})


class Link:
    """A frontend's Decode stream to one worker, and what it hears of that worker."""

    def __init__(self, frontend, address):
        self.frontend, self.address = frontend, address
        self.heard = Heard()
        self.sinks: dict[str, tuple[Live, int]] = {}
        self.stream: Stream | None = None

    def start(self, name, live, number, *args):
        self.sinks[name] = (live, number)
        if self.stream is None:
            worker = self.frontend.world.worker_at(self.address)
            self.stream = Stream(self.frontend, worker, self.lost)
            self.stream.send(1, worker.decode.open_stream, self.stream, self)
        self.tell("start", *args)

    def tell(self, what, *args):
        """In order: the worker knows the stream by what it made of its first message."""
        if self.stream is not None:
            self.stream.send(1, self.stream.ends[1].decode.said, self.stream, what, *args)

    def forget(self, name):
        self.sinks.pop(name, None)

    def frame(self, outputs):
        """What a worker's step brought to this frontend."""
        self.came(moved=True)
        for name, fields in outputs:
            sink = self.sinks.get(name)
            if sink is not None:
                live, number = sink
                if fields.get("finish_reason") is not None:
                    self.forget(name)
                live.feed(e.DecodeOutput(number, **fields))

    def lost(self):
        self.stream = None
        sinks, self.sinks = self.sinks, {}
        error = WorkerLostError(f"{self.address} ended its stream")
        for live, number in sinks.values():
            live.feed(e.WorkerFailed(number, e.Role.DECODE, error, unreachable=True))

    def came(self, *, moved=False):
        now = self.heard.at = self.frontend.net.now
        if moved:
            self.heard.moved_at = now

    def ping(self):
        """Any live process answers."""
        frontend = self.frontend
        self.heard.pinged_at = frontend.net.now
        worker = frontend.world.worker_at(self.address)
        if worker is not None:
            net = frontend.net
            net.datagram(frontend, worker, net.datagram, worker, frontend, self.came)


class Frontend(Process):
    """One incarnation."""

    def __init__(self, world, name):
        super().__init__(world, name)
        self.world = world
        self.links: dict[str, Link] = {}
        self.live: set[Live] = set()
        self.patience = Patience(world.silence_seconds, world.stall_seconds)
        self.awake_since = -math.inf
        self.turn = world.random.randrange(8)
        self.away_at = -math.inf

    def link(self, address):
        """Of decode; prompts have calls of their own, and count as heard of the same way."""
        link = self.links.get(address)
        if link is None:
            link = self.links[address] = Link(self, address)
        return link

    def serve(self, client):
        """A client's call arrives."""
        Live(self, client)

    def client_gone(self, client):
        for live in list(self.live):
            if live.client is client:
                live.feed(e.ClientGone())

    def die(self, *, silently=False):
        super().die(silently=silently)
        for client in list(self.world.waiting):
            if client.frontend is self:
                client.cut_off()
        self.live.clear()


class Live:
    """One client request from placement to its end."""

    def __init__(self, frontend, client):
        self.frontend, self.client, self.net = frontend, client, frontend.net
        self.deadline = client.deadline
        self.core = Request(
            limits=Limits(
                prompt_tokens=len(client.prompt),
                max_tokens=client.sampling.max_tokens,
                min_tokens=0,
                stop_token_ids=frozenset(client.sampling.stop_token_ids),
                max_attempts=frontend.world.max_attempts,
            ),
            text=client.text(),
            arrived=self.net.now,
        )
        self.decided_by: dict[int, str] = {}
        self.calls: dict[int, PrefillCall] = {}
        self.placing: dict[int, PlaceCall] = {}
        self.reporting = 0
        frontend.live.add(self)
        frontend.after(self.deadline - self.net.now, self.feed, e.DeadlinePassed())
        self.look_at(self.net.now + frontend.patience.silence_seconds / 2)
        self.act(self.core.start())

    @property
    def ended(self):
        return self.core.state is State.ENDED

    def feed(self, event):
        if not self.ended:
            self.act(self.core.handle(event, self.net.now))
            if self.ended:
                self.frontend.live.discard(self)

    def act(self, commands):
        for command in commands:
            match command:
                case e.Emit(token_ids=token_ids):
                    self.client.tokens(token_ids)
                case e.Place(attempt=number, exclude=exclude):
                    self.placing[number] = PlaceCall(self, number, exclude)
                case e.CancelPlace(attempt=number):
                    self.placing.pop(number).cancel()
                case e.Report():
                    self.report(command)
                case e.Finish(reason=reason):
                    self.client.finished(reason)
                case e.Fail(error=error):
                    self.client.failed(error, self)
                case _:
                    self.tell_worker(command)

    def tell_worker(self, command):
        number = command.attempt
        name = f"{self.client.id}/{number}"
        match command:
            case e.StartPrefill(worker=worker, prefix=prefix):
                self.calls[number] = PrefillCall(self, number, worker, self.request(name), prefix)
            case e.StartDecode(worker=worker, source=source, prefix=prefix):
                left = max(0.001, self.deadline - self.net.now)
                link = self.frontend.link(worker.address)
                request = self.request(name)
                link.start(name, self, number, request, source, prefix, left)
            case e.Proceed(worker=worker, token_ids=token_ids, handle=handle):
                self.frontend.link(worker.address).tell("proceed", name, token_ids, handle)
            case e.CancelDecode(worker=worker):
                link = self.frontend.link(worker.address)
                link.tell("cancel", name)
                link.forget(name)
            case e.CancelPrefill():
                self.calls[number].cancel()
            case e.Release(worker=worker):
                source = self.frontend.world.worker_at(worker.address)
                if source is not None:
                    self.net.datagram(self.frontend, source, source.release, name)
            case _:
                raise NotImplementedError(f"{type(command).__name__} is new to the simulation")

    def request(self, name):
        client = self.client
        return EngineRequest(
            request_id=name,
            prompt_token_ids=client.prompt,
            sampling=client.sampling,
            output_token_ids=tuple(self.core.output),
            tenant=client.tenant,
            deadline_seconds=self.deadline - self.net.now,
        )

    def report(self, command):
        place = self.decided_by.get(command.attempt)
        coordinator = place and self.frontend.world.coordinators[place]
        if coordinator is None:
            return
        event = m.AttemptEnded(
            request_id=self.client.id,
            attempt=command.attempt,
            failed_worker=command.failed_worker,
            failure=command.failure,
            unreachable=command.unreachable,
            generated_tokens=command.generated_tokens,
            ttft_seconds=command.ttft_seconds,
            computed_tokens=command.computed_tokens,
        )
        if command.failed_worker:
            self.net.count[f"attempts failed: {command.failure}"] += 1
            self.frontend.world.note(
                self.client.id, "attempt", command.attempt, command.failed_worker, command.failure
            )
        self.net.datagram(self.frontend, coordinator, coordinator.report, None, event)

    # Silence

    def look_at(self, at):
        self.frontend.after(at - self.net.now, self.look, at)

    def look(self, due):
        frontend, now = self.frontend, self.net.now
        if now - due >= LATE_SECONDS:
            frontend.awake_since = now
        if self.ended:
            return
        half = frontend.patience.silence_seconds / 2
        again_at = now + half
        for debt in self.core.owing:
            link = frontend.link(debt.worker.address)
            verdict = frontend.patience.judge(debt, link.heard, frontend.awake_since, now)
            if verdict.ping:
                link.ping()
            again_at = min(again_at, verdict.again_at)
            if verdict.silent:
                self.net.count["given up as silent"] += 1
                error = by_reason("WORKER_SILENT", verdict.silent, {})
                self.feed(e.WorkerFailed(debt.attempt, debt.role, error, ended=False))
        if not self.ended:
            self.look_at(max(again_at, now + half / 10))


class PrefillCall:
    """A Prefill call."""

    def __init__(self, live, number, worker, request, prefix):
        self.live, self.number = live, number
        self.link = live.frontend.link(worker.address)
        self.over = False
        server = live.frontend.world.worker_at(worker.address)
        self.stream = Stream(live.frontend, server, self.lost)
        self.stream.send(1, server.prefill.start, self.stream, self, request, prefix)

    def accepted(self):
        self.link.came()
        self.live.feed(e.PrefillAccepted(self.number))

    def done(self, output):
        self.link.came(moved=True)
        self.over = True
        self.stream.end(by=0)
        fields = (output.token_ids, output.logprobs, output.finish_reason, output.handle, output.kv)
        self.live.feed(e.PrefillDone(self.number, *fields))

    def failed(self, error):
        self.over = True
        self.stream.end(by=0)
        self.live.feed(e.WorkerFailed(self.number, e.Role.PREFILL, error))

    def lost(self):
        if not self.over:
            self.over = True
            error = WorkerLostError("its stream broke")
            self.live.feed(e.WorkerFailed(self.number, e.Role.PREFILL, error, unreachable=True))

    def cancel(self):
        self.over = True
        self.stream.end(by=0)


class PlaceCall:
    """A placement asked for until there is an answer, of one coordinator after the other."""

    def __init__(self, live, number, exclude):
        self.live, self.number, self.exclude = live, number, exclude
        self.frontend, self.net = live.frontend, live.net
        self.stream: Stream | None = None
        self.over = False
        self.tried = 0
        self.pause = FIRST_RETRY_SECONDS
        self.give_up: float | None = None
        client, output = live.client, tuple(live.core.output)
        tokens = (*client.prompt, *output)
        self.want = m.PlaceRequest(
            request_id=client.id,
            attempt=number,
            model="m",
            block_keys=tuple(block_keys(tokens, BLOCK, salt("m", "a"))),
            context_tokens=len(tokens),
            max_tokens=client.sampling.max_tokens - len(output),
            exclude_workers=frozenset(exclude),
            frontend_id=self.frontend.name,
            kv_layout="a",
            tenant=client.tenant,
            priority=client.priority,
            session=client.session,
            ttft_seconds=client.ttft_seconds if number == 0 else 0.0,
        )
        self.ask()

    def ask(self):
        if self.over:
            return
        left = self.live.deadline - self.net.now
        world, frontend = self.frontend.world, self.frontend
        places = world.coordinator_places
        self.place = places[frontend.turn % len(places)]
        coordinator = world.coordinators[self.place]
        self.stream = Stream(frontend, coordinator, self.lost)
        self.live.decided_by[self.number] = self.place
        self.stream.send(1, coordinator.place, self.stream, self, self.want, max(0.001, left))

    def placed(self, placement, _by):
        self.close()
        live = self.live
        live.placing.pop(self.number, None)
        if self.number > 0:
            self.net.count["placed again"] += 1

        def worker(chosen):
            return chosen and e.Worker(
                chosen.worker_id, chosen.address, chosen.cached_tokens, chosen.dp_rank
            )

        prefix = placement.prefix
        live.feed(
            e.Placed(
                self.number,
                e.Placement(
                    worker(placement.decode),
                    worker(placement.prefill),
                    placement.reasons,
                    prefix and e.KvPrefix(prefix.worker_id, prefix.address, prefix.tokens),
                    placement.ttft_seconds,
                    placement.itl_seconds,
                ),
            )
        )

    def refused(self, error):
        self.stream.end(by=0)
        empty = error.reason in EMPTY_VIEW
        if empty and self.net.now - self.frontend.away_at < PATIENCE_SECONDS:
            self.again(error)
        else:
            self.unplaced(error)

    def lost(self):
        """The coordinator is away: the next one."""
        self.frontend.turn += 1
        self.frontend.away_at = self.net.now
        self.net.count["coordinators found away"] += 1
        if self.net.now >= self.live.deadline:
            self.unplaced(DeadlineError("the deadline passed while the coordinator was asked"))
        else:
            self.again(CoordinatorUnavailableError("the coordinator can't be reached"))

    def again(self, error):
        if self.over:
            return
        now = self.net.now
        if self.give_up is None:
            self.give_up = min(self.live.deadline, now + PATIENCE_SECONDS)
        if now + self.pause >= self.give_up:
            self.unplaced(error)
            return
        self.frontend.after(self.pause, self.ask)
        self.pause = min(2 * self.pause, LAST_RETRY_SECONDS)

    def unplaced(self, error):
        self.close()
        self.live.placing.pop(self.number, None)
        self.live.feed(e.Unplaced(self.number, error))

    def cancel(self):
        self.close()

    def close(self):
        self.over = True
        if self.stream is not None:
            self.stream.end(by=0)
