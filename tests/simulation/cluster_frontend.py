"""A frontend process: the real request machine, its patience, and calls as live.py makes them."""

from __future__ import annotations

import math

from kvtransfer.keys import block_keys, salt
from services.coordinator.core import messages as m
from services.engine.api import Request as EngineRequest
from services.frontend import events as e
from services.frontend.attempt import State
from services.frontend.coordinator import CALL_SECONDS
from services.frontend.output import Limits
from services.frontend.patience import Heard, Patience
from services.frontend.request import Request
from services.runtime.errors import WorkerLostError, by_reason
from tests.simulation.cluster_engine import BLOCK
from tests.simulation.cluster_net import Process, Stream
from tests.simulation.cluster_replicas import PlaceCall, Replicas

LATE_SECONDS = 0.25
LEAST_SECONDS = 0.01


class Pulse:
    """What a connection to a worker brings. Any live process answers a ping."""

    def __init__(self, frontend, address):
        self.frontend, self.net, self.address = frontend, frontend.net, address
        self.heard = Heard()

    def came(self, *, moved=False):
        now = self.heard.at = self.net.now
        if moved:
            self.heard.moved_at = now

    def ping(self):
        self.heard.pinged_at = self.net.now
        worker, net = self.frontend.world.worker_at(self.address), self.net
        net.datagram(self.frontend, worker, net.datagram, worker, self.frontend, self.came)


class Link(Pulse):
    """A frontend's Decode stream to one worker."""

    def __init__(self, frontend, address):
        super().__init__(frontend, address)
        self.sinks: dict[str, tuple[Live, int]] = {}
        self.stream: Stream | None = None
        self.spoke: set[str] = set()
        self.spoke_at = 0.0

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
        self.note(outputs)
        for name, fields in outputs:
            sink = self.sinks.get(name)
            if sink is not None:
                live, number = sink
                if fields.get("finish_reason") is not None:
                    self.forget(name)
                live.feed(e.DecodeOutput(number, **fields))

    def note(self, outputs):
        """How long a step took."""
        spoke = {name for name, fields in outputs if fields.get("token_ids")}
        self.came(moved=bool(spoke) or any(fields.get("kv") for _, fields in outputs))
        if spoke:
            now = self.net.now
            if not spoke.isdisjoint(self.spoke):
                self.heard.rhythm.note(now - self.spoke_at, now)
            self.spoke, self.spoke_at = spoke, now

    def lost(self):
        self.stream, self.spoke = None, set()
        sinks, self.sinks = self.sinks, {}
        error = WorkerLostError(f"{self.address} ended its stream")
        for live, number in sinks.values():
            live.feed(e.WorkerFailed(number, e.Role.DECODE, error, unreachable=True))


class Frontend(Process):
    """One incarnation."""

    def __init__(self, world, name):
        super().__init__(world, name)
        self.world = world
        self.decode_links: dict[str, Link] = {}
        self.prefill_pulses: dict[str, Pulse] = {}
        self.live: dict[Live, None] = {}
        self.patience = Patience(world.silence_seconds, world.stall_seconds)
        self.awake_since = -math.inf
        self.replicas = Replicas(self)

    def decode(self, address):
        """The link to a decode worker."""
        if address not in self.decode_links:
            self.decode_links[address] = Link(self, address)
        return self.decode_links[address]

    def prefill(self, address):
        """What is heard of a prefill worker."""
        if address not in self.prefill_pulses:
            self.prefill_pulses[address] = Pulse(self, address)
        return self.prefill_pulses[address]

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
        self.asked: dict[int, object] = {}
        """Who was asked to place an attempt of which no end was reported."""
        self.calls: dict[int, PrefillCall] = {}
        self.placing: dict[int, PlaceCall] = {}
        self.told: Told | None = None
        frontend.live[self] = None
        frontend.after(self.deadline - self.net.now, self.feed, e.DeadlinePassed())
        self.look_at(self.net.now + frontend.patience.look_seconds)
        self.act(self.core.start())

    @property
    def ended(self):
        return self.core.state is State.ENDED

    def feed(self, event):
        if not self.ended:
            self.act(self.core.handle(event, self.net.now))
            if self.ended:
                self.frontend.live.pop(self, None)

    def act(self, commands):
        for command in commands:
            match command:
                case e.Emit(token_ids=token_ids):
                    self.client.tokens(token_ids)
                case e.Place(attempt=number, exclude=exclude):
                    self.place(number, exclude)
                case e.CancelPlace(attempt=number):
                    self.cancel_place(number)
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
                request = self.request(name, worker)
                self.calls[number] = PrefillCall(self, number, worker, request, prefix)
            case e.StartDecode(worker=worker, source=source, prefix=prefix):
                left = max(0.001, self.deadline - self.net.now)
                link = self.frontend.decode(worker.address)
                request = self.request(name, worker)
                link.start(name, self, number, request, source, prefix, left)
            case e.Proceed(worker=worker, token_ids=token_ids, handle=handle):
                self.frontend.decode(worker.address).tell("proceed", name, token_ids, handle)
            case e.CancelDecode(worker=worker):
                link = self.frontend.decode(worker.address)
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

    def request(self, name, worker):
        client = self.client
        return EngineRequest(
            request_id=name,
            prompt_token_ids=client.prompt,
            sampling=client.sampling,
            output_token_ids=tuple(self.core.output),
            tenant=client.wishes.tenant,
            deadline_seconds=self.deadline - self.net.now,
            dp_rank=worker.dp_rank,
        )

    # The coordinators

    def place(self, number, exclude):
        """Asks for workers, once the coordinator knows of the failure before."""
        if self.told is not None and not self.told.over:
            self.told.then = lambda: self.place(number, exclude)
            return
        if self.ended:
            return
        client, output = self.client, tuple(self.core.output)
        tokens = (*client.prompt, *output)
        wishes = client.wishes.left(len(output), self.net.now - self.core.arrived)
        want = m.PlaceRequest(
            request_id=client.id,
            attempt=number,
            model="m",
            block_keys=tuple(block_keys(tokens, BLOCK, salt("m", "a", wishes.tenant))),
            context_tokens=len(tokens),
            max_tokens=client.sampling.max_tokens - len(output),
            exclude_workers=frozenset(exclude),
            frontend_id=self.frontend.name,
            kv_layout="a",
            tenant=wishes.tenant,
            priority=wishes.priority,
            session=wishes.session,
            ttft_seconds=wishes.ttft_seconds,
            itl_seconds=wishes.itl_seconds,
        )
        self.placing[number] = PlaceCall(self, number, want)

    def placed(self, number, placement, by):
        self.placing.pop(number, None)
        self.asked[number] = by
        self.net.count["placed again"] += number > 0

        def worker(chosen):
            return chosen and e.Worker(
                chosen.worker_id, chosen.address, chosen.cached_tokens, chosen.dp_rank
            )

        prefix = placement.prefix
        where = e.Placement(
            worker(placement.decode),
            worker(placement.prefill),
            placement.reasons,
            prefix and e.KvPrefix(prefix.worker_id, prefix.address, prefix.tokens),
            placement.ttft_seconds,
            placement.itl_seconds,
        )
        self.feed(e.Placed(number, where))

    def unplaced(self, number, error):
        self.placing.pop(number, None)
        self.feed(e.Unplaced(number, error))

    def cancel_place(self, number):
        """Whoever cancels does not know whether it was placed."""
        call = self.placing.pop(number, None)
        if call is not None:
            self.asked[number] = call.replica
            call.cancel()

    def report(self, command):
        replicas = self.frontend.replicas
        told = replicas.told(self.asked.pop(command.attempt, None), command)
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
            where = (self.client.id, "attempt", command.attempt)
            self.frontend.world.note(*where, command.failed_worker, command.failure)
        asked_next = replicas.pick()
        sent = {replica: Told(self.frontend, replica, event) for replica in told}
        self.told = sent.get(asked_next) or next(iter(sent.values()), None)

    # Silence

    def look_at(self, at):
        self.frontend.after(at - self.net.now, self.look, at)

    def look(self, due):
        frontend, now = self.frontend, self.net.now
        if now - due >= LATE_SECONDS:
            frontend.awake_since = now
        if self.ended:
            return
        again_at = now + frontend.patience.look_seconds
        for debt in self.core.owing:
            prefills = debt.role is e.Role.PREFILL
            pulse = (frontend.prefill if prefills else frontend.decode)(debt.worker.address)
            verdict = frontend.patience.judge(debt, pulse.heard, frontend.awake_since, now)
            if verdict.ping:
                pulse.ping()
            again_at = min(again_at, verdict.again_at)
            if verdict.silent:
                self.net.count["given up as silent"] += 1
                error = by_reason("WORKER_SILENT", verdict.silent, {})
                away = verdict.unreachable
                self.feed(e.WorkerFailed(debt.attempt, debt.role, error, away, ended=False))
        if not self.ended:
            self.look_at(max(again_at, now + LEAST_SECONDS))


class Told:
    """A report on its way; `then` is done once it is there, or lost."""

    def __init__(self, frontend, replica, event):
        self.over, self.then = False, None
        coordinator = frontend.world.coordinators[replica.place]
        self.stream = Stream(frontend, coordinator, self.end)
        self.stream.send(1, coordinator.report, self.stream, event)
        frontend.after(CALL_SECONDS, self.end)

    def end(self):
        if not self.over:
            self.over = True
            self.stream.end(by=0)
            if self.then is not None:
                self.then()


class PrefillCall:
    """A Prefill call."""

    def __init__(self, live, number, worker, request, prefix):
        self.live, self.number = live, number
        self.pulse = live.frontend.prefill(worker.address)
        self.over = False
        self.began = live.net.now
        server = live.frontend.world.worker_at(worker.address)
        self.stream = Stream(live.frontend, server, self.lost)
        self.stream.send(1, server.prefill.start, self.stream, self, request, prefix)

    def accepted(self):
        self.pulse.came()
        self.began = self.pulse.net.now
        self.live.feed(e.PrefillAccepted(self.number))

    def done(self, output):
        self.pulse.came(moved=True)
        if output.kv is not None:
            took = self.pulse.net.now - self.began
            self.pulse.heard.pace.note(output.kv.computed_tokens, took)
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
