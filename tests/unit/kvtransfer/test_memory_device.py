"""A GPU's blocks with made-up memory: what is tested is the arithmetic, and who may move them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import TransportError
from kvtransfer.memory import DeviceSegment, Segment
from kvtransfer.offload import Offload
from kvtransfer.transports.build import make_transports

NONCE = bytes(range(16))
BASE = 0x7F0000000000


class Copies:
    """A GPU of 100 bytes."""

    def __init__(self) -> None:
        self.bytes = np.zeros(100, np.uint8)

    def to_host(self, address: int, out: np.ndarray) -> None:
        out[:] = self.bytes[address - BASE : address - BASE + out.nbytes]

    def from_host(self, address: int, data: np.ndarray) -> None:
        self.bytes[address - BASE : address - BASE + data.nbytes] = data


def segment(host_bytes: int = 50) -> DeviceSegment:
    return DeviceSegment(BASE, 100, 2, host_bytes, NONCE, Copies())


def test_regions_are_the_gpus_then_the_hosts():
    it = segment()
    vram, dram = it.regions
    assert (vram.offset, vram.address, vram.nbytes, vram.kind, vram.device) == (
        0,
        BASE,
        100,
        "VRAM",
        2,
    )
    assert (dram.offset, dram.address, dram.nbytes, dram.kind, dram.device) == (
        100,
        it.host.ctypes.data,
        50,
        "DRAM",
        0,
    )
    assert it.data_bytes == 150
    assert len(segment(0).regions) == 1


@given(st.integers(0, 150), st.integers(0, 150))
def test_bytes_are_one_run_over_both_memories(start, size):
    it, plain = segment(), np.zeros(150, np.uint8)
    size = min(size, 150 - start)
    data = np.arange(1, size + 1, dtype=np.uint8)
    it.write(start, data)
    plain[start : start + size] = data
    assert np.array_equal(it.read(0, 150), plain)
    assert np.array_equal(it.read(start, size), data)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (150, 1), (140, 11)])
def test_nothing_is_outside(offset, size):
    with pytest.raises(ValueError):
        segment().read(offset, size)
    with pytest.raises(ValueError):
        segment().write(offset, np.zeros(size, np.uint8))


def test_a_nonce_has_its_size():
    with pytest.raises(ValueError):
        DeviceSegment(BASE, 100, 0, 0, b"short", Copies())


async def test_transports_of_host_memory_say_why_not():
    offload = Offload()
    made = make_transports(
        ["shm", "nixl", "ucx", "tcp"], segment(), offload, host="127.0.0.1", port=0
    )
    assert [t.name for t in made] == ["shm", "nixl", "ucx", "tcp"]
    for transport in made:
        if transport.name == "nixl":
            assert "memory" not in transport.why_not()
            continue
        assert "GPU" in transport.why_not()
        with pytest.raises(TransportError, match="GPU"):
            await transport.start()
        with pytest.raises(TransportError):
            transport.ticket()
        await transport.close()
    offload.close()


def test_of_host_memory_each_is_made():
    offload, host = Offload(), Segment(4096, NONCE)
    names = ["tcp", "ucx", "nixl", "shm"]
    made = make_transports(names, host, offload, host="127.0.0.1", port=0)
    assert [t.name for t in made] == names
    offload.close()
    host.close()
