"""Clusters that tests share the description of."""

from __future__ import annotations

import pytest

from tests.e2e.world import STEADY, running


@pytest.fixture
async def scripted():
    """2 prefill, 2 decode, no model: 20 ms a step, so that there is a middle of a stream."""
    async with running(2, 2, STEADY) as cluster:
        yield cluster
