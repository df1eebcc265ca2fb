"""Clusters that tests share the description of."""

from __future__ import annotations

import pytest

from tests.e2e.world import SCRIPTED, running


@pytest.fixture
async def scripted():
    """2 prefill, 2 decode, no model: 20 ms a step, so that there is a middle of a stream."""
    settings = SCRIPTED | {
        "engine.scripted_step_seconds": "0.02",
        "coordinator.local_prefill_tokens": "0",
    }
    async with running(2, 2, settings) as cluster:
        yield cluster
