"""Tokens with drafts are the tokens without, whatever else happens; and drafts cost nobody else."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from kvtransfer.bandwidth import Bandwidth
from kvtransfer.keys import KeyChain
from kvtransfer.layout import gqa_layout
from kvtransfer.store import KvStore
from services.engine.api import FinishReason, Request, Sampling
from services.engine.stepped.choosing import Choosing
from services.engine.stepped.drafting import Acceptance, DraftLength, Times
from services.engine.stepped.inbox import Submit
from services.engine.stepped.sampler import Choice
from services.engine.stepped.sequence import Limits, Role, Sequence
from services.engine.stepped.step import Stepper
from services.runtime.settings import EngineSettings
from tests.unit.engine_sched.draft_rig import SOURCE, Rig, plain


def some_sampling(r: random.Random) -> Sampling:
    stops = tuple(range(3, 3 + r.choice([0, 0, 1, 20, 60])))
    most = r.choice([1, 2, 5, 20, 40])
    return Sampling(
        temperature=r.choice([0.0, 0.3, 1.0]),
        top_k=r.choice([0, 0, 5, 40]),
        top_p=r.choice([1.0, 0.8]),
        min_p=r.choice([0.0, 0.05]),
        repetition_penalty=r.choice([1.0, 1.0, 0.7, 1.4]),
        presence_penalty=r.choice([0.0, 0.0, -2.0, 1.0]),
        frequency_penalty=r.choice([0.0, 0.0, -1.0, 0.5]),
        max_tokens=most,
        min_tokens=r.randint(0, most) if r.random() < 0.5 else 0,
        stop_token_ids=stops,
        seed=r.getrandbits(64),
        logprobs=r.choice([None, 0, 3]),
        logit_bias=r.choice([(), (), ((3, 4.0), (9, -100.0), (17, 2.5))]),
    )


def some_request(r: random.Random, name: str, limits: Limits) -> Request:
    """Prompts share prefixes; some requests have been resumed."""
    prompt = [
        (i // 5 + r.choice([0, 0, 0, 1])) % 250
        for i in range(r.randint(1, min(40, limits.context_tokens - 1)))
    ]
    request = Request(name, tuple(prompt), some_sampling(r))
    outputs = [c.token for c in plain(request, limits)[0]]
    given = r.randint(0, len(outputs) - 1) if r.random() < 0.3 else 0
    return Request(name, tuple(prompt), request.sampling, tuple(outputs[:given]))


def some_rig(seed: int, r: random.Random, **more) -> Rig:
    return Rig(
        seed,
        chance=r.choice([0.0, 0.5, 0.9, 1.0]),
        most=r.choice([0, 1, 2, 5, 8]),
        chunk_tokens=r.choice([1, 2, 7, 64]),
        max_running=r.choice([1, 3, 8]),
        layers_per_piece=r.choice([1, 2, 3, 4, 5]),
        **more,
    )


def check(rig: Rig, request: Request, first=()) -> None:
    choices, reason = plain(request, rig.limits)
    name = request.request_id
    assert [*first, *rig.tokens(name)] == [c.token for c in choices]
    if request.sampling.logprobs is not None:
        assert rig.logprobs(name) == [c.logprob for c in choices][len(first) :]
    assert rig.outputs[name][-1].finish_reason is reason


@pytest.mark.parametrize("seed", range(30))
def test_tokens_and_logprobs_are_those_without_drafts(seed):
    """Any chunks, pools that are too small for all, resumption, cancels, and the cache at last."""
    r = random.Random(seed)
    tight = seed % 2
    rig = some_rig(
        seed, r, blocks=r.randint(18, 26) if tight else 200, block_tokens=r.choice([1, 4])
    )
    requests = [some_request(r, str(i), rig.limits) for i in range(r.randint(1, 7))]
    cancelled = set()
    for request in requests:
        sequence = rig.submit(request)
        for _ in range(r.randint(0, 3)):
            rig.step()
        if r.random() < 0.1 and not rig.ended(request.request_id):
            rig.cancel(sequence)
            cancelled.add(request.request_id)
    rig.drain()
    for request in requests:
        if request.request_id not in cancelled:
            check(rig, request)
    # What was left in the cache is whole: the model checks each slot that it reads.
    for request in requests:
        choices, _ = plain(request, rig.limits)
        known = (*request.token_ids, *(c.token for c in choices))[: rig.limits.context_tokens - 1]
        again = Request(f"again {request.request_id}", known, Sampling(max_tokens=3, seed=1))
        rig.submit(again)
        rig.drain()
        check(rig, again)
    rig.close()


@pytest.mark.parametrize("seed", range(30))
def test_tokens_are_the_same_after_a_hand_off(seed):
    """The draft layer's KV travels; of what does not come, it is computed with the rest."""
    r = random.Random(1000 + seed)
    per_piece = r.choice([1, 2, 3, 4, 5])
    source, sink = (
        Rig(seed, chance=0.8, most=4, chunk_tokens=r.choice([1, 5, 64]), layers_per_piece=per_piece)
        for _ in range(2)
    )
    for i in range(4):
        request = some_request(r, str(i), sink.limits)
        prompt = source.submit(request, Role.PREFILL)
        while not source.outputs.get(request.request_id):
            source.step()
        (done,) = source.outputs[request.request_id]
        assert prompt.phase.value == "ended"
        if done.finish_reason is not None:
            continue
        sequence = sink.submit(request, source=SOURCE)
        early = r.random() < 0.5
        if early:
            sink.proceed(sequence, done.token_ids)
        sink.step()
        if sequence.serial in sink.fetches:
            lost = r.choice([0, 0, 1, 3])
            sink.fetch(sequence, source, lost)
        else:
            source.store.release_lease(request.request_id)
        sink.step()
        if not early:
            sink.proceed(sequence, done.token_ids)
        sink.drain()
        check(sink, request, done.token_ids)
    source.close()
    sink.close()


def test_right_drafts_save_steps_and_are_counted():
    steps = {}
    for chance in (0.0, 1.0):
        rig = Rig(chance=chance, most=3)
        rig.stepper._drafting.length.choose = lambda *_: 3
        rig.submit(Request("a", (5, 6, 7), Sampling(max_tokens=41, seed=4)))
        rig.drain()
        load = rig.stepper.load
        steps[chance] = load.decode_steps
        assert load.accepted_tokens == 41 - load.decode_steps
        assert load.draft_tokens >= load.accepted_tokens
        rig.close()
    assert steps == {0.0: 41, 1.0: 11}


def test_no_token_follows_one_that_ends_a_request():
    r = random.Random(7)
    stopped = 0
    for seed in range(30):
        rig = Rig(seed, chance=1.0, most=8)
        sampling = Sampling(max_tokens=30, seed=seed, stop_token_ids=tuple(range(3, 80)))
        request = Request("a", (r.randint(3, 250), 9), sampling)
        rig.submit(request)
        rig.drain()
        check(rig, request)
        last = rig.outputs["a"][-1]
        stopped += last.finish_reason is FinishReason.STOP and len(last.token_ids) > 1
        rig.close()
    assert stopped > 5, "none ended among accepted drafts"


def test_a_right_draft_that_ends_a_request_counts_as_right():
    ended_by_drafts = 0
    for seed in range(20):
        rig = Rig(seed, chance=1.0, most=3)
        sampling = Sampling(max_tokens=30, seed=seed, stop_token_ids=tuple(range(3, 80)))
        rig.submit(Request("a", (5, 9), sampling))
        rig.drain()
        load, length = rig.stepper.load, rig.stepper._drafting.length
        over = load.accepted_tokens + load.decode_steps - len(rig.tokens("a"))
        assert over in (0, 1)
        ended_by_drafts += over
        # All drafts are right, whatever was seen of them.
        assert length.acceptance.tokens(3) >= Acceptance(3).tokens(3)
        rig.close()
    assert ended_by_drafts > 3


def test_drafts_preempt_nobody():
    """A pool that just holds two sequences: with drafts there are as few preemptions as without."""
    counts = []
    for chance in (None, 0.5):
        rig = Rig(chance=chance, most=8, blocks=12, block_tokens=4, context=48)
        for i in range(2):
            rig.submit(Request(str(i), (i, *range(6)), Sampling(max_tokens=17, seed=i)))
        rig.drain()
        counts.append(rig.stepper.load.preempted)
        rig.close()
    assert counts == [0, 0]


def test_a_sequence_alone_goes_on_to_the_pools_last_token():
    rig = Rig(chance=1.0, most=8, blocks=3, block_tokens=4, context=100)
    request = Request("a", (5, 6), Sampling(max_tokens=50, seed=2))
    rig.submit(request)
    rig.drain()
    check(rig, request)
    assert len(rig.tokens("a")) == 10
    rig.close()


# In distribution

STATES = 4
NEXT = np.array(
    [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.4, 0.1], [0.05, 0.05, 0.1, 0.8]]
)
GUESS = np.roll(NEXT, 1, axis=1) * 0.5 + NEXT * 0.5
"""What the draft layer believes: often wrong."""


class Markov:
    """A model whose next token depends on the last alone, and its draft layer."""

    layout = gqa_layout("m", layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=8)
    layers = 1

    def forward(self, batch, after_layers, layers_per_piece):
        return np.log(NEXT[batch.token_ids[batch.logit_rows]]).astype(np.float32)

    def draft(self, batch):
        return np.log(GUESS[batch.token_ids[batch.logit_rows]]).astype(np.float32)


class Believer(Choosing):
    """Takes every draft for right."""

    def _gain(self, work, *more):
        gain = super()._gain(work, *more)
        if not work.drafts or gain.reason is not None or len(gain.choices) > 1:
            return gain
        work.sequence.tokens[-1] = work.drafts[0]
        return type(gain)(gain.sequence, (Choice(work.drafts[0]),), gain.reason)


class OneDice(Choosing):
    """Chooses all tokens of a step by one number."""

    def _gain(self, work, *more):
        self._at = len(work.sequence.tokens)
        return super()._gain(work, *more)

    def _row(self, sequence, *more):
        row = super()._row(sequence, *more)
        return replace(row, position=getattr(self, "_at", row.position))


def outputs_of(kind, drafts: int, count=1600):
    """Tokens two to five of so many sampled outputs, which drafts have a part in."""
    model, found = Markov(), []
    store = KvStore(model.layout, 600, layers_per_piece=2)
    stepper = type("Some", (Stepper,), {"choosing": kind})(
        model,
        store,
        EngineSettings(kind="scripted", max_running=500, chunk_tokens=500, draft_tokens=drafts),
        Limits(100, frozenset()),
        recompute_max_tokens=0,
        bandwidth=Bandwidth(),
        clock=lambda: 0.0,
        drafter=model if drafts else None,
    )
    for seed in range(count):
        request = Request(str(seed), (0,), Sampling(max_tokens=4, seed=seed * 7919))
        chain = KeyChain(b"s" * 16, 8)
        found.append(Sequence.of(seed + 1, request, Role.DECODE, chain, None))
        stepper.apply(Submit(found[-1]))
    while not stepper.idle:
        stepper.run(stepper.plan())
        stepper.take()
    store.close()
    accepted = stepper.load.accepted_tokens
    assert bool(accepted) == bool(drafts)
    return np.array([s.tokens[1:5] for s in found])


def misfit(tokens) -> float:
    """Chi-squared of the last three tokens' joint counts, by the spread that chance gives it."""
    start = np.eye(STATES)[0] @ NEXT
    exact = np.einsum("a,ab,bc,cd->bcd", start, NEXT, NEXT, NEXT).ravel()
    cells = tokens[:, 1] * STATES**2 + tokens[:, 2] * STATES + tokens[:, 3]
    expected = exact * len(tokens)
    counts = np.bincount(cells, minlength=STATES**3)
    # Cells that few fall into go together.
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    degrees = len(expected) - 1
    return (float((((counts - expected) ** 2) / expected).sum()) - degrees) / math.sqrt(2 * degrees)


def test_sampled_outputs_are_distributed_as_without_drafts():
    without = outputs_of(Choosing, 0)
    with_drafts = outputs_of(Choosing, 2)
    assert (with_drafts == without).all(), "in tokens, too"
    assert misfit(without) < 4
    assert misfit(with_drafts) < 4


@pytest.mark.parametrize("mutant", [Believer, OneDice])
def test_the_distribution_tells_who_accepts_wrongly(mutant):
    assert misfit(outputs_of(mutant, 2)) > 8


# How many


def settled(length: DraftLength, sequences: int, cost, chances, steps=600):
    """The length that it comes to, on a machine of such costs and a model of such chances."""
    r, chosen, drafts = random.Random(3), [], 0
    for _ in range(steps):
        length.forward.note(sequences * (1 + drafts), cost(sequences * (1 + drafts)))
        for _ in range(sequences if drafts else 0):
            right = 0
            while right < drafts and r.random() < chances[right]:
                right += 1
            length.acceptance.note(drafts, right)
        drafts = length.choose(sequences, 0)
        length.drafted(max(1, drafts), 0.001)
        chosen.append(drafts)
    return max(set(chosen[-200:]), key=chosen[-200:].count)


def weights(rows):
    """Rows are free up to 16, then each costs its share."""
    return max(0.040, 0.0025 * rows)


def test_the_length_goes_by_load_and_by_acceptance():
    good, bad = [0.9] * 4, [0.1] * 4
    assert settled(DraftLength(4), 1, weights, good) == 4
    assert settled(DraftLength(4), 1, weights, bad) <= 1
    assert settled(DraftLength(4), 32, weights, bad) == 0
    assert settled(DraftLength(4), 8, weights, good) in (1, 2)
    # The same engine, as load comes and goes.
    length = DraftLength(4)
    assert settled(length, 2, weights, good) == 4
    assert settled(length, 64, lambda rows: 0.01 * rows, [0.5] * 4) == 0
    assert settled(length, 2, weights, good) == 4


def test_no_drafts_for_nobody():
    length = DraftLength(4)
    assert length.choose(0, 100) == 0
    assert DraftLength(0).choose(5, 0) == 0


def test_times_never_shrink_with_rows():
    times = Times()
    assert times.estimate(5) == 0.0
    for rows, seconds in ((8, 0.4), (32, 0.3), (64, 0.8)):
        times.note(rows, seconds)
    found = [times.estimate(n) for n in (1, 8, 20, 32, 48, 64, 128)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.4)
    assert found[4] == pytest.approx(0.6)
    assert found[-1] == pytest.approx(1.6)


def test_acceptance_is_by_depth():
    acceptance = Acceptance(3)
    for _ in range(200):
        acceptance.note(2, 1)
    assert acceptance.tokens(1) == pytest.approx(2.0)
    assert acceptance.tokens(2) == pytest.approx(2.0)
    # Of a depth that none was checked at the one before tells.
    assert acceptance.tokens(3) == pytest.approx(2.0)
