"""Cached tokens: what no worker computed, over all attempts."""

from __future__ import annotations

import pytest

from services.engine.api import KvReport, PrefixReport
from services.frontend.attempt import Attempt
from services.frontend.events import Placement, Worker
from services.frontend.usage import cached_tokens

P, D = Worker("p", "p:1", cached_tokens=40), Worker("d", "d:1", cached_tokens=48)
APART, ALONE = Placement(D, P), Placement(D)


def report(cached: int, computed: int) -> KvReport:
    return KvReport(cached_tokens=cached, computed_tokens=computed)


def with_prefix(cached: int, fetched: int, computed: int) -> KvReport:
    prefix = PrefixReport("w", fetched, 0.1, 1.0, 0.1, "")
    return KvReport(cached_tokens=cached, computed_tokens=computed, prefix=prefix)


@pytest.mark.parametrize(
    ("attempts", "cached"),
    [
        ([], 100),
        # Disaggregated: prefill's word counts, whatever decode held or fetched.
        ([Attempt(APART, 100, prefill_kv=report(64, 36), decode_kv=report(32, 0))], 64),
        # The fetch failed, and decode computed what it lacked.
        ([Attempt(APART, 100, prefill_kv=report(64, 36), decode_kv=report(32, 68))], 32),
        ([Attempt(ALONE, 100, decode_kv=report(99, 1))], 99),
        # What came from a worker that held it was not computed for this request either.
        ([Attempt(APART, 100, prefill_kv=with_prefix(16, 48, 36), decode_kv=report(0, 0))], 64),
        ([Attempt(ALONE, 100, decode_kv=with_prefix(0, 80, 20))], 80),
        # Prefill died at work, and its report with it: what it was known to hold.
        ([Attempt(APART, 100, accepted=True)], 40),
        # Refused before anything was computed.
        ([Attempt(APART, 100, failure="ENGINE_OVERLOADED")], 100),
        # The second attempt found what the first had computed: that was for this request.
        (
            [
                Attempt(ALONE, 100, tokens=5, decode_kv=report(32, 68)),
                Attempt(ALONE, 105, decode_kv=report(96, 9)),
            ],
            32,
        ),
        # Cached output of an earlier attempt is not prompt.
        ([Attempt(ALONE, 140, decode_kv=report(128, 12))], 100),
        # Preempted and computed again: more than there is.
        ([Attempt(APART, 100, prefill_kv=report(64, 36), decode_kv=report(0, 150))], 0),
    ],
)
def test_cached_tokens(attempts, cached):
    assert cached_tokens(100, attempts) == cached
