"""A stepper on the scripted model, stepped by hand, with what its event loop would do."""

from __future__ import annotations

import random

import numpy as np

from kvtransfer.bandwidth import Bandwidth
from kvtransfer.keys import KeyChain, salt
from kvtransfer.store import KvStore
from services.engine.api import KvSource, Request
from services.engine.scripted.drafter import ScriptedDrafter
from services.engine.scripted.model import ScriptedModel, logits_of
from services.engine.stepped.inbox import Cancel, FetchStopped, Proceed, Submit
from services.engine.stepped.sampler import Occurrences, Row, sample
from services.engine.stepped.sequence import Limits, Role, Sequence
from services.engine.stepped.step import Stepper
from services.runtime.settings import EngineSettings

SOURCE = KvSource("p", "p:1", "lease")


class Rig:
    """`chance`: that a draft is right; None: there is no draft layer."""

    def __init__(
        self,
        seed=0,
        *,
        chance=0.7,
        most=3,
        blocks=64,
        block_tokens=4,
        chunk_tokens=16,
        max_running=8,
        layers_per_piece=2,
        context=100,
    ):
        self.random = random.Random(seed)
        self.now = 0.0
        self.serial = 0
        self.outputs: dict[str, list] = {}
        self.stopped: set[int] = set()
        self.fetches: dict[int, object] = {}
        drafts = chance is not None
        model = ScriptedModel("m", block_tokens=block_tokens, draft_layers=int(drafts))
        self.store = KvStore(model.layout, blocks, layers_per_piece=layers_per_piece)
        model.bind(self.store.memory)
        self.limits = Limits(min(context, blocks * block_tokens), frozenset())
        self.stepper = Stepper(
            model,
            self.store,
            EngineSettings(
                kind="scripted",
                block_tokens=block_tokens,
                chunk_tokens=chunk_tokens,
                max_running=max_running,
                draft_tokens=most,
            ),
            self.limits,
            recompute_max_tokens=1000,
            bandwidth=Bandwidth(),
            clock=self._clock,
            drafter=ScriptedDrafter(model, chance) if drafts else None,
        )
        if drafts:
            # Any length at any step: what is chosen must not matter.
            self.stepper._drafting.length.choose = lambda *_: self.random.randint(0, most)

    def _clock(self):
        self.now += 1e-3
        return self.now

    def submit(self, request: Request, role=Role.DECODE, source=None) -> Sequence:
        layout = self.store.layout
        self.serial += 1
        if role is Role.PREFILL:
            self.store.open_lease(request.request_id, 1000.0)
        chain = KeyChain(salt("m", layout.fingerprint), layout.block_tokens)
        sequence = Sequence.of(self.serial, request, role, chain, source)
        self.stepper.apply(Submit(sequence))
        return sequence

    def step(self):
        plan = self.stepper.plan()
        self._take()
        self.stepper.run(plan)
        self._take()
        return plan

    def _take(self):
        result = self.stepper.take()
        for fetch in result.fetches:
            if fetch.keys:
                self.fetches[fetch.sequence.serial] = fetch
        for serial in result.stop_fetches:
            del self.fetches[serial]
            self.stepper.apply(FetchStopped(serial, why="stopped"))
        for _, output in result.outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def fetch(self, sequence: Sequence, source: Rig, lost: int) -> None:
        """Brings a lease's blocks from another rig, but for the last `lost` of them."""
        fetch = self.fetches.pop(sequence.serial)
        held = source.store._leases.live(sequence.request.request_id).blocks
        arrived = max(0, len(fetch.keys) - lost)
        for i, (key, block) in enumerate(zip(fetch.keys, fetch.blocks, strict=True)):
            if i < arrived:
                self.store.memory[block] = source.store.memory[held[key]]
                self.store.begin(block, key)
                self.store.piece_done(block, 0, self.store.layout.layers)
                if not (fetch.partial_last and i == len(fetch.keys) - 1):
                    self.store.commit(block)
        source.store.release_lease(sequence.request.request_id)
        self.stepper.apply(FetchStopped(sequence.serial, arrived))

    def proceed(self, sequence: Sequence, tokens) -> None:
        self.stepper.apply(Proceed(sequence.serial, tuple(tokens), self.now))

    def cancel(self, sequence: Sequence) -> None:
        self.stepper.apply(Cancel(sequence.serial, sequence.request.request_id))
        self._take()

    def ended(self, name: str) -> bool:
        found = self.outputs.get(name)
        return bool(found) and found[-1].finish_reason is not None

    def tokens(self, name: str) -> list[int]:
        return [t for o in self.outputs.get(name, ()) for t in o.token_ids]

    def logprobs(self, name: str) -> list:
        return [p for o in self.outputs.get(name, ()) for p in o.logprobs]

    def drain(self, most=2000) -> None:
        while not self.stepper.idle:
            self.step()
            most -= 1
            assert most, "it does not end"

    def close(self) -> None:
        assert self.stepper.idle
        self.store.check_integrity()
        assert self.store.stats().held == 0
        self.store.close()


def plain(request: Request, limits: Limits):
    """What a loop without an engine generates: choices, and why it ended."""
    chain = KeyChain(b"s" * 16, 4)
    sequence = Sequence.of(0, request, Role.DECODE, chain, None)
    sampling, choices = request.sampling, []
    while (reason := sequence.finished(limits)) is None:
        seen = Occurrences(request.prompt_token_ids)
        seen.follow(sequence.tokens)
        forbidden = frozenset(sampling.stop_token_ids)
        if sequence.outputs >= sampling.min_tokens:
            forbidden = frozenset()
        row = Row(sampling, len(sequence.tokens), seen, forbidden)
        logits = logits_of(np.array(sequence.tokens, dtype="<u4").tobytes())
        choices += sample(logits[None], [row])
        sequence.append((choices[-1].token,))
    return choices, reason
