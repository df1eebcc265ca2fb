"""What NIXL is told, recorded by a stand-in for its bindings: this is what a GPU's memory gets."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvtransfer.memory import DeviceSegment, Region
from kvtransfer.transports import nixl_agent
from kvtransfer.transports.base import Read
from kvtransfer.transports.descriptors import Regions, described
from kvtransfer.transports.nixl_agent import NixlAgent, NixlError, NixlLostError, NixlUnsureError

NONCE = bytes(range(16))


class LostError(Exception):
    pass


class CancelledError(Exception):
    pass


class Bindings:
    """As much of NIXL's module as is used."""

    nixlRemoteDisconnectError = LostError  # noqa: N815
    nixlCancelledError = CancelledError  # noqa: N815
    NIXL_THREAD_SYNC_NONE = "no sync"
    NIXL_READ, NIXL_SUCCESS, NIXL_IN_PROG = "read", "success", "in progress"
    DRAM_SEG, VRAM_SEG = "dram", "vram"

    def __init__(self) -> None:
        self.registered: list = []
        self.read: list = []
        self.released: list = []
        self.config = SimpleNamespace()
        self.backend: tuple = ()
        self.fails: dict[str, Exception] = {}
        self.status = self.NIXL_SUCCESS

    def _may_fail(self, what: str) -> None:
        if what in self.fails:
            raise self.fails[what]

    def nixlAgentConfig(self):  # noqa: N802
        return self.config

    def nixlAgent(self, name, config):  # noqa: N802
        return self

    def createBackend(self, name, options):  # noqa: N802
        self.backend = name, options
        return "backend"

    def nixlRegDList(self, kind, rows):  # noqa: N802
        return kind, rows

    def nixlXferDList(self, kind, table):  # noqa: N802
        assert table.flags.c_contiguous
        assert table.dtype == np.uint64
        return kind, table.tolist()

    def registerMem(self, listed, backends):  # noqa: N802
        self._may_fail("register")
        self.registered.append(listed)

    def createXferReq(self, *arguments):  # noqa: N802
        self._may_fail("create")
        self.read.append(arguments)
        return 7

    def postXferReq(self, handle):  # noqa: N802
        self._may_fail("post")

    def getXferStatus(self, handle):  # noqa: N802
        self._may_fail("status")
        return self.status

    def releaseXferReq(self, handle):  # noqa: N802
        self.released.append(handle)


class NoCopies:
    def to_host(self, address, out):
        raise AssertionError

    def from_host(self, address, data):
        raise AssertionError


@pytest.fixture
def bindings() -> Bindings:
    return Bindings()


@pytest.fixture
def agent(bindings) -> NixlAgent:
    return NixlAgent(bindings, "me", serve=False, ucx={"NET_DEVICES": "lo", "TLS": "tcp"})


def test_a_serving_agent_has_a_thread_that_sleeps(bindings):
    NixlAgent(bindings, "me", serve=True, ucx={})
    assert bindings.config.useProgThread
    assert bindings.config.pthrDelay >= 10_000


def test_settings_of_ucx_are_the_backends(bindings, agent):
    assert bindings.backend == ("UCX", {"engine_config": "NET_DEVICES=lo,TLS=tcp"})
    assert not bindings.config.useProgThread


def test_memories_are_registered_by_their_kind_with_their_device(bindings, agent):
    segment = DeviceSegment(0x7F0000000000, 1000, 3, 96, NONCE, NoCopies())
    agent.register([*segment.regions, Region(0, 4096, 64)])
    vram, dram = bindings.registered
    assert vram == ("vram", [(0x7F0000000000, 1000, 3, "")])
    assert dram == ("dram", [(segment.host.ctypes.data, 96, 0, ""), (4096, 64, 0, "")])


def test_reads_into_a_gpu_name_its_device(bindings, agent):
    theirs = DeviceSegment(0x100000, 1000, 2, 96, NONCE, NoCopies())
    mine = DeviceSegment(0x900000, 1000, 5, 96, NONCE, NoCopies())
    works = described(
        [Read(10, 20, 30), Read(990, 0, 20)], Regions(theirs.regions), Regions(mine.regions)
    )
    for work in works:
        assert agent.read("them", work) == 7
    host = theirs.host.ctypes.data
    assert all(a[0] == "read" and a[3] == "them" for a in bindings.read)
    said = {(a[1][0], a[2][0]): (a[1][1], a[2][1]) for a in bindings.read}
    assert said["vram", "vram"] == (
        [[0x900000 + 20, 30, 5], [0x900000, 10, 5]],
        [[0x100000 + 10, 30, 2], [0x100000 + 990, 10, 2]],
    )
    assert said["vram", "dram"] == ([[0x900000 + 10, 10, 5]], [[host, 10, 0]])


WORK = described([Read(0, 0, 4)], Regions([Region(0, 64, 8)]), Regions([Region(0, 128, 8)]))[0]


@pytest.mark.parametrize(
    ("step", "error", "told"),
    [
        ("create", Exception("no such memory"), NixlError),
        ("post", Exception("backend"), NixlUnsureError),
        ("post", LostError("x"), NixlLostError),
        ("status", Exception("backend"), NixlUnsureError),
        ("status", CancelledError("x"), NixlLostError),
    ],
)
def test_errors_tell_what_may_still_be_under_way(bindings, agent, step, error, told):
    bindings.fails[step] = error
    with pytest.raises(NixlError) as raised:
        assert agent.ended(agent.read("them", WORK))
    assert type(raised.value) is told
    assert bindings.released == ([7] if step == "post" else [])


def test_a_read_that_goes_on(bindings, agent):
    bindings.status = bindings.NIXL_IN_PROG
    assert not agent.ended(agent.read("them", WORK))


def test_a_registration_that_fails_says_so(bindings, agent):
    bindings.fails["register"] = Exception("out of pinned memory")
    with pytest.raises(NixlError, match="registering DRAM: out of pinned memory"):
        agent.register([Region(0, 64, 8)])


def test_without_the_package_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(nixl_agent.importlib, "import_module", missing)
    nixl_agent.load.cache_clear()
    try:
        bindings, version, why = nixl_agent.load()
    finally:
        nixl_agent.load.cache_clear()
    assert (bindings, version) == (None, "")
    assert 'pip install "tandem-serving[nixl]"' in why
