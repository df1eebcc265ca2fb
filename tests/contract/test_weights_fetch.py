"""A model's folder between real processes: whatever happens, the right bytes or a clear error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from kvtransfer.errors import (
    NoTransportError,
    WeightsDifferError,
    WeightsLostError,
)
from kvtransfer.policy import ExportPolicy
from kvtransfer.transports.available import why_not_here
from kvtransfer.weights import giving, wire
from kvtransfer.weights.describing import Digests, describe
from kvtransfer.weights.driving import Means
from kvtransfer.weights.fetch import fetch_weights
from kvtransfer.weights.finding import Wanted
from kvtransfer.weights.manifest import DIGEST_BYTES, File, Manifest
from kvtransfer.weights.source import Given, WeightsSource
from services.runtime.server import Server
from services.runtime.settings import ServerSettings
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1 import weights_pb2_grpc
from tests.contract.weights_peer import MODEL, SERVICE

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PIECE = 64 * 1024
NAMES = ("shm", "tcp", "ucx", "nixl")
ABSENT = why_not_here(("ucx", "nixl"))
PATIENCE = 60.0
SLOW = 1.0 * 2**20
"""Bytes a second of a source that is to be caught in the middle: 3 s for the whole folder."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """48 pieces, about."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"hidden": 1}')
    (folder / "tokenizer.json").write_bytes(b"t" * 1000)
    (folder / "empty.txt").touch()
    (folder / "run.py").write_text("raise SystemExit")
    for shard in range(3):
        data = random.Random(shard).randbytes(15 * PIECE + 100 * shard)
        (folder / f"model-{shard}.safetensors").write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    """The files that count, by name."""
    hidden = (".lock", ".part")
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(hidden)}


def expected(model: Path) -> dict[str, bytes]:
    return {name: data for name, data in read(model).items() if not name.endswith(".py")}


class Process:
    """weights_peer.py."""

    def __init__(self, **options) -> None:
        paths = [str(ROOT), str(ROOT / "protos" / "gen")]
        options = {"transports": ["tcp"], "piece_bytes": PIECE, **options}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "weights_peer.py"), json.dumps(options)],
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "UCX_LOG_FILE": "/dev/stderr",
            },
        )

    async def says(self) -> dict:
        async with asyncio.timeout(PATIENCE):
            line = await asyncio.to_thread(self.process.stdout.readline)
        assert line, "it ended"
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextlib.asynccontextmanager
async def sources(*options: dict):
    """Processes that give, and their addresses."""
    found = [Process(do="give", **one) for one in options]
    try:
        yield found, [(await one.says())["address"] for one in found]
    finally:
        for one in found:
            one.kill()


@contextlib.asynccontextmanager
async def serving(servicer):
    """A servicer in this process, and its address."""
    server = Server(ServerSettings(), "source")
    server.add(weights_pb2_grpc.add_WeightsServiceServicer_to_server, servicer, SERVICE)
    try:
        yield await server.start()
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def source_here(folder: Path, **more):
    source = WeightsSource(
        Given(MODEL, folder, Digests()), transports=["tcp"], piece_bytes=PIECE, **more
    )
    async with serving(source) as address:
        yield source, address
    await source.close()


def fetch(folder, peers, name="tcp", **more):
    folder.mkdir(exist_ok=True)
    wanted = Wanted(MODEL, peers, more.pop("digest", None), more.pop("region", ""))
    means = Means([name], stall_seconds=more.pop("stall_seconds", 15.0))
    return asyncio.wait_for(fetch_weights(folder, wanted, means, **more), PATIENCE)


@pytest.mark.parametrize("name", NAMES)
async def test_a_folder_comes_whole_over_every_transport(model, tmp_path, name):
    if name in ABSENT:
        pytest.skip(f"{name}: {ABSENT[name]}")
    place = tmp_path / "place"
    stages = []
    async with sources({"folder": str(model), "transports": [name]}) as (_, peers):
        report = await fetch(place, peers, name, watch=lambda *how: stages.append(how))
        assert read(place) == expected(model)
        assert report.manifest == describe(model, Digests(), piece_bytes=PIECE)
        assert report.peers[peers[0]].transport == name
        assert report.bytes == report.peers[peers[0]].bytes == report.manifest.nbytes
        assert stages[-1] == ("fetch", report.bytes, report.bytes)
        again = await fetch(place, peers, name)
    assert (again.bytes, again.here, dict(again.peers)) == (0, report.bytes, {})


async def test_several_peers_share_the_load(model, tmp_path):
    one = {"folder": str(model), "rate": SLOW}
    async with sources(one, one, one) as (_, peers):
        report = await fetch(tmp_path / "place", peers)
    assert read(tmp_path / "place") == expected(model)
    assert sorted(report.peers) == sorted(peers)
    for peer in report.peers.values():
        assert peer.bytes > 5 * PIECE


async def test_a_source_killed_in_the_middle_another_goes_on(model, tmp_path):
    one = {"folder": str(model), "rate": SLOW}
    came = asyncio.Event()
    async with sources(one, one) as (found, peers):
        fetching = asyncio.create_task(
            fetch(
                tmp_path / "place",
                peers,
                watch=lambda stage, done, total: stage == "fetch" and came.set(),
            )
        )
        await asyncio.wait_for(came.wait(), PATIENCE)
        assert not fetching.done()
        found[0].kill()
        report = await fetching
    assert read(tmp_path / "place") == expected(model)
    assert report.peers[peers[1]].bytes > 0


@pytest.mark.parametrize("name", ["shm", "tcp"])
async def test_a_frozen_source_is_given_up_and_another_asked(model, tmp_path, name):
    one = {"folder": str(model), "rate": SLOW, "transports": [name]}
    came = asyncio.Event()
    async with sources(one, one) as (found, peers):
        fetching = asyncio.create_task(
            fetch(
                tmp_path / "place",
                peers,
                name,
                stall_seconds=5.0,
                watch=lambda stage, done, total: stage == "fetch" and came.set(),
            )
        )
        await asyncio.wait_for(came.wait(), PATIENCE)
        found[0].process.send_signal(signal.SIGSTOP)
        await fetching
    assert read(tmp_path / "place") == expected(model)


async def test_a_killed_sink_goes_on_where_it_was(model, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    async with sources({"folder": str(model), "rate": SLOW}) as (_, peers):
        sink = Process(do="take", folder=str(place), peers=peers)
        try:
            while (came := (await sink.says())["bytes"]) < 8 * PIECE:
                pass
        finally:
            sink.kill()
        assert not (place / "config.json").exists()
        report = await fetch(place, peers)
    assert read(place) == expected(model)
    assert report.here >= came
    assert report.bytes == report.manifest.nbytes - report.here


async def test_a_liar_is_dropped_by_name_and_others_go_on(model, tmp_path):
    one = {"folder": str(model), "rate": SLOW}
    async with sources(one | {"wrong": [-1]}, one) as (_, (liar, honest)):
        report = await fetch(tmp_path / "place", [liar, honest])
    assert read(tmp_path / "place") == expected(model)
    assert "whose bytes are not those described" in report.dropped[liar]
    assert (report.peers[liar].bytes, report.peers[honest].bytes) == (0, report.bytes)


async def test_a_piece_that_stays_wrong_ends_it_and_never_counts(model, tmp_path):
    place = tmp_path / "place"
    async with sources({"folder": str(model), "wrong": [3 * PIECE]}) as (_, (liar,)):
        with pytest.raises(WeightsLostError, match=f"{liar}: it brought 2 pieces"):
            await fetch(place, [liar])
    assert not list(place.glob("model-*.safetensors"))
    assert not (place / "config.json").exists()
    async with source_here(model) as (_, address):
        report = await fetch(place, [address])
    assert read(place) == expected(model)
    assert report.here > 0


async def test_peers_that_have_different_files(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    digest = describe(model, Digests(), piece_bytes=PIECE).digest
    async with source_here(model) as (_, one), source_here(other) as (_, two):
        with pytest.raises(WeightsDifferError, match="nothing says which are meant") as raised:
            await fetch(tmp_path / "place", [one, two])
        assert f"{one} has {digest.hex()}" in raised.value.message
        report = await fetch(tmp_path / "place", [two, one], digest=digest)
        assert set(report.peers) == {one}
        with pytest.raises(WeightsLostError, match="it has other files"):
            await fetch(tmp_path / "third", [two], digest=digest)
    assert read(tmp_path / "place") == expected(model)


async def test_nobody_gives(model, tmp_path):
    async with source_here(model, policy=ExportPolicy(region="eu")) as (_, address):
        with pytest.raises(WeightsLostError, match="the source's region, eu"):
            await fetch(tmp_path / "place", [address])
        with pytest.raises(WeightsLostError, match="serves m, not 'other'"):
            await fetch_weights(tmp_path, Wanted("other", [address], region="eu"), Means(["tcp"]))
        with pytest.raises(WeightsLostError, match="no transport fits both sides"):
            await fetch(tmp_path / "place", [address], "shm", region="eu")
        await fetch(tmp_path / "place", [address], region="eu")
    with pytest.raises(WeightsLostError, match="can't be reached"):
        await fetch(tmp_path / "nowhere", [address])
    with pytest.raises(WeightsLostError, match="no peer is known"):
        await fetch(tmp_path / "nowhere", [])
    with pytest.raises(NoTransportError):
        await fetch_of_no_transport(model, tmp_path)


async def fetch_of_no_transport(model, tmp_path):
    async with source_here(model) as (_, address):
        means = Means(["shm"], host_id="")
        await fetch_weights(tmp_path / "nowhere", Wanted(MODEL, [address]), means)


async def test_a_server_that_gives_no_weights(tmp_path):
    server = Server(ServerSettings(), "other")
    address = await server.start()
    with pytest.raises(WeightsLostError, match="no worker that gives weights"):
        await fetch(tmp_path / "place", [address])
    await server.stop(0)


async def test_no_room_is_told_before_anything_is_written(model, tmp_path):
    place = tmp_path / "place"

    def no_room(nbytes: int) -> None:
        raise OSError(f"{nbytes} are too many")

    async with source_here(model) as (source, address):
        with pytest.raises(OSError, match="are too many"):
            await fetch(place, [address], need_space=no_room)
        assert source.given_bytes == 0
    assert sum(p.stat().st_blocks for p in place.iterdir()) == 0


class Hostile(weights_pb2_grpc.WeightsServiceServicer):
    """Says what it is told to."""

    def __init__(self, messages, give=()) -> None:
        self.messages = messages
        self.give = give
        self.gave = False

    async def Describe(self, request, context):  # noqa: N802
        for message in self.messages:
            yield message

    async def Give(self, requests, context):  # noqa: N802
        self.gave = True
        for message in self.give:
            yield message
        async for _ in requests:
            pass


def described(*files: File) -> list[pb.DescribeResponse]:
    """Without the checks that a Manifest makes."""
    folder = pb.Folder(digest=b"x" * 32, piece_bytes=PIECE, files=len(files))
    parts = [pb.FilePart(name=f.name, size=f.size, digests=f.digests) for f in files]
    return [
        pb.DescribeResponse(folder=folder),
        *(pb.DescribeResponse(file=part) for part in parts),
    ]


ONE = b"d" * DIGEST_BYTES


@pytest.mark.parametrize(
    "messages",
    [
        [],
        described(),
        described(File("../config.json", 1, ONE)),
        described(File("/tmp/config.json", 1, ONE)),
        described(File("a/../../config.json", 1, ONE)),
        described(File(".bashrc", 1, ONE)),
        described(File("sitecustomize.py", 1, ONE)),
        described(File("a.json", 1, ONE), File("A.json", 1, ONE)),
        described(File("a.safetensors", 2**63, ONE)),
        described(File("a.safetensors", 10 * PIECE, ONE)),
        described(File("config.json", 1, ONE)),
        [pb.DescribeResponse(folder=pb.Folder(digest=b"", piece_bytes=2**31, files=2**31))],
    ],
)
async def test_a_hostile_description_writes_nothing(tmp_path, messages):
    hostile = Hostile(messages)
    async with serving(hostile) as address:
        with pytest.raises(WeightsLostError, match=address):
            await fetch(tmp_path / "place", [address])
    assert list((tmp_path / "place").iterdir()) == []
    assert not hostile.gave


def opened(name="tcp", window=4, **attributes) -> pb.GiveResponse:
    ticket = wire.offer_to(wire.Offer(name, attributes))
    return pb.GiveResponse(opened=pb.GiveOpened(transport=ticket, why="", window=window))


@pytest.mark.parametrize(
    ("give", "why"),
    [
        ([pb.GiveResponse()], "did not open the call"),
        ([pb.GiveResponse(laid_out=pb.LaidOut(number=0))], "did not open the call"),
        ([opened("nixl")], "not offered"),
        ([opened(host="127.0.0.1", port="x", nonce="00")], "makes no sense"),
        ([opened(host="127.0.0.1", port="1", nonce="00" * 16)], "can't be connected to"),
    ],
)
async def test_a_hostile_source_is_given_up(tmp_path, monkeypatch, give, why):
    monkeypatch.setattr("kvtransfer.weights.plan.FIRST_PAUSE_SECONDS", 0.01)
    manifest = Manifest(PIECE, (File("config.json", 1, ONE),))
    async with serving(Hostile(list(wire.described(manifest)), give)) as address:
        with pytest.raises(WeightsLostError, match=why):
            await fetch(tmp_path / "place", [address])
    assert not (tmp_path / "place" / "config.json").exists()


async def ask(address: str, *requests: pb.GiveRequest) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = weights_pb2_grpc.WeightsServiceStub(channel).Give()
        with pytest.raises(grpc.aio.AioRpcError) as raised:  # noqa: PT012 - at any of them
            for request in requests:
                await call.write(request)
            while await call.read() is not grpc.aio.EOF:
                pass
        return raised.value


async def test_a_hostile_sink_gets_an_error_and_holds_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(giving, "SILENT_SECONDS", 0.2)
    manifest = describe(model, Digests(), piece_bytes=PIECE)
    good = pb.GiveOpen(
        model=MODEL, digest=manifest.digest, offers=[wire.offer_to(wire.Offer("tcp", {}))]
    )
    begin = pb.GiveRequest(open=good)
    async with source_here(model) as (_, address):
        for requests, code, words in [
            ([wire.want_to([0])], "INVALID_ARGUMENT", "before the call is opened"),
            ([begin, begin], "INVALID_ARGUMENT", "opened twice"),
            ([begin, wire.want_to([manifest.pieces])], "INVALID_ARGUMENT", "is asked for"),
            ([begin, wire.want_to([2**32 - 1])], "INVALID_ARGUMENT", "is asked for"),
            ([begin, wire.want_to([1, 1])], "INVALID_ARGUMENT", "twice at once"),
            ([begin, wire.want_to(range(20))], "INVALID_ARGUMENT", "at once"),
            ([begin, wire.want_to(range(8))], "NOT_FOUND", "the sink has read nothing"),
        ]:
            error = await ask(address, *requests)
            assert (error.code().name, words in error.details()) == (code, True), error
        other = pb.GiveOpen(model=MODEL, digest=b"x" * 32, offers=good.offers)
        error = await ask(address, pb.GiveRequest(open=other))
        assert "other files" in error.details()
        # Every slot is free again.
        await fetch(tmp_path / "place", [address])
    assert read(tmp_path / "place") == expected(model)


async def test_a_cancelled_fetch_leaves_what_came(model, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    came = asyncio.Event()
    async with source_here(model, rate=lambda: SLOW) as (source, address):
        fetching = asyncio.create_task(
            fetch(place, [address], watch=lambda stage, *_: stage == "fetch" and came.set())
        )
        await asyncio.wait_for(came.wait(), PATIENCE)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        before = source.given_bytes
        assert before < 40 * PIECE
        source._rate = lambda: 0.0
        report = await fetch(place, [address])
    assert report.here > 0
    assert read(place) == expected(model)


async def test_a_file_that_shrinks_while_it_is_given(model, tmp_path):
    folder = tmp_path / "shrinking"
    folder.mkdir()
    for name, data in expected(model).items():
        (folder / name).write_bytes(data)
    came = asyncio.Event()
    async with source_here(folder, rate=lambda: SLOW) as (_, address):
        fetching = asyncio.create_task(
            fetch(
                tmp_path / "place",
                [address],
                watch=lambda stage, *_: stage == "fetch" and came.set(),
            )
        )
        await asyncio.wait_for(came.wait(), PATIENCE)
        os.truncate(folder / "model-2.safetensors", 10)
        with pytest.raises(WeightsLostError, match=r"became shorter|brought 2 pieces|other files"):
            await fetching
    assert not (tmp_path / "place" / "config.json").exists()
