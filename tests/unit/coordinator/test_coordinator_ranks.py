"""Requests go to the rank whose step they leave shortest, and only where one rank has room."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.core import messages as m
from services.coordinator.core.load import SETTLE_SECONDS, Booking, Load
from services.coordinator.core.ranks import NOMINAL_STEP, StepCost, rank_stats

INFO = m.WorkerInfo("w", m.Role.DECODE, "h:1", "m", "l", 16, 400, 32, 1600, dp_ranks=4)
IDLE = m.RankStats(free_blocks=100)


def load(*ranks, **stats):
    info = replace(INFO, dp_ranks=len(ranks) or INFO.dp_ranks)
    return Load(info, m.WorkerStats(ranks=ranks, **stats))


def place(worker, name, blocks, now=0.0, tokens=0):
    """Books a request where it belongs; its rank."""
    rank = worker.choose_rank(blocks)
    assert rank is not None
    worker.book((name, 0), Booking(now, blocks, tokens, rank))
    worker.check_integrity()
    return rank


def test_the_rank_with_the_shortest_step_is_chosen():
    busy = m.RankStats(running=6, free_blocks=80, kv_tokens=2000)
    long = m.RankStats(running=2, free_blocks=10, kv_tokens=90_000)
    short = m.RankStats(running=3, free_blocks=60, kv_tokens=4000)
    assert load(busy, long, short).choose_rank(5) == 2
    batch_only = StepCost(0.0, 1.0, 0.0)
    assert load(busy, long, short).choose_rank(5, batch_only) == 1


def test_idle_ranks_take_turns():
    worker = load(IDLE, IDLE, IDLE, IDLE)
    assert [place(worker, str(n), 5) for n in range(8)] == [0, 1, 2, 3] * 2


def test_a_long_request_is_made_up_for_by_short_ones_elsewhere():
    worker = load(IDLE, IDLE)
    heavy = replace(NOMINAL_STEP, kv_token=NOMINAL_STEP.request / 16)
    ranks = []
    for n, blocks in enumerate([8, 1, 1, 1, 1, 1, 1]):
        rank = worker.choose_rank(blocks, heavy)
        worker.book((str(n), 0), Booking(0.0, blocks, 0, rank))
        ranks.append(rank)
    assert ranks == [0, 1, 1, 1, 1, 1, 0], "five short ones weigh 10, and the long one 9"


def test_of_equal_ranks_the_one_with_fewer_prompt_tokens_queued_is_chosen():
    worker = load(replace(IDLE, queued_tokens=500), replace(IDLE, queued_tokens=20))
    assert worker.choose_rank(1) == 1


def test_a_prompt_goes_where_fewest_prompt_tokens_are_queued():
    many = m.RankStats(running=5, free_blocks=50, kv_tokens=500, queued_tokens=300)
    huge = m.RankStats(running=1, free_blocks=50, kv_tokens=100, queued_tokens=30_000)
    worker = load(many, huge)
    assert (worker.prompt_rank(5), worker.choose_rank(5)) == (0, 1)
    assert worker.prompt_rank(51) is None
    idle = load(IDLE, IDLE)
    ranks = []
    for n in range(3):
        ranks.append(idle.prompt_rank(2))
        idle.book((str(n), 0), Booking(0.0, 2, 1000 * n, ranks[-1]))
    assert ranks == [0, 1, 0], "what is queued on 0 has no tokens to compute"


def test_a_request_has_to_fit_one_rank():
    roomy = m.RankStats(running=10, free_blocks=90)  # 8 in the batch, 2 that prepare to join
    full = m.RankStats(running=4, free_blocks=3)
    worker = load(roomy, full, full, full)
    assert worker.room == 3 * (10 - 4)
    assert worker.free_blocks == 99
    assert (worker.fit_blocks, worker.fits(3), worker.fits(4)) == (3, True, False)
    assert worker.choose_rank(4) is None
    worker.credit(blocks=1, rank=0)
    assert worker.choose_rank(4) == 0


def test_a_worker_splits_its_batch_rounded_up_and_its_pool_rounded_down():
    worker = Load(replace(INFO, max_running=10, total_blocks=403), m.WorkerStats())
    assert [rank.limit for rank in worker.ranks] == [3 + 1] * 4
    assert [rank.total_blocks for rank in worker.ranks] == [100] * 4
    assert worker.limit == 16


@pytest.mark.parametrize("reported", [(), (IDLE, IDLE)], ids=["no ranks", "too few"])
def test_ranks_without_figures_of_their_own_share_the_workers(reported):
    stats = m.WorkerStats(running=6, waiting=1, free_blocks=390, queued_tokens=9, ranks=reported)
    ranks = rank_stats(INFO, stats)
    assert [r.running for r in ranks] == [2, 2, 1, 1]
    assert [r.waiting for r in ranks] == [1, 0, 0, 0]
    assert [r.free_blocks for r in ranks] == [98, 98, 97, 97]
    assert [r.kv_tokens for r in ranks] == [40, 40, 40, 40]
    assert [r.queued_tokens for r in ranks] == [3, 2, 2, 2]


def test_even_without_figures_bookings_spread_over_ranks():
    worker = Load(INFO, m.WorkerStats(free_blocks=400))
    assert sorted(place(worker, str(n), 90) for n in range(4)) == [0, 1, 2, 3]
    assert not worker.fits(20), "each has 10 left, the worker 40"
    assert worker.free_blocks == 40


def test_uneven_ranks_are_slower_than_their_mean():
    even = m.RankStats(running=8, free_blocks=50, kv_tokens=8000)
    assert load(even, even).imbalance == 1.0
    assert load(even).imbalance == 1.0
    worker = load(even, IDLE)
    slow, fast = NOMINAL_STEP.seconds(8, 8000), NOMINAL_STEP.seconds(0, 0)
    assert worker.imbalance == pytest.approx(slow / ((slow + fast) / 2))
    before = worker.imbalance
    place(worker, "r", 10)
    assert worker.imbalance < before


def test_a_report_covers_the_bookings_of_all_ranks():
    worker = load(IDLE, IDLE)
    for n in range(4):
        place(worker, str(n), 10, now=1.0)
    running = m.RankStats(running=2, free_blocks=80, kv_tokens=320)
    later = 1.0 + 1.01 * SETTLE_SECONDS
    worker.report(m.WorkerStats(ranks=(running, running)), later)
    assert not worker.bookings
    assert [r.requests for r in worker.ranks] == [2, 2]
    assert [r.kv_tokens for r in worker.ranks] == [320, 320]


ranks = st.builds(
    m.RankStats,
    running=st.integers(0, 12),
    waiting=st.integers(0, 3),
    free_blocks=st.integers(0, 120),
    kv_tokens=st.integers(0, 100_000),
    queued_tokens=st.integers(0, 1000),
)
costs = st.builds(StepCost, st.floats(0, 0.1), st.floats(0, 0.01), st.floats(0, 1e-6))


@given(st.lists(ranks, min_size=1, max_size=5), st.integers(1, 130), costs)
def test_no_other_rank_makes_the_slowest_step_less(reported, blocks, cost):
    worker = load(*reported)
    chosen = worker.choose_rank(blocks, cost)
    fitting = [r for r in worker.ranks if r.room and r.free_blocks >= blocks]
    assert (chosen is not None) == bool(fitting) == worker.fits(blocks)
    if chosen is None:
        return

    def slowest(taker):
        return max(
            cost.seconds(r.requests + (r is taker), r.kv_tokens + (r is taker) * 16 * blocks)
            for r in worker.ranks
        )

    assert worker.ranks[chosen] in fitting
    assert slowest(worker.ranks[chosen]) <= min(map(slowest, fitting)) + 1e-12


events = st.lists(
    st.tuples(
        st.sampled_from(["place", "drop", "credit", "report", "wait"]),
        st.integers(0, 5),
        st.integers(1, 30),
    ),
    max_size=40,
)


@given(st.integers(1, 4), events)
def test_no_rank_is_ever_booked_beyond_what_it_has(count, events):
    info = replace(INFO, dp_ranks=count)
    worker, now = Load(info, m.WorkerStats(free_blocks=400)), 0.0
    for what, number, blocks in events:
        now += 0.01
        if what == "place":
            room = worker.room
            rank = worker.choose_rank(blocks)
            if rank is None:
                assert not any(r.room and r.free_blocks >= blocks for r in worker.ranks)
                continue
            fresh = (str(number), 0) not in worker.bookings
            worker.book((str(number), 0), Booking(now, blocks, blocks, rank))
            assert worker.room == room - fresh
        elif what == "drop":
            worker.drop((str(number), 0))
        elif what == "credit":
            worker.credit(blocks, number % count)
        elif what == "wait":
            now += SETTLE_SECONDS
        else:
            worker.report(m.WorkerStats(free_blocks=400), now)
        worker.check_integrity()
        for rank in worker.ranks:
            assert 0 <= rank.free_blocks <= rank.total_blocks
            assert 0 <= rank.room <= rank.limit
            assert rank.kv_tokens >= 0
        assert worker.fit_blocks <= max(r.free_blocks for r in worker.ranks)
        assert worker.imbalance >= 1 - 1e-12
    worker.report(m.WorkerStats(free_blocks=400), now + 2 * SETTLE_SECONDS)
    assert not worker.bookings
    assert (worker.requests, worker.free_blocks, worker.queued_tokens) == (
        0,
        400 // count * count,
        0,
    )


# In the core


def test_placements_go_round_the_ranks_and_keep_them_even(cluster):
    cluster.worker("decode-0", dp_ranks=4, max_running=16, total_blocks=400)
    placed = [cluster.place(32).decode.dp_rank for _ in range(8)]
    assert placed == [0, 1, 2, 3] * 2
    load = cluster.core.members.get("decode-0").load
    assert [rank.requests for rank in load.ranks] == [2] * 4


def test_a_request_waits_until_one_rank_has_room(cluster):
    cluster.worker("decode-0", dp_ranks=2, total_blocks=40)
    apart = m.RankStats(running=1, free_blocks=8)
    cluster.beat("decode-0", running=2, free_blocks=16, ranks=(apart, apart))
    ticket = cluster.ask(160)  # 11 blocks with the token after it
    assert ticket not in cluster.answers
    one = m.RankStats(running=1, free_blocks=4)
    other = m.RankStats(running=1, free_blocks=12)
    cluster.beat("decode-0", running=2, free_blocks=16, ranks=(one, other))
    assert cluster.placement(ticket).decode.dp_rank == 1, "its worker has no more than before"


def test_the_end_of_a_request_frees_its_rank(cluster):
    cluster.worker("decode-0", dp_ranks=2, total_blocks=40)
    first = cluster.place(160, request="a").decode.dp_rank
    second = cluster.place(160, request="b").decode.dp_rank
    assert {first, second} == {0, 1}
    ranks = tuple(m.RankStats(running=1, free_blocks=9) for _ in range(2))
    cluster.wait(0.5)
    cluster.beat("decode-0", running=2, free_blocks=18, ranks=ranks)
    ticket = cluster.ask(160)
    assert ticket not in cluster.answers
    cluster.do(m.AttemptEnded("b", 0))
    assert cluster.placement(ticket).decode.dp_rank == second


def test_what_no_rank_can_ever_hold_is_refused_at_once(cluster):
    cluster.worker("decode-0", dp_ranks=4, total_blocks=40)
    refused = cluster.refuse(160)
    assert refused.reason is m.Reason.INVALID_REQUEST
    assert refused.metadata["allowed"] == "at most 159"
