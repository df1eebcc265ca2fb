import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.arrivals import Arrivals
from kvtransfer.errors import TransportError
from kvtransfer.layout import gqa_layout
from kvtransfer.pieces import Piece, PieceGrid
from kvtransfer.reading import merged
from kvtransfer.transports.base import Read
from kvtransfer.transports.batches import batches
from kvtransfer.transports.tcp_protocol import MAX_BYTES, MAX_RANGES

LAYOUT = gqa_layout("m", layers=6, kv_heads=1, head_dim=8, dtype="bfloat16", block_tokens=4)
SIZE = LAYOUT.layer_bytes


def piece(index: int, first: int, layers: int, **changes) -> Piece:
    fields = {
        "key_index": index,
        "first_layer": first,
        "layers": layers,
        "offset": first * SIZE,
        "length": layers * SIZE,
        "generation": 1,
        "checksum": 0,
    }
    return Piece(**{**fields, **changes})


@given(st.integers(1, 80), st.integers(1, 90))
def test_grid_covers_every_layer_once(layers, per_piece):
    grid = PieceGrid(layers, per_piece)
    covered = [layer for i in range(grid.count) for layer in range(*_ends(grid.span(i)))]
    assert covered == list(range(layers))
    assert grid.indices(0, layers) == range(grid.count)
    for index in range(grid.count):
        assert grid.indices(*grid.span(index)) == range(index, index + 1)


def _ends(span: tuple[int, int]) -> tuple[int, int]:
    return span[0], span[0] + span[1]


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-1, 2)])
def test_grid_of_nothing(numbers):
    with pytest.raises(ValueError):
        PieceGrid(*numbers)


def test_block_is_complete_with_its_last_layer():
    arrivals = Arrivals(LAYOUT, 2)
    assert not arrivals.verified(piece(0, 2, 4))
    assert arrivals.verified(piece(0, 0, 2))
    assert arrivals.complete == (True, False)
    assert not arrivals.done
    assert arrivals.verified(piece(1, 0, 6))
    assert arrivals.done


def test_a_piece_is_claimed_once():
    arrivals = Arrivals(LAYOUT, 1)
    assert arrivals.claim(piece(0, 0, 4))
    assert not arrivals.claim(piece(0, 0, 4))
    assert not arrivals.claim(piece(0, 1, 2))
    with pytest.raises(TransportError, match="part of them"):
        arrivals.claim(piece(0, 2, 4))
    assert arrivals.claim(piece(0, 4, 2))
    assert not arrivals.verified(piece(0, 4, 2))
    assert arrivals.verified(piece(0, 0, 4))
    assert not arrivals.verified(piece(0, 0, 4))
    assert arrivals.done


def test_a_corrupt_block_stays_so_and_ends_the_wait():
    arrivals = Arrivals(LAYOUT, 2)
    arrivals.verified(piece(0, 0, 4))
    arrivals.failed(piece(0, 4, 2))
    arrivals.failed(piece(0, 4, 2))
    assert not arrivals.claim(piece(0, 4, 2))
    assert not arrivals.verified(piece(0, 4, 2))
    assert arrivals.verified(piece(1, 0, 6))
    assert arrivals.done
    assert arrivals.complete == (False, True)
    assert arrivals.corrupt == 1


@pytest.mark.parametrize(
    "wrong",
    [
        piece(2, 0, 2),
        piece(0, 5, 2),
        piece(0, 0, 0),
        piece(0, 0, 2, length=SIZE),
        piece(0, 0, 2, length=0),
        piece(0, 0, 2, offset=1),
        piece(0, 2, 2, offset=0),
        piece(0, 2, 2, offset=LAYOUT.block_bytes),
    ],
)
def test_pieces_that_can_not_be_are_errors(wrong):
    with pytest.raises(TransportError, match="can't be"):
        Arrivals(LAYOUT, 2).claim(wrong)


READS = st.lists(
    st.builds(Read, st.integers(0, 50), st.integers(0, 50), st.integers(0, 20)), max_size=30
)


def moved(reads) -> list[tuple[int, int]]:
    return [(r.remote + i, r.local + i) for r in reads for i in range(r.length)]


@given(READS)
def test_merged_reads_move_the_same_bytes(reads):
    assert moved(merged(reads)) == moved(reads)


def test_neighbours_become_one_read():
    reads = [Read(i * 10, 500 + i * 10, 10) for i in range(9)]
    assert merged(reads) == [Read(0, 500, 90)]


@given(st.lists(st.integers(0, 3 * MAX_BYTES), max_size=8), st.integers(0, 600))
def test_batches_keep_the_limits_and_lose_nothing(lengths, small):
    reads, at = [], 0
    for length in [*lengths, *[3] * small]:
        reads.append(Read(at, 2 * at, length))
        at += length
    requests = batches(reads, MAX_RANGES, MAX_BYTES)
    for request in requests:
        assert 0 < len(request) <= MAX_RANGES
        assert sum(r.length for r in request) <= MAX_BYTES
        assert all(r.length for r in request)
    position = 0
    for read in (r for request in requests for r in request):
        assert read.local - read.remote == _shift(reads, read.remote)
        assert read.remote == position
        position += read.length
    assert position == at


def _shift(reads: list[Read], remote: int) -> int:
    owner = next(r for r in reads if r.remote <= remote < r.remote + r.length)
    return owner.local - owner.remote
