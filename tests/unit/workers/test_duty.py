"""Which roles a worker takes."""

from __future__ import annotations

import pytest

from services.worker.duty import Duty


def duty(role="decode", can_be=("prefill", "both"), **more) -> Duty:
    return Duty(role, frozenset(can_be), min_seconds=60.0, **more)


def test_a_worker_whose_role_is_fixed_keeps_it():
    fixed = duty(can_be=())
    assert fixed.take("prefill", 0.0) == "worker.can_be allows decode"
    assert fixed.role == "decode"
    assert fixed.services == ("decode",)


@pytest.mark.parametrize(
    ("role", "can_be", "services"),
    [
        ("prefill", (), ("prefill",)),
        ("both", (), ("prefill", "decode")),
        ("decode", ("prefill",), ("prefill", "decode")),
        ("prefill", ("both",), ("prefill", "decode")),
    ],
)
def test_it_has_the_services_of_all_roles_that_it_may_have(role, can_be, services):
    assert duty(role, can_be).services == services


def test_a_change_is_followed_by_a_time_without_one():
    worker = duty()
    assert worker.take("prefill", 5.0) == ""  # the start is no change
    assert worker.role == "prefill"
    assert worker.take("decode", 64.9).startswith("it changed 59.9 s ago")
    assert worker.role == "prefill"
    assert worker.take("prefill", 64.9) == ""
    assert worker.take("decode", 65.0) == ""


def test_being_told_the_role_it_has_is_no_change():
    worker = duty()
    assert worker.take("decode", 1.0) == ""
    assert worker.take("prefill", 1.0) == ""


def test_one_that_leaves_takes_none():
    worker = duty(leaving=True)
    assert worker.take("prefill", 0.0) == "it is shutting down"
