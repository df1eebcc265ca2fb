"""The benchmark: what it computes, that its baselines do the work, and that it runs."""

import itertools
import json

import numpy as np
import pytest

from kvtransfer.bench import __main__ as command
from kvtransfer.bench import raw_tcp, reads, rounds, show
from kvtransfer.bench.figures import Machine, Report, row
from kvtransfer.bench.peer import Peer, PeerError
from kvtransfer.bench.reads import Shape
from kvtransfer.bench.rounds import Times
from kvtransfer.bench.serving import serve_transport
from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.transports.base import Read


def times(*wall: float, cpu: float = 0.0) -> Times:
    return Times(wall, (cpu,) * len(wall), (cpu,) * len(wall))


def test_a_ratio_is_the_median_of_rounds_and_not_moved_by_one_bad_one():
    found = rounds.ratio(times(1, 1, 1, 1, 100), times(2, 2, 2, 2, 2))
    assert found.value == 0.5
    assert rounds.ratio(times(2, 2, 2), times(1, 1, 1)) == rounds.Ratio(2.0, 0.0)


async def test_subjects_take_turns_in_alternating_order_with_numbers_of_their_own():
    ran: list[tuple[str, int]] = []

    def subject(name: str):
        async def run(number: int) -> None:
            ran.append((name, number))

        return run

    found = await rounds.take_turns({n: subject(n) for n in "ab"}, 3)
    names = "".join(name for name, _ in ran)
    assert names == "baabbaabba"
    assert [number for _, number in ran] == list(range(10))
    assert len(found["a"].wall) == len(found["b"].wall) == 3


@pytest.mark.parametrize("shape", [Shape(2**16), Shape(2**20), Shape(2**20, 16)])
def test_reads_of_a_shape_are_its_bytes_once_and_inside(shape):
    span = 4 * 2**20
    for number in range(20):
        done = shape.reads(number, span)
        assert len(done) == shape.blocks
        for start in ("remote", "local"):
            offsets = sorted(getattr(read, start) for read in done)
            assert offsets[0] >= 0
            assert offsets[-1] + done[0].length <= span
            assert all(b - a >= done[0].length for a, b in itertools.pairwise(offsets))
        assert sum(read.length for read in done) == shape.nbytes
    assert shape.reads(0, span) != shape.reads(1, span)


def test_cpu_time_of_another_process_is_seen():
    with Peer(4096) as peer:
        before = rounds.cpu_seconds(peer.pid)
        for _ in range(20):
            with pytest.raises(PeerError, match="no such"):
                peer.start(fail)
        assert rounds.cpu_seconds(peer.pid) > before


async def fail(segment, argument, stack):
    raise KeyError("no such")


@pytest.mark.parametrize("streams", [1, 2])
def test_the_socket_loop_moves_the_bytes_it_is_asked_for(streams):
    size = 3 * 2**20
    segment = Segment(size, bytes(NONCE_BYTES))
    with Peer(size) as peer:
        loop = raw_tcp.RawTcp(peer.start(raw_tcp.serve), streams, segment)
        part = 2**20
        loop.read([Read(0, (i + 1) * part, part) for i in range(streams)])
        loop.close()
    expected = np.zeros(size, np.uint8)
    expected[part : part * (1 + streams)] = 7
    assert np.array_equal(segment.data, expected)


@pytest.mark.parametrize("name", ["nixl", "ucx"])
async def test_the_straight_use_of_a_library_moves_the_bytes_it_is_asked_for(name):
    pytest.importorskip({"nixl": "nixl_cu12", "ucx": "ucxx"}[name])
    size = 2**20
    segment = Segment(size, bytes(NONCE_BYTES))
    with Peer(size) as peer:
        if name == "nixl":
            raw = reads.RawNixl(segment, peer.start(serve_transport, name))
        else:
            raw = reads.RawUcx(segment, peer.start(reads.serve_raw_ucx))
        await raw.read([Read(5, 100, 1000), Read(2000, 5000, 2**17)])
        raw.close()
    expected = np.zeros(size, np.uint8)
    expected[100:1100] = expected[5000 : 5000 + 2**17] = 7
    assert np.array_equal(segment.data, expected)


def test_a_missed_target_is_said_in_the_table():
    def measured(mine: float):
        return row("tcp", "x", 10**9, 1, times(*[mine] * 3), baseline=times(1, 1, 1), target=0.9)

    where = Machine(2, "here", "3", 0.0)
    fine, slow = (
        show.text(Report(where, {}, (measured(m),), (), (), {"ucx": "not installed"}))
        for m in (1.0, 2.0)
    )
    assert "missed" not in fine
    assert "missed" in slow
    assert "not measured: ucx: not installed" in fine


def test_the_command_measures_and_writes(tmp_path, capsys):
    file, picture = tmp_path / "a" / "b.json", tmp_path / "c.png"
    arguments = ["--transports", "shm", "tcp", "--mib", "1", "--rounds", "2"]
    assert command.main([*arguments, "--json", str(file), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "memcpy" in shown
    report = json.loads(file.read_text())
    subjects = {r["subject"] for r in report["rows"]}
    assert {"shm", "tcp", "fetch, shm", "fetch, tcp", "FP8 from float32"} <= subjects
    assert all(r["ours"]["seconds"] > 0 for r in report["rows"])
    assert {r["subject"] for r in report["registrations"]} == {"shm", "tcp"}
    assert report["absent"] == {}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--mib", "0"], ["--transports", "x"], ["--parts"]])
def test_bad_options_are_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
