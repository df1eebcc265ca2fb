"""What one peer can do to the coordinator by what it says: nothing to the others."""

from __future__ import annotations

import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator import wire
from services.coordinator.core import messages as m
from services.coordinator.core.core import Core
from services.coordinator.core.fits import PromptFit, StepFit
from services.coordinator.core.ranks import NOMINAL_STEP
from services.coordinator.core.rules import Rules
from services.coordinator.service import Driver
from services.runtime.errors import InvalidRequestError
from tandem.coordinator.v1 import coordinator_pb2 as pb

anything = st.floats(allow_nan=False, min_value=1e-320)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step_seconds", 1e-160),
        ("step_seconds", 2e4),
        ("step_seconds", math.nan),
        ("prefill_tokens_per_second", 1e10),
        ("prefill_tokens_per_second", 1e-300),
    ],
)
def test_figures_that_cannot_be_are_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError, match=field):
        wire.stats_from(pb.WorkerStats(**{field: value}))


@given(st.lists(st.tuples(st.integers(0, 2**64), st.integers(0, 2**64), anything), max_size=50))
def test_no_measurement_makes_a_fit_infinite(reports):
    steps, prompts = StepFit(), PromptFit()
    for number, (requests, tokens, seconds) in enumerate(reports):
        steps.add(requests, tokens, seconds, number)
        prompts.add(float(tokens), seconds, number)
        assert math.isfinite(steps.cost.seconds(16, 20_000))
        assert math.isfinite(prompts.factor(8000.0))


@given(
    st.integers(4, 12),
    st.sampled_from([0.001, 0.02, 0.3]),
    st.lists(st.floats(1e-6, 1e4), min_size=40, max_size=40),
)
def test_one_worker_of_many_hardly_moves_the_fit_of_the_others(workers, speed, lies):
    fit, now = StepFit(), 0.0
    requests, tokens = 16, 20_000
    honest = speed * NOMINAL_STEP.seconds(requests, tokens)
    for _ in range(40):
        fit.add(requests, tokens, honest, now := now + 1)
    for lie in lies:
        for _ in range(workers - 1):
            fit.add(requests, tokens, honest, now)
        fit.add(requests, tokens, lie, now := now + 1)
        times = fit.cost.seconds(requests, tokens) / honest
        assert times <= (workers - 1) / (workers - 2) * 1.02
        assert times >= (2 * workers - 2) / (2 * workers - 1) * 0.98


def test_a_tick_that_fails_is_logged_once_and_loses_nothing(caplog, monkeypatch):
    core = Core(Rules(lease_seconds=10.0, queue_limit=1, local_prefill_tokens=0), 0.0, lambda: 0.5)
    driver = Driver(core, "c", clock=lambda: 1.0)
    number, stream = driver.open_stream()

    def broken(now):
        core.desk.out.append(m.GrantLease(number, 1.0))
        raise ArithmeticError("absurd")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(core.desk, "tick", broken)
        driver.tick()
        driver.tick()
    assert stream.out.qsize() == 2
    assert len(caplog.records) == 1
    driver.tick()
    assert stream.out.qsize() == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, "x" * 257) for name in ("request_id", "session", "tenant", "adapter", "model")),
        ("region", "\u00e9" * 129),
        ("request_id", "a\x1b[2J"),
        ("tenant", "a\u202eb"),
        ("exclude_workers", ["x" * 257]),
        ("allowed_regions", [str(n) for n in range(1025)]),
    ],
)
def test_names_in_a_request_are_short_and_printable(field, value):
    request = {"request_id": "r", "context_tokens": 1} | {field: value}
    with pytest.raises(InvalidRequestError, match=field) as refused:
        wire.place_from(pb.PlaceRequest(**request))
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("field", ["worker_id", "address", "model", "region"])
@pytest.mark.parametrize("value", ["x" * 257, "a\nb"])
def test_names_of_a_worker_are_short_and_printable(field, value):
    names = {"worker_id": "w", "address": "w:1", "model": "m", "kv_layout": "l"} | {field: value}
    info = pb.WorkerInfo(role=pb.WORKER_ROLE_BOTH, **names)
    with pytest.raises(InvalidRequestError, match=field):
        wire.hello_from(1, pb.Hello(info=info))


def test_the_status_says_who_is_avoided_and_why():
    core = Core(Rules(lease_seconds=10.0, queue_limit=1, local_prefill_tokens=0), 0.0, lambda: 0.5)
    counts = dict.fromkeys(("block_tokens", "total_blocks", "max_running", "context_tokens"), 8)
    info = pb.WorkerInfo(worker_id="w", address="w:1", model="m", kv_layout="l", **counts)
    info.role = pb.WORKER_ROLE_BOTH
    core.handle(wire.hello_from(1, pb.Hello(info=info)), 0.0)
    core.members.get("w").avoided = "it fails"
    assert wire.status_to(core, "c", 0.0).workers[0].avoided == "it fails"
