import fcntl
import gc
import os
import subprocess
import sys

import pytest

from kvtransfer.memory import HEADER_BYTES, Segment, read_header

NONCE = bytes(range(16))


def test_header_tells_what_it_is():
    segment = Segment(5000, NONCE)
    header = read_header(os.pread(segment.fd, HEADER_BYTES, 0))
    assert header.nonce == NONCE
    assert header.data_bytes == 5000
    segment.data[:] = 7
    assert os.pread(segment.fd, 5000, HEADER_BYTES) == b"\x07" * 5000


def test_data_is_aligned_for_any_layout():
    assert Segment(100, NONCE).data.ctypes.data % 4096 == 0


def test_size_is_sealed():
    segment = Segment(5000, NONCE)
    for size in (100, 10**6):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    assert fcntl.fcntl(segment.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL


@pytest.mark.parametrize("raw", [b"", b"TANDEMKV", b"x" * 4096, b"TANDEMKV" + b"\xff" * 100])
def test_what_is_no_segment_is_refused(raw):
    with pytest.raises(ValueError, match="KV segment"):
        read_header(raw)


def test_descriptor_goes_with_the_segment():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        segment = Segment(5000, NONCE)
        segment.close()
        segment.close()
    for _ in range(10):
        Segment(5000, NONCE)
    del segment
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_data_outlives_the_segment():
    data = Segment(5000, NONCE).data
    gc.collect()
    data[:] = 1
    assert data.sum() == 5000


def test_without_memfd_it_is_private_and_says_so(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    segment = Segment(5000, NONCE)
    assert segment.fd is None
    assert "memfd" in segment.why_not_shared
    segment.data[:] = 3
    segment.close()


def test_a_child_process_does_not_inherit_it():
    segment = Segment(5000, NONCE)
    program = f"import os; os.fstat({segment.fd})"
    child = subprocess.run(
        [sys.executable, "-c", program], close_fds=False, capture_output=True, check=False
    )
    assert b"Bad file descriptor" in child.stderr


def test_nonce_has_its_size():
    with pytest.raises(ValueError, match="16"):
        Segment(10, b"short")
