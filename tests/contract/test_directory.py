"""What a directory is to whoever asks it: one list, and one etcd that comes and goes."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cli.etcd import EtcdChild
from services.runtime.directory import Directory, Kind, Member, StaticDirectory, directory
from services.runtime.directory_etcd import EtcdDirectory, members
from services.runtime.load import SettingsError
from services.runtime.settings import DirectorySettings

A, B, C = "127.0.0.1:1001", "127.0.0.1:1002", "127.0.0.1:1003"
LEASE_SECONDS = 2


class World:
    """An etcd, and directories in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self._opened: list[Directory] = []
        self.etcd: EtcdChild | None = None

    async def start(self, *, empty: bool = False) -> None:
        if empty:
            shutil.rmtree(self._folder / "data", ignore_errors=True)
        self.etcd = await EtcdChild.launch(
            "etcd", self._folder / "data", self._port, log=self._folder / "log", timeout=60
        )
        self._port = int(self.etcd.address.rpartition(":")[2])

    async def kill(self) -> None:
        self.etcd.kill(signal.SIGKILL)
        await self.etcd.wait()

    def settings(
        self,
        cluster: str = "test",
        others: tuple[str, ...] = (),
        lease_seconds: int = LEASE_SECONDS,
    ) -> DirectorySettings:
        return DirectorySettings(
            etcd=(*others, self.etcd.address), cluster=cluster, lease_seconds=lease_seconds
        )

    def open(self, *known: str, **more) -> EtcdDirectory:
        opened = EtcdDirectory(self.settings(**more), known)
        self._opened.append(opened)
        return opened

    def coordinator(self, address: str, **more) -> EtcdDirectory:
        """One that lists itself."""
        mine = self.open(**more)
        mine.join(Member(Kind.COORDINATOR, f"c-{address[-1]}", address))
        return mine

    async def close(self) -> None:
        await asyncio.gather(*(d.close() for d in self._opened))
        await self.etcd.end(0)


@pytest.fixture
async def world(tmp_path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.start()
    yield world
    await world.close()


async def until(directory: Directory, *wanted: str, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while (known := directory.coordinators) != wanted:
            await directory.changed(known)


async def holds(what: Callable, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not await what():  # noqa: ASYNC110 - etcd's own doing
            await asyncio.sleep(0.02)


# What every directory does


@pytest.fixture(params=["static", "etcd"])
async def two(request, world) -> Directory:
    """A directory that knows of A and B."""
    if request.param == "static":
        return StaticDirectory([B, A, B])
    world.coordinator(B)
    world.coordinator(A)
    found = world.open()
    await until(found, A, B)
    return found


async def test_coordinators_are_sorted_and_there_once(two):
    assert two.coordinators == (A, B)


async def test_whoever_knows_less_is_told_at_once(two):
    assert await asyncio.wait_for(two.changed(()), 30) == (A, B)
    assert await asyncio.wait_for(two.changed((A,)), 30) == (A, B)


async def test_whoever_knows_it_all_waits(two):
    waiting = asyncio.create_task(two.changed(two.coordinators))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    waiting.cancel()


async def test_joining_does_not_wait_and_closing_ends(two):
    two.join(Member(Kind.WORKER, "w-1", C))
    await asyncio.wait_for(two.close(), 30)
    assert two.coordinators == (A, B)


def test_there_has_to_be_somewhere_to_look():
    with pytest.raises(SettingsError, match=r"worker\.coordinator"):
        directory(DirectorySettings(), ())
    assert directory(DirectorySettings(), None).coordinators == ()
    assert directory(DirectorySettings(), [A]).coordinators == (A,)


# etcd


async def test_coordinators_come_and_leave(world):
    found = world.open()
    one = world.coordinator(A, lease_seconds=60)
    await until(found, A)
    two = world.coordinator(B)
    await until(found, A, B)
    await one.close()
    await until(found, B)  # it says so: no lease has to end
    await until(two, B)


async def test_one_that_dies_is_off_the_list_when_its_lease_ends(world):
    found, dying = world.open(), world.coordinator(A)
    world.coordinator(B)
    await until(found, A, B)
    for task in dying._tasks:
        task.cancel()
    await until(found, B)


async def test_the_last_one_stays_known(world):
    found, only = world.open(), world.coordinator(A)
    await until(found, A)
    await only.close()
    other = world.coordinator(B)
    await until(found, B)
    await other.close()
    await holds(lambda: _nobody(world.settings()))
    assert found.coordinators == (B,), "nobody is no list to go by"


async def _nobody(settings: DirectorySettings) -> bool:
    return not await members(settings, Kind.COORDINATOR)


async def test_everybody_is_listed_by_kind_and_cluster(world):
    mine = world.open()
    mine.join(Member(Kind.WORKER, "w-1", A))
    mine.join(Member(Kind.FRONTEND, "f-1", B))
    world.coordinator(C, cluster="another")

    async def listed() -> bool:
        return (
            await members(world.settings(), Kind.WORKER) == (Member(Kind.WORKER, "w-1", A),)
            and await members(world.settings(), Kind.FRONTEND) == (Member(Kind.FRONTEND, "f-1", B),)
            and not await _nobody(world.settings(cluster="another"))
        )

    await holds(listed)
    assert mine.coordinators == ()


async def test_what_etcd_knows_replaces_what_the_settings_said(world):
    found = world.open(C)
    assert found.coordinators == (C,)
    world.coordinator(A)
    await until(found, A)


async def test_entries_that_are_no_addresses_are_passed_over(world):
    world.coordinator("nonsense")
    world.coordinator(A)
    found = world.open()
    await until(found, A)
    world.coordinator(B)
    await until(found, A, B)


async def test_without_etcd_the_last_list_holds_and_a_lease_is_taken_anew(world):
    found = world.open()
    world.coordinator(A)
    world.coordinator(B)
    await until(found, A, B)
    await world.kill()
    lost = asyncio.create_task(found.changed(found.coordinators))
    done, _ = await asyncio.wait([lost], timeout=LEASE_SECONDS + 1)  # longer than the leases
    assert not done
    await world.start()
    world.coordinator(C)
    await until(found, A, B, C)
    lost.cancel()


async def test_an_etcd_that_lost_everything_is_told_again(world):
    found = world.open()
    world.coordinator(A)
    world.coordinator(B)
    await until(found, A, B)
    await world.kill()
    await world.start(empty=True)
    late = world.open()
    await until(late, A, B)
    await until(found, A, B)  # it may have seen one of them come back before the other


async def test_an_etcd_that_is_not_there_is_passed_over(world):
    dead = ("127.0.0.1:9", "127.0.0.1:11")
    world.coordinator(A, others=dead)
    await until(world.open(others=dead), A)
    assert not await _nobody(world.settings(others=dead))


async def test_an_etcd_that_is_silent_for_a_while(world):
    found = world.open()
    world.coordinator(A)
    await until(found, A)
    world.etcd.kill(signal.SIGSTOP)
    waiting = asyncio.create_task(found.changed((A,)))
    done, _ = await asyncio.wait([waiting], timeout=LEASE_SECONDS + 1)
    assert not done
    world.etcd.kill(signal.SIGCONT)
    world.coordinator(B)
    await until(found, A, B)
    waiting.cancel()


async def test_closing_does_not_wait_for_an_etcd_that_is_away(world):
    mine = world.coordinator(A)
    await until(world.open(), A)
    world.etcd.kill(signal.SIGSTOP)
    try:
        await asyncio.wait_for(mine.close(), 5)
    finally:
        world.etcd.kill(signal.SIGCONT)
