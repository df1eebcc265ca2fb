"""What requests ask: lengths, shared prefixes, recorded traces; functions of seed and index."""

from __future__ import annotations

import json
import lzma
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import lengths, traces
from loadtest.errors import LengthsError, TraceError
from loadtest.lengths import Fixed, LogNormal, Uniform
from loadtest.traces import TraceRow
from loadtest.workload import Recorded, Synthetic, Workload

seeds = st.integers(0, 2**63 - 1)


def workload(source, seed=0, first=100, end=30_000):
    return Workload(source, seed, first, end)


def common_prefix(a, b) -> int:
    """Leading tokens that two prompts share."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", Fixed(512)),
        ("fixed:7", Fixed(7)),
        (" Uniform:16:256 ", Uniform(16, 256)),
        ("lognormal:400:0.8:4096", LogNormal(400.0, 0.8, 4096)),
    ],
)
def test_lengths_are_read(text, expected):
    assert lengths.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "many", "uniform:5", "uniform:9:3", "uniform:0:3", "uniform:1:2:3",
     "lognormal:400:0.8", "lognormal:400:-1:500", "lognormal:nan:1:500", "lognormal:400:nan:500",
     "lognormal:400:inf:500", "lognormal:400:1:300", "lognormal:0:1:10", "1e3", "99999999999"],
)  # fmt: skip
def test_lengths_that_make_no_sense_are_refused_with_what_would(text):
    with pytest.raises(LengthsError) as caught:
        lengths.parse(text)
    assert repr(text) in str(caught.value)
    assert lengths.ALLOWED in str(caught.value)


@given(seeds, st.integers(1, 500), st.integers(0, 500))
def test_uniform_stays_in_bounds(seed, low, more):
    drawn = [Uniform(low, low + more).sample(np.random.default_rng(seed)) for _ in range(20)]
    assert all(low <= n <= low + more for n in drawn)


def test_uniform_reaches_both_bounds_equally_often():
    random = np.random.default_rng(0)
    drawn = [Uniform(3, 6).sample(random) for _ in range(8000)]
    assert [drawn.count(n) / 8000 for n in (3, 4, 5, 6)] == pytest.approx([0.25] * 4, abs=0.03)


def test_lognormal_has_its_median_spread_and_cut():
    random = np.random.default_rng(0)
    drawn = np.array([LogNormal(400, 0.8, 2000).sample(random) for _ in range(20_000)])
    assert np.median(drawn) == pytest.approx(400, rel=0.04)
    assert np.percentile(drawn, 84.13) == pytest.approx(400 * math.exp(0.8), rel=0.05)
    assert drawn.min() >= 1
    assert drawn.max() == 2000


@given(seeds, st.integers(0, 10_000))
def test_a_request_is_a_function_of_seed_and_index(seed, index):
    source = Synthetic(
        Uniform(1, 90), Uniform(1, 20), prefix_share=0.5, prefix_tokens=30, prefixes=2
    )
    fresh, used = workload(source, seed), workload(source, seed)
    for other in (index + 1, 3, index):
        used.request(other)
    one, two = fresh.request(index), used.request(index)
    assert one.token_ids.tolist() == two.token_ids.tolist()
    assert (one.max_tokens, one.seed) == (two.max_tokens, two.seed)
    different = workload(source, seed + 1).request(index)
    assert one.seed != different.seed


@given(seeds, st.integers(0, 50_000), st.integers(1, 5000))
def test_tokens_come_from_the_range(seed, first, width):
    plan = workload(Synthetic(Fixed(40), Fixed(3)), seed, first, first + width).request(0)
    assert len(plan.token_ids) == 40
    assert plan.max_tokens == 3
    assert plan.token_ids.min() >= first
    assert plan.token_ids.max() < first + width


def test_tokens_use_the_whole_range_evenly():
    plan = workload(Synthetic(Fixed(40_000), Fixed(1)), 5, 10, 20).request(0)
    shares = np.bincount(plan.token_ids, minlength=20)[10:] / 40_000
    assert shares == pytest.approx(np.full(10, 0.1), abs=0.01)


def test_the_share_of_common_prefixes_is_kept_and_nothing_else_is_shared():
    source = Synthetic(Fixed(100), Fixed(1), prefix_share=0.3, prefix_tokens=64, prefixes=1)
    work = workload(source, 11)
    prompts = [work.request(i).token_ids for i in range(2000)]
    heads = Counter(tuple(p[:64].tolist()) for p in prompts)
    (prefix, count), (_, next_count) = heads.most_common(2)
    assert count / 2000 == pytest.approx(0.3, abs=0.05)
    assert next_count == 1
    rests = [tuple(p[64:].tolist()) for p in prompts if tuple(p[:64].tolist()) == prefix]
    assert len(set(rests)) == count


@given(seeds, st.integers(1, 200), st.integers(1, 300), st.integers(1, 5))
def test_a_prefix_leaves_each_request_a_token_of_its_own(seed, length, prefix, count):
    source = Synthetic(Fixed(length), Fixed(1), 1.0, prefix, count)
    work = workload(source, seed, 0, 2**31)
    prompts = [work.request(i).token_ids for i in range(6)]
    assert all(len(p) == length for p in prompts)
    expected = min(prefix, length - 1)
    heads = {tuple(p[:expected].tolist()) for p in prompts}
    assert len(heads) <= (count if expected else 1)
    if length > 1:
        assert len({tuple(p.tolist()) for p in prompts}) == 6


def row(tokens, ids, out=5, at=0.0):
    return TraceRow(at, tokens, out, tuple(ids))


def test_recorded_prefixes_are_shared_exactly_as_their_ids_say():
    rows = [row(1500, (0, 1, 2)), row(1300, (0, 1, 3)), row(1600, (0, 4, 5, 6)), row(512, (7,))]
    work = workload(Recorded(rows))
    prompts = [work.request(i).token_ids for i in range(4)]
    assert [len(p) for p in prompts] == [1500, 1300, 1600, 512]
    assert common_prefix(prompts[0], prompts[1]) == 1024
    assert common_prefix(prompts[0], prompts[2]) == 512
    assert common_prefix(prompts[0], prompts[3]) == 0


def test_a_second_pass_over_a_trace_shares_nothing_with_the_first():
    work = workload(Recorded([row(1024, (0, 1)), row(1024, (0, 2))]))
    prompts = [work.request(i).token_ids for i in range(4)]
    assert common_prefix(prompts[2], prompts[3]) == 512
    assert common_prefix(prompts[0], prompts[2]) == 0


def test_rows_without_content_share_nothing():
    work = workload(Recorded([row(300, ()), row(300, ())]))
    assert common_prefix(work.request(0).token_ids, work.request(1).token_ids) == 0


rows = st.lists(
    st.integers(1, 4000).flatmap(
        lambda n: st.tuples(
            st.just(n), st.lists(st.integers(0, 4), min_size=-(-n // 512), max_size=-(-n // 512))
        )
    ),
    min_size=2,
    max_size=5,
)


@given(rows, st.floats(0.01, 2), st.one_of(st.none(), st.integers(1, 500)))
def test_scaling_keeps_sharing_by_blocks(drawn, scale, most):
    recorded = [row(n, ids) for n, ids in drawn]
    source = Recorded(recorded, scale, max_input=most)
    work = workload(source, 1, 0, 2**31)
    prompts = [work.request(i).token_ids for i in range(len(recorded))]
    block = max(1, round(512 * scale))
    for (ids, a), (others, b) in zip(
        zip([r.hash_ids for r in recorded], prompts, strict=True),
        zip([r.hash_ids for r in recorded[1:]], prompts[1:], strict=True),
        strict=False,
    ):
        assert 1 <= len(a) <= (most or 10**9)
        same = common_prefix(np.array(ids), np.array(others))
        whole = min(same * block, len(a), len(b))
        # A last, short block may make two prompts with the same ids differ in length only.
        assert common_prefix(a, b) >= min(whole, max(0, same - 1) * block)
        if same < min(len(ids), len(others)):
            assert common_prefix(a, b) <= same * block
    cut = [r for r, p in zip(recorded, prompts, strict=True) if len(p) == most]
    assert source.cut_rows <= len(cut)


def test_rows_over_the_window_are_counted_after_the_cut():
    recorded = [row(1000, (), out=100), row(2000, (), out=10)]
    assert Recorded(recorded).rows_over(1100) == 1
    assert Recorded(recorded).rows_over(1099) == 2
    assert Recorded(recorded, max_input=500, max_output=50).rows_over(550) == 0
    assert Recorded(recorded, max_input=500, max_output=50).cut_rows == 2


def test_an_azure_trace_is_read(tmp_path):
    file = tmp_path / "azure.csv"
    file.write_bytes(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
        b"2023-11-16 18:15:50.9951690,396,109\r\n"
    )
    first, second = traces.read(file)
    assert first == TraceRow(0.0, 374, 44)
    assert second.at == pytest.approx(4.314579, abs=2e-6)
    assert (second.input_tokens, second.output_tokens) == (396, 109)
    assert len(traces.read(file, limit=1)) == 1


def test_a_mooncake_trace_is_read_in_order_of_time(tmp_path):
    file = tmp_path / "mooncake.jsonl"
    file.write_text(
        '{"timestamp": 6000, "input_length": 600, "output_length": 9, "hash_ids": [0, 4]}\n'
        '{"timestamp": 3000, "input_length": 512, "output_length": 7, "hash_ids": [0]}\n'
    )
    assert traces.read(file) == (
        TraceRow(0.0, 512, 7, (0,)),
        TraceRow(3.0, 600, 9, (0, 4)),
    )


def test_a_compressed_trace_is_read(tmp_path):
    file = tmp_path / "mooncake.jsonl.xz"
    file.write_bytes(lzma.compress(mooncake(600, [1, 2]).encode()))
    assert traces.read(file) == (TraceRow(0.0, 600, 1, (1, 2)),)
    for broken in (b"not compressed", file.read_bytes()[:-20]):
        file.write_bytes(broken)
        with pytest.raises(TraceError, match=r"mooncake.jsonl.xz: "):
            traces.read(file)


def mooncake(tokens, ids):
    return json.dumps({"timestamp": 0, "input_length": tokens, "output_length": 1, "hash_ids": ids})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "when,in,out\n", "a.csv:1: columns"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,many,1\n", "a.csv:2:"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,0,1\n", "at least 1"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,5\n", "a.csv:2:"),
        ("a.jsonl", "{}\n", "no 'input_length'"),
        ("a.jsonl", "[1]\n", "a.jsonl:1:"),
        ("a.jsonl", "nonsense\n", "a.jsonl:1:"),
        ("a.jsonl", mooncake(600, [1]), "1 hash_ids"),
        ("a.jsonl", mooncake(6, [-1]), "hash id -1"),
        ("a.txt", "", ".csv (Azure)"),
        ("a.txt.xz", "", ".csv (Azure)"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused_with_its_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError) as caught:
        traces.read(tmp_path / name)
    assert words in str(caught.value)


def test_a_trace_that_is_not_there(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        traces.read(tmp_path / "gone.csv")
