import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import TransportError
from kvtransfer.memory import Region
from kvtransfer.transports.base import Read
from kvtransfer.transports.descriptors import Regions, described, packed, unpacked

KINDS = ("DRAM", "VRAM")


@st.composite
def memories(draw) -> Regions:
    """Regions at addresses far from each other."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    regions, offset = [], 0
    for i, size in enumerate(sizes):
        kind = draw(st.sampled_from(KINDS))
        regions.append(Region(offset, (i + 1) << 20, size, kind, draw(st.integers(0, 3))))
        offset += size
    return Regions(regions)


@st.composite
def problems(draw):
    remote, local = draw(memories()), draw(memories())
    reads = []
    for _ in range(draw(st.integers(0, 6))):
        length = draw(st.integers(0, min(remote.nbytes, local.nbytes)))
        reads.append(
            Read(
                draw(st.integers(0, remote.nbytes - length)),
                draw(st.integers(0, local.nbytes - length)),
                length,
            )
        )
    return remote, local, reads


def byte_of(regions: Regions, offset: int) -> tuple[str, int, int]:
    """Kind, address and device of one byte, the slow way."""
    for region in regions.regions:
        if region.offset <= offset < region.offset + region.nbytes:
            return region.kind, region.address + offset - region.offset, region.device
    raise AssertionError(offset)


@given(problems())
def test_every_byte_goes_where_it_was_meant_to(problem):
    remote, local, reads = problem
    wanted = sorted(
        (byte_of(remote, read.remote + i), byte_of(local, read.local + i))
        for read in reads
        for i in range(read.length)
    )
    said = sorted(
        (
            (work.remote_kind, int(from_[0]) + i, int(from_[2])),
            (work.local_kind, int(to[0]) + i, int(to[2])),
        )
        for work in described(reads, remote, local)
        for from_, to in zip(work.remote, work.local, strict=True)
        for i in range(int(from_[1]))
    )
    assert said == wanted


@given(problems())
def test_lists_are_of_one_kind_each_and_sides_match(problem):
    remote, local, reads = problem
    lists = described(reads, remote, local)
    assert len({(work.remote_kind, work.local_kind) for work in lists}) == len(lists)
    for work in lists:
        assert len(work.remote)
        assert np.array_equal(work.remote[:, 1], work.local[:, 1])
        assert work.remote[:, 1].min() > 0


HUNDRED = Regions([Region(0, 4096, 60), Region(60, 2**40, 40, "VRAM", 1)])


@pytest.mark.parametrize(
    "read",
    [
        Read(100, 0, 1),
        Read(0, 100, 1),
        Read(99, 0, 2),
        Read(-1, 0, 1),
        Read(0, -1, 1),
        Read(0, 0, -1),
        Read(2**62, 2**62, 2**62),
        Read(2**63, 0, 2**10),
        Read(0, 0, 2**70),
    ],
)
def test_reads_outside_are_refused(read):
    with pytest.raises(TransportError):
        described([Read(0, 0, 4), read], HUNDRED, HUNDRED)


def test_regions_travel():
    assert unpacked(packed(HUNDRED.regions)).regions == HUNDRED.regions


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "[1]",
        "[[0, 1, 2]]",
        '[[0, 4096, 10, "FILE", 0]]',
        '[[0, -1, 10, "DRAM", 0]]',
        '[[0, 4096, -10, "DRAM", 0]]',
        '[[0, 9223372036854775807, 10, "DRAM", 0]]',
        '[[5, 4096, 10, "DRAM", 0]]',
        '[[0, 4096, 10, "DRAM", 0], [20, 8192, 10, "DRAM", 0]]',
    ],
)
def test_a_ticket_may_be_nonsense(text):
    with pytest.raises(ValueError):
        unpacked(text)
