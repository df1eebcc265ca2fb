"""A worker's engine: the real Stepper, Scheduler and KvStore; a model that computes nothing.

What SteppedEngine does on its event loop is done here in simulated time: the inbox, the fetches,
and what is told of a step. A token is a function of the request's seed, its position and the token
before it, so every one can be checked where it arrives. When one is sampled, every block of its
sequence must hold the KV of that sequence and of nothing else.
"""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import numpy as np

from kvtransfer.bandwidth import Bandwidth
from kvtransfer.errors import KvError
from kvtransfer.keys import KeyChain, salt
from kvtransfer.layout import gqa_layout
from kvtransfer.store import KvStore
from services.engine.api import EngineFault, EngineStats
from services.engine.stepped.choosing import Choosing
from services.engine.stepped.inbox import Cancel, FetchStopped, Proceed, Submit
from services.engine.stepped.sampler import Choice
from services.engine.stepped.sequence import Limits, Role, Sequence
from services.engine.stepped.step import Stepper
from services.runtime.errors import (
    DuplicateRequestError,
    EngineOverloadedError,
    InvalidRequestError,
)
from tests.simulation.cluster_net import Stream

BLOCK = 16
LAYOUT = gqa_layout("m", layers=2, kv_heads=1, head_dim=8, dtype="bfloat16", block_tokens=BLOCK)
"""The model's layer, and one that drafts. A block is offered as one piece."""
BLOCK_SECONDS = 0.0005
"""For one block to be read and verified."""
KV_STALL_SECONDS = 2.0
FREEZE_LOOK_SECONDS = 0.1
NONCE = bytes(16)


def token_after(seed, position, before):
    """The token at an index of a sequence."""
    return (before * 31 + seed * 17 + position * 7919) % 50021


class Model:
    """Writes KV at once, and so does its draft layer."""

    layout = LAYOUT
    layers = 1

    def forward(self, batch, after_layers, _layers_per_piece):
        if after_layers is not None:
            after_layers(0, 1)
        return np.zeros((len(batch.logit_rows), 1), np.float32)

    def draft(self, batch):
        """As many rows as were asked for; what they say is no matter."""
        return np.zeros((len(batch.logit_rows), 1), np.float32)


class SimChoosing(Choosing):
    """Chooses tokens that can be checked, and drafts that are right three times of four."""

    pool = None

    def gains(self, works, *more):
        for work in works:
            if work.sample:
                self._check_blocks(work.sequence)
        return super().gains(works, *more)

    def _check_blocks(self, sequence):
        keys, pool = sequence.chain.keys, self.pool
        for block, key in zip(sequence.blocks, keys, strict=False):
            assert pool.references(block) > 0, f"block {block} is in use and not held"
            assert pool.key(block) == key, f"block {block} holds the KV of something else"

    def _draft(self, sequence, _looks, _logits):
        drafts = sequence.drafts
        seed, at = sequence.request.sampling.seed, len(sequence.tokens) + len(drafts)
        token = token_after(seed, at, (*sequence.tokens[-1:], *drafts)[-1])
        return token if token % 4 else token + 1

    def _choose(self, sequence, _allowed, _logits, _best):
        return Choice(self._next(sequence), None)

    def _next(self, sequence):
        tokens = sequence.tokens
        return token_after(sequence.request.sampling.seed, len(tokens), tokens[-1])


class SimStepper(Stepper):
    """What breaks a step here is a bug, and not to be survived."""

    choosing = SimChoosing

    def __init__(self, model, store, *more, **named):
        super().__init__(model, store, *more, **named)
        self._choosing.pool = store._pool

    def fail(self, sequences, error):
        raise error


class Fetch:
    """KV blocks on their way from another worker."""

    def __init__(self, engine, fetch, source):
        self.engine, self.fetch = engine, fetch
        self.arrived: set[int] = set()
        self.arrived_before = 0
        self.began = engine.net.now
        self.over = False
        self.stream = Stream(engine.process, source, lambda: self.fail("its source is gone"))
        self.stream.send(1, source.serve_fetch, self.stream, self)
        if fetch.timeout is not None:
            engine.process.after(fetch.timeout, self.fail, "timeout")
        engine.process.after(KV_STALL_SECONDS, self.check_progress)

    def pieces(self, pieces):
        """Blocks, as they became ready."""
        if self.over:
            return
        store, request = self.engine.store, self.fetch.sequence.request
        last = len(self.fetch.keys) - 1
        for index in pieces:
            block, key = self.fetch.blocks[index], self.fetch.keys[index]
            store.begin(block, key, request.tenant)
            store.pieces_verified(block, (0,), (0,))
            if not (index == last and self.fetch.partial_last):
                store.commit(block)
        self.arrived.update(pieces)
        if len(self.arrived) == len(self.fetch.keys):
            self.stop()
            self.engine.fetch_over(self, FetchStopped(self.serial, len(self.arrived)))

    def fail(self, why):
        if not self.over:
            self.stop()
            leading = next(i for i in itertools.count() if i not in self.arrived)
            stopped = FetchStopped(self.serial, leading, lost="KV_SOURCE_LOST", why=why)
            self.engine.fetch_over(self, stopped)

    def check_progress(self):
        """A source that has the blocks and does not send them is given up."""
        if self.over:
            return
        server = self.stream.ends[1]
        if len(self.arrived) == self.arrived_before and server.stalled_until > self.engine.net.now:
            self.fail("its source stalls")
        else:
            self.arrived_before = len(self.arrived)
            self.engine.process.after(KV_STALL_SECONDS, self.check_progress)

    def stop(self):
        self.over = True
        self.stream.end(by=0)

    @property
    def serial(self):
        return self.fetch.sequence.serial


class Engine:
    """See the module's docstring. `deliver` takes what a step brings."""

    def __init__(self, process, shape, deliver):
        self.process, self.net, self.shape, self.deliver = process, process.net, shape, deliver
        net = self.net
        self.store = KvStore(
            LAYOUT,
            shape.blocks,
            layers_per_piece=LAYOUT.layers,
            scratch_bytes=0,
            clock=lambda: net.now,
            nonce=NONCE,
        )
        self.limits = Limits(shape.blocks * BLOCK, frozenset())
        self._began: list[float] = []
        model = Model()
        self.stepper = SimStepper(
            model,
            self.store,
            SimpleNamespace(
                chunk_tokens=shape.chunk_tokens,
                max_running=shape.max_running,
                draft_tokens=random.Random(f"{net.seed} {process.name}").choice([0, 1, 3]),
            ),
            self.limits,
            recompute_max_tokens=shape.recompute_max_tokens,
            bandwidth=Bandwidth(),
            clock=self._clock,
            dp_ranks=shape.dp_ranks,
            drafter=model,
        )
        self.frozen_until = 0.0
        self.slowness = 1.0
        self._serials = itertools.count(1)
        self._inbox: list = []
        self.live: dict[str, tuple[int, int]] = {}
        self._fetches: dict[int, Fetch] = {}
        self._stepping = False
        self._idle_since = 0.0
        process.after(1.0, self._expire)

    def _clock(self):
        return self._began.pop() if self._began else self.net.now

    # What the services call

    def prefill(self, request, hold, prefix):
        self._check(request)
        self.store.open_lease(request.request_id, hold.seconds, request.tenant)
        self._submit(request, Role.PREFILL, None, prefix)

    def decode(self, request, source, prefix):
        self._check(request)
        self._submit(request, Role.DECODE, source, prefix)

    def proceed(self, request_id, first):
        live = self.live.get(request_id)
        if live is not None:
            self._put(Proceed(live[0], first.token_ids, self.net.now))

    def cancel(self, request_id):
        live = self.live.pop(request_id, None)
        if live is not None:
            self._put(Cancel(live[0], request_id))
        else:
            self.store.release_lease(request_id)
            self._kick()

    def release(self, lease_id):
        """A sink, or a frontend, needs a lease no more."""
        self.store.release_lease(lease_id)
        self._kick()

    @property
    def busy_at(self):
        """When it last had anything to do, or to hold for others."""
        idle = not (self.live or self._inbox or self.store._pool.held)
        return self._idle_since if idle else self.net.now

    def stats(self):
        load, pool = self.stepper.load, self.store._pool
        unseen = sum(tokens for serial, tokens in self.live.values() if serial > load.taken)
        return EngineStats(
            running=load.running,
            waiting=max(0, len(self.live) - load.running),
            free_blocks=pool.available,
            held_blocks=pool.held,
            cached_blocks=pool.cached,
            queued_tokens=load.queued_tokens + unseen,
            prefill_tokens_per_second=load.prefill_tokens_per_second,
            step_seconds=load.step_seconds,
            finished=load.finished,
            preempted=load.preempted,
            leases=len(self.store._leases),
            ranks=load.ranks,
        )

    def _check(self, request):
        if request.request_id in self.live:
            raise DuplicateRequestError(f"request {request.request_id} is already here")
        if request.dp_rank >= self.shape.dp_ranks:
            raise InvalidRequestError("dp_rank", request.dp_rank, "there is none")
        limit = self.shape.max_running + self.shape.max_waiting
        if len(self.live) >= limit:
            self.net.count["refused by a full worker"] += 1
            raise EngineOverloadedError(f"{limit} requests are here already", limit=limit)
        if len(request.token_ids) >= self.limits.context_tokens:
            raise InvalidRequestError("prompt_token_ids", len(request.token_ids), "too long")

    def _submit(self, request, role, source, prefix):
        serial = next(self._serials)
        salted = salt(self.shape.model, self.shape.kv_layout, request.tenant)
        chain = KeyChain(salted, BLOCK)
        sequence = Sequence.of(serial, request, role, chain, source, prefix)
        self.live[request.request_id] = (serial, 0 if source else sequence.context)
        self._put(Submit(sequence))

    # Steps

    def _put(self, command):
        self._inbox.append(command)
        self._kick()

    def _kick(self):
        if not self._stepping:
            self._stepping = True
            self.process.after(0.0, self._begin_step)

    def _begin_step(self):
        if self.frozen_until > self.net.now:
            self.process.after(FREEZE_LOOK_SECONDS, self._begin_step)
            return
        inbox, self._inbox = self._inbox, []
        for command in inbox:
            self.stepper.apply(command)
        plan = self.stepper.plan()
        self._tell()
        if not plan.work:
            self._stepping = False
            self._idle_since = self.net.now
            if self._inbox:
                self._kick()
            return
        prompt = sum(w.count for w in plan.work if w.count > 1)
        seconds = self.shape.step_seconds + prompt / self.shape.tokens_per_second
        self.process.after(seconds * self.slowness, self._end_step, plan, self.net.now)

    def _end_step(self, plan, began):
        scheduler = self.stepper._scheduler
        assert len(scheduler.admitted) <= self.shape.max_running, "more runs than may"
        self._began = [began]
        before = self.stepper.load.accepted_tokens
        self.stepper.run(plan)
        self._began = []
        self._tell()
        self.net.count["drafts accepted"] += self.stepper.load.accepted_tokens - before
        self._begin_step()

    def _tell(self):
        result = self.stepper.take()
        for fetch in result.fetches:
            self._fetch(fetch)
        for serial in result.stop_fetches:
            fetch = self._fetches.get(serial)
            if fetch is not None:
                fetch.stop()
                self.fetch_over(fetch, FetchStopped(serial, why="stopped"))
        outputs = []
        for serial, output in result.outputs:
            live = self.live.get(output.request_id)
            if live is None or live[0] != serial:
                continue
            outputs.append(output)
            if output.finish_reason is not None or output.prefill_done:
                del self.live[output.request_id]
        if outputs:
            self.deliver(outputs)

    def _expire(self):
        self.process.after(0.5, self._expire)
        expired = self.store.expire()
        if expired:
            self.net.count["leases expired"] += len(expired)
            self._kick()

    # Fetches

    def _fetch(self, fetch):
        source = fetch.source and self.process.world.worker_at(fetch.source.address)
        if fetch.source is not None and not fetch.keys:
            if source is not None:
                self.net.datagram(self.process, source, source.release, fetch.source.lease_id)
        elif source is None:
            stopped = FetchStopped(fetch.sequence.serial, lost="KV_SOURCE_LOST", why="unknown")
            self._put(stopped)
        else:
            self.net.count["fetches"] += 1
            self._fetches[fetch.sequence.serial] = Fetch(self, fetch, source)

    def fetch_over(self, fetch, stopped):
        """Nothing writes into its blocks any more."""
        del self._fetches[fetch.serial]
        if stopped.lost:
            self.net.count["fetches failed"] += 1
        if not fetch.fetch.held_only and not stopped.lost:
            source = fetch.stream.ends[1]
            self.net.datagram(self.process, source, source.release, fetch.fetch.source.lease_id)
        self._put(stopped)

    def serve(self, stream, fetch):
        """Sends what another worker fetches, as it becomes ready."""
        wanted = fetch.fetch
        serving = _Serving(self, stream, fetch)
        try:
            serving.watch = self.store.watch(
                wanted.source.lease_id,
                wanted.keys,
                lambda: self.process.after(0.0, serving.go_on),
                self.shape.lease_seconds,
                held_only=wanted.held_only,
                tenant=wanted.sequence.request.tenant,
            )
        except KvError as error:
            stream.send(0, fetch.fail, error.reason)
            return
        stream.lost[1] = serving.stop
        serving.go_on()

    def served(self):
        """A fetch ended: blocks may be free."""
        self._kick()

    def check_integrity(self):
        self.store.check_integrity()


class _Serving:
    """One fetch at its source."""

    def __init__(self, engine, stream, fetch):
        self.engine, self.stream, self.fetch = engine, stream, fetch
        self.watch = None
        self.over = False

    def go_on(self):
        if self.over:
            return
        store = self.engine.store
        try:
            pieces = store.take(self.watch, 4)
        except KvError as error:
            self.stop()
            self.stream.send(0, self.fetch.fail, error.reason)
            return
        if pieces:
            self.engine.process.after(len(pieces) * BLOCK_SECONDS, self.sent, pieces)

    def sent(self, pieces):
        """They were read: if their memory had gone to other content meanwhile, for nothing."""
        if self.over:
            return
        pool, size = self.engine.store._pool, LAYOUT.block_bytes
        if any(pool.generation(p.offset // size) != p.generation for p in pieces):
            self.engine.net.count["stale reads"] += 1
            self.stop()
            self.stream.send(0, self.fetch.fail, "stale")
            return
        self.stream.send(0, self.fetch.pieces, [p.key_index for p in pieces])
        self.go_on()

    def stop(self):
        if not self.over:
            self.over = True
            self.engine.store.unwatch(self.watch)
            self.engine.served()


def fault_of(error):
    """As it goes into an output."""
    return EngineFault(error.reason, error.message, error.metadata)
