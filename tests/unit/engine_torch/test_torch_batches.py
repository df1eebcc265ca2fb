"""What a batch must look like, and what becomes of one that does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.torch.kernels.batch import Batch, Limits, plan
from services.engine.torch.kernels.batch import _tasks as tasks

LIMITS = Limits(vocabulary=10, positions=20, blocks=6, block_tokens=4)
GOOD = Batch(
    token_ids=np.array([1, 2, 3, 4], np.int32),
    positions=np.array([3, 4, 5, 0], np.int32),
    query_starts=np.array([0, 3, 4], np.int32),
    block_tables=np.array([[5, 2, -1], [0, -1, -1]], np.int32),
    logit_rows=np.array([2, 3], np.int32),
)


def test_finds_every_row_its_place():
    made = plan(GOOD, LIMITS, group=1)
    assert made.blocks.tolist() == [5, 2, 2, 0]
    assert made.tokens.tolist() == [3, 0, 1, 0]
    assert made.tasks.tolist() == [[0, 0, 3], [1, 3, 4]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_ids", [1, 2, 3]),
        ("token_ids", [1, 2, 3, 10]),
        ("token_ids", [1, -1, 3, 4]),
        ("positions", [3, 5, 6, 0]),
        ("positions", [3, 4, 3, 0]),
        ("positions", [-1, 0, 1, 0]),
        ("positions", [18, 19, 20, 0]),
        ("positions", [7, 8, 9, 0]),
        ("positions", [11, 12, 13, 0]),
        ("query_starts", [0, 3, 3, 4]),
        ("query_starts", [0, 3]),
        ("query_starts", [1, 3, 4]),
        ("block_tables", [[5, 2, -1]]),
        ("block_tables", [[5, -1, -1], [0, -1, -1]]),
        ("block_tables", [[5, 6, -1], [0, -1, -1]]),
        ("logit_rows", [4]),
        ("logit_rows", [-1]),
    ],
)
def test_refuses_what_kernels_would_not_notice(field, value):
    bad = dataclasses.replace(GOOD, **{field: np.array(value, np.int32)})
    with pytest.raises(ValueError):
        plan(bad, LIMITS, group=1)


def test_refuses_an_empty_batch():
    none = np.array([], np.int32)
    empty = Batch(none, none, np.array([0], np.int32), np.zeros((0, 1), np.int32), none)
    with pytest.raises(ValueError):
        plan(empty, LIMITS, group=1)


@given(counts=st.lists(st.integers(1, 100), min_size=1, max_size=9), most=st.integers(1, 64))
def test_tasks_cover_every_row_once(counts, most):
    starts = np.cumsum([0, *counts])
    positions = np.concatenate([np.arange(n) for n in counts]).astype(np.int32)
    made = tasks(starts, positions, most)
    covered = sorted(row for _, first, end in made for row in range(first, end))
    assert covered == list(range(sum(counts)))
    for sequence, first, end in made:
        assert starts[sequence] <= first < end <= starts[sequence + 1]
        assert end - first <= most
