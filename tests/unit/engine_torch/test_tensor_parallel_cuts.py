"""Who computes which columns and heads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.torch.parallel.tensor_cuts import BLOCK, VECTOR, Cuts, widths
from services.engine.torch.shapes import GroupedShape
from services.runtime.load import SettingsError


@given(st.integers(1, 2000), st.integers(1, 9))
def test_edges_lie_where_kernels_can_be_cut(total, ranks):
    cuts = Cuts(0, ranks)
    if ranks > 1 and total < VECTOR * ranks:
        with pytest.raises(SettingsError, match="can't share it"):
            cuts.edges("it", total)
        return
    edges = cuts.edges("it", total)
    assert (edges[0], edges[-1], len(edges)) == (0, total, ranks + 1)
    assert all(width > 0 for width in widths(edges))
    assert all(edge % VECTOR == 0 for edge in edges[:-1])
    # No rank has much more than another.
    assert max(widths(edges)) - min(widths(edges)) <= 2 * max(VECTOR, total // (4 * ranks), BLOCK)
    found = [Cuts(rank, ranks).here(edges) for rank in range(ranks)]
    assert [column for part in found for column in part] == list(range(total))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.data())
def test_modules_side_by_side_are_cut_through(outputs, data):
    parts = {f"m{i}": n for i, n in enumerate(outputs)}
    total = sum(outputs)
    first = data.draw(st.integers(0, total))
    last = data.draw(st.integers(first, total))
    modules = Cuts().within(parts, range(first, last))
    assert [(m.name, m.outputs) for m in modules] == list(parts.items())
    starts = [sum(outputs[:i]) for i in range(len(outputs))]
    columns = [s + c for s, m in zip(starts, modules, strict=True) for c in m.columns]
    assert columns == list(range(first, last))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 12))
def test_query_heads_are_with_their_keys(kv_heads, group, ranks):
    shape = GroupedShape(kv_heads * group, kv_heads, 32)
    found = []
    try:
        shares = Cuts(0, ranks).grouped(shape)
    except SettingsError:
        assert ranks > kv_heads
        assert -(-ranks // kv_heads) > group
        return
    assert len(shares) == ranks
    for share in shares:
        assert share.first == len(found)
        for i in range(share.heads):
            head = share.first + i
            assert head // group == share.first_kv + i // share.group
            found.append(head)
        assert share.heads > 0
    assert found == list(range(shape.heads))


@given(st.integers(1, 64), st.integers(1, 64))
def test_heads_of_one_kind_are_dealt_evenly(heads, ranks):
    if ranks > heads:
        with pytest.raises(SettingsError, match=rf"can't share {heads} heads"):
            Cuts(0, ranks).heads(heads)
        return
    found = widths(Cuts(0, ranks).heads(heads))
    assert sum(found) == heads
    assert max(found) - min(found) <= 1
