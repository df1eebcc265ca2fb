"""A model comes from workers to where it is looked for; what is wrong is said."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os

import pytest

from cli.peers import fetch_from
from kvtransfer.weights.describing import Digests
from kvtransfer.weights.driving import Means
from kvtransfer.weights.source import Given, WeightsSource
from services.engine.models import cache, inventory, peers
from services.engine.models.errors import (
    ModelFetchError,
    ModelFileError,
    ModelNotFoundError,
    ModelSpaceError,
)
from services.engine.models.folder import resolve
from services.runtime.load import SettingsError
from services.runtime.server import Server
from services.runtime.settings import ModelSettings, ServerSettings, WorkerProcess
from tandem.weights.v1 import weights_pb2_grpc

HEADER = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "source"
    place.mkdir()
    config = {"max_position_embeddings": 8, "vocab_size": 4}
    (place / "config.json").write_text(json.dumps(config))
    (place / "tokenizer.json").write_text("{}")
    weights = len(HEADER).to_bytes(8, "little") + HEADER + b"1234"
    (place / "model.safetensors").write_bytes(weights)
    return place


@contextlib.asynccontextmanager
async def giving(folder, name="org/model"):
    source = WeightsSource(Given(name, folder, Digests()), transports=["tcp"])
    server = Server(ServerSettings(), "source")
    server.add(
        weights_pb2_grpc.add_WeightsServiceServicer_to_server,
        source,
        "tandem.weights.v1.WeightsService",
    )
    try:
        yield await server.start(), source
    finally:
        await server.stop(0)
        await source.close()


def bring(model, models, *addresses, **more):
    return asyncio.wait_for(peers.bring(model, models, list(addresses), Means(["tcp"]), **more), 60)


@pytest.mark.parametrize("name", ["org/model", "..", "smollm2-135m-instruct"])
async def test_without_a_path_it_comes_to_the_cache(folder, tmp_path, name):
    model, models = ModelSettings(name=name), tmp_path / "models"
    with pytest.raises(ModelNotFoundError):
        resolve(model, models)
    async with giving(folder, name) as (address, _):
        brought = await bring(model, models, address)
        assert brought.place.parent == models / "peers"
        assert "MB from " + address in brought.words()
        assert await bring(model, models, address) is None
    assert resolve(model, models).path == brought.place
    assert await bring(model, models) is None
    # Its digests need not be computed to give it on.
    (known,) = (models / "digests").iterdir()
    assert set(json.loads(known.read_text())["files"]) == {p.name for p in folder.iterdir()}


async def test_a_folder_that_lacks_a_shard_gets_it(folder, tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (place / name).write_bytes((folder / name).read_bytes())
    model = ModelSettings(name="org/model", path=str(place))
    assert not peers.is_here(model, tmp_path)
    async with giving(folder) as (address, source):
        brought = await bring(model, tmp_path / "models", address)
        assert source.given_bytes == (folder / "model.safetensors").stat().st_size
    assert brought.place == place
    assert peers.is_here(model, tmp_path)


async def test_two_at_once_fetch_it_once(folder, tmp_path):
    model, models = ModelSettings(name="org/model"), tmp_path / "models"
    place = models / "peers" / "model-org%2Fmodel"
    place.mkdir(parents=True)
    waited = asyncio.Event()
    with contextlib.ExitStack() as stack:
        lock = os.open(place / ".lock", os.O_CREAT | os.O_WRONLY)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with giving(folder) as (address, source):
            both = [
                asyncio.create_task(bring(model, models, address, waiting=waited.set))
                for _ in range(2)
            ]
            await asyncio.wait_for(waited.wait(), 60)
            assert source.given_bytes == 0
            fcntl.flock(lock, fcntl.LOCK_UN)
            results = await asyncio.gather(*both)
            assert source.given_bytes == sum(p.stat().st_size for p in folder.iterdir())
    assert sum(r is None for r in results) == 1


async def test_by_command_it_is_listed_and_checked(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models, stages = tmp_path / "tandem" / "models", set()
    settings = WorkerProcess(model=ModelSettings(name="org/model"))
    async with giving(folder) as (address, _):
        brought = await asyncio.to_thread(
            fetch_from, [address], settings, lambda progress: stages.add(progress.stage)
        )
    assert "download" in stages
    (entry,) = (e for e in inventory.entries(models) if e.name == "org/model")
    assert (entry.folder, entry.origin) == (brought.place, "fetched from workers")
    os.truncate(brought.place / "model.safetensors", 5)
    with pytest.raises(ModelFileError, match="is not what was fetched"):
        inventory.check(entry)


async def test_a_file_is_no_place_for_a_folder(tmp_path):
    for path in ("model.gguf", "model.GGUF"):
        with pytest.raises(SettingsError, match="is a file"):
            await bring(ModelSettings(path=str(tmp_path / path)), tmp_path, "127.0.0.1:1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_folder_that_may_not_be_written_for_real(folder, tmp_path):
    (tmp_path / "models").mkdir(mode=0o500)
    with pytest.raises(ModelFetchError, match="can't be written"):
        await bring(ModelSettings(name="org/model"), tmp_path / "models", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, ModelFetchError), (errno.ENOSPC, ModelSpaceError)]
)
async def test_what_the_disk_says_is_told(folder, tmp_path, monkeypatch, number, kind):
    def no(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", no)
    async with giving(folder) as (address, _):
        with pytest.raises(kind, match="models"):
            await bring(ModelSettings(name="org/model"), tmp_path / "models", address)


async def test_a_disk_that_is_too_small_is_told_before(folder, tmp_path, monkeypatch):
    def full(place, size):
        raise ModelSpaceError(f"{place}: {size} are needed")

    monkeypatch.setattr(cache, "need_space", full)
    async with giving(folder) as (address, source):
        with pytest.raises(ModelSpaceError, match="are needed"):
            await bring(ModelSettings(name="org/model"), tmp_path / "models", address)
        assert source.given_bytes == 0
