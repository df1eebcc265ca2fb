"""The sink's core, row by row of its table; histories are tests/simulation's."""

import pytest

from kvtransfer.errors import KvSourceLostError, TransportError
from kvtransfer.fetching import (
    BATCH_BYTES,
    WAITING_PIECES,
    Announced,
    Complete,
    Ended,
    FetchCore,
    Limits,
    Opened,
    Read,
    ReadDone,
    ReadFailed,
    Renew,
    Renewed,
    Tick,
)
from kvtransfer.layout import gqa_layout
from kvtransfer.pieces import Piece

LAYOUT = gqa_layout("m", layers=4, kv_heads=1, head_dim=8, dtype="bfloat16", block_tokens=4)
LAYER = LAYOUT.layer_bytes
LIMITS = Limits(deadline=100.0, stall_seconds=5.0, renew_seconds=4.0)


def piece(index: int, first: int = 0, layers: int = 4) -> Piece:
    offset = index * LAYOUT.block_bytes + first * LAYER
    return Piece(index, first, layers, offset, layers * LAYER, 1, 7 + first)


def core(keys: int = 2, *, opened: bool = True) -> FetchCore:
    made = FetchCore(LAYOUT, keys, "a:1", LIMITS, 0.0)
    if opened:
        assert made.handle(Opened(30.0), 0.0) == []
    return made


def cause(core: FetchCore) -> str:
    assert core.over
    assert isinstance(core.error, KvSourceLostError)
    return core.error.metadata["cause"]


def test_reads_what_was_announced_and_completes():
    it = core()
    (read,) = it.handle(Announced((piece(0), piece(1, 0, 2))), 1.0)
    assert read == Read((piece(0), piece(1, 0, 2)), 5.0)
    assert it.handle(Announced((piece(1, 2, 2),)), 1.0) == []  # One read at a time.
    first, read = it.handle(ReadDone(), 2.0)
    assert first == Complete(0, {(0, 4): 7})
    assert read == Read((piece(1, 2, 2),), 5.0)
    assert it.handle(Ended(), 2.0) == []
    (second,) = it.handle(ReadDone(), 3.0)
    assert second == Complete(1, {(0, 2): 7, (2, 2): 9})
    assert it.over
    assert it.error is None
    assert it.bytes == 2 * LAYOUT.block_bytes


def test_nothing_happens_once_it_is_over():
    it = core(1)
    it.handle(Announced((piece(0),)), 0.0)
    it.handle(ReadDone(), 0.0)
    assert it.over
    for event in (Announced((piece(0),)), ReadDone(), Ended(), Renewed(False), Tick()):
        assert it.handle(event, 1000.0) == []
    assert it.error is None


def test_announced_twice_is_read_once():
    it = core(1)
    (read,) = it.handle(Announced((piece(0, 0, 2), piece(0, 0, 2))), 0.0)
    assert read.pieces == (piece(0, 0, 2),)


def test_wrong_bytes_are_read_once_more_and_then_cost_one_block():
    it = core()
    it.handle(Announced((piece(0), piece(1))), 0.0)
    done, again = it.handle(ReadDone(wrong=(piece(0),)), 0.0)
    assert done == Complete(1, {(0, 4): 7})
    assert again == Read((piece(0),), 5.0)
    assert it.handle(ReadDone(wrong=(piece(0),)), 0.0) == []
    assert it.over
    assert it.error is None
    assert it.arrivals.complete == (False, True)
    assert (it.arrivals.corrupt, it.corrupt_reads, it.bytes) == (1, 1, LAYOUT.block_bytes)


def test_stale_memory_ends_it():
    it = core()
    it.handle(Announced((piece(0),)), 0.0)
    assert it.handle(ReadDone(stale=True), 0.0) == []
    assert cause(it) == "STALE"
    assert it.arrivals.complete == (False, False)


def test_a_read_that_fails_ends_it():
    it = core()
    it.handle(Announced((piece(0),)), 0.0)
    it.handle(ReadFailed(TransportError("gone")), 0.0)
    assert cause(it) == "TRANSPORT_FAILED"


def test_what_was_announced_is_read_although_the_call_broke():
    it = core()
    it.handle(Announced((piece(0),)), 0.0)
    broke = KvSourceLostError("the call broke")
    assert it.handle(Ended(broke), 0.0) == []
    assert not it.over
    assert it.handle(ReadDone(), 0.0) == [Complete(0, {(0, 4): 7})]
    assert it.error is broke


def test_an_end_before_everything_was_announced():
    it = core()
    it.handle(Ended(), 0.0)
    assert cause(it) == "INCOMPLETE"


def test_a_piece_that_can_not_be():
    it = core()
    it.handle(Announced((piece(5),)), 0.0)
    assert cause(it) == "TRANSPORT_FAILED"


def test_no_answer():
    it = core(opened=False)
    assert it.timer == 5.0
    assert it.handle(Tick(), 4.9) == []
    it.handle(Tick(), 5.0)
    assert cause(it) == "TIMEOUT"


def test_renewals_one_at_a_time():
    it = core()
    assert it.timer == 4.0
    assert it.handle(Tick(), 4.0) == [Renew()]
    assert it.timer == LIMITS.deadline
    assert it.handle(Renewed(True), 4.5) == []
    assert it.timer == 8.5


def test_renewals_are_four_a_lease():
    it = core(opened=False)
    it.handle(Opened(2.0), 1.0)
    assert it.timer == 1.5


@pytest.mark.parametrize("between", [True, None])
def test_two_renewals_without_an_answer(between):
    it = core()
    it.handle(Tick(), 4.0)
    it.handle(Renewed(None), 5.0)
    assert not it.over
    it.handle(Tick(), 9.0)
    it.handle(Renewed(between), 9.0)
    if between is None:
        assert cause(it) == "UNAVAILABLE"
        return
    it.handle(Tick(), 13.0)
    it.handle(Renewed(None), 13.0)
    assert not it.over  # Not in a row.


def test_a_lease_that_ended():
    it = core()
    it.handle(Tick(), 4.0)
    it.handle(Renewed(False), 5.0)
    assert cause(it) == "LEASE_LOST"


def test_the_deadline():
    it = core()
    it.handle(Announced((piece(0),)), 0.0)
    it.handle(Tick(), 100.0)
    assert cause(it) == "TIMEOUT"


def test_reads_are_bounded_in_time_and_size():
    it = FetchCore(LAYOUT, 2, "a:1", LIMITS, 0.0)
    it.handle(Opened(30.0), 0.0)
    (read,) = it.handle(Announced((piece(0),)), 98.0)
    assert read.timeout == 2.0
    layers = BATCH_BYTES // LAYER // 4 * 3
    big = gqa_layout("m", layers=layers, kv_heads=1, head_dim=8, dtype="bfloat16", block_tokens=4)
    it = FetchCore(big, 3, "a:1", LIMITS, 0.0)
    it.handle(Opened(30.0), 0.0)
    pieces = tuple(
        Piece(i, 0, layers, i * big.block_bytes, big.block_bytes, 1, 0) for i in range(3)
    )
    (read,) = it.handle(Announced(pieces), 0.0)
    assert read.pieces == pieces[:1]


def test_more_announcements_than_there_can_be():
    it = core(1)
    it.handle(Announced((piece(0),)), 0.0)  # Being read.
    it.handle(Announced((piece(0),) * (WAITING_PIECES + 4)), 0.0)
    assert not it.over
    it.handle(Announced((piece(0),)), 0.0)
    assert cause(it) == "TRANSPORT_FAILED"
