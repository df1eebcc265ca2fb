"""NIXL's agent, as little of it as is needed, with its errors told apart.

The bindings are used directly because the published wrapper gives no way to say how long NIXL's
progress thread may sleep: it polls without a pause and burns a core. With a pause the thread
waits in poll(2) for network events, and only looks on its own that often.

UCX, which NIXL moves bytes with, reads UCX_* from the environment when an agent is made; what
stands there goes before what is given here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer.memory import Region
from kvtransfer.transports.descriptors import Descriptors

PACKAGES = ("nixl-cu12", "nixl-cu13")
"""Either does; they differ in the CUDA that they are built for."""
WAKE_MICROSECONDS = 100_000
"""The progress thread also looks without an event so often, as UCX loses one at times."""


class NixlError(Exception):
    """NIXL refused: nothing was begun."""


class NixlLostError(NixlError):
    """The other side is gone: nothing moves between the two any more."""


class NixlUnsureError(NixlError):
    """A read failed in a way that leaves it unknown what of it is still under way."""


@functools.cache
def load() -> tuple[Any, str, str]:
    """The bindings, the package's version, and "". Or None, "", and why there are none."""
    for package in PACKAGES:
        try:
            bindings = importlib.import_module(package.replace("-", "_") + "._bindings")
            return bindings, importlib.metadata.version(package), ""
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            return None, "", f"{package} is installed and can't be loaded: {error}"
    return None, "", 'NIXL is not installed: pip install "tandem-serving[nixl]"'


class NixlAgent:
    """One agent with its UCX backend. Not for several threads at once.

    `bindings` is NIXL's module. With `serve` a thread of NIXL answers those who read from here.
    `ucx` are settings of UCX without their prefix, as in {"TLS": "tcp"}. Raises NixlError.
    """

    def __init__(self, bindings: Any, name: str, *, serve: bool, ucx: Mapping[str, str]) -> None:
        config = bindings.nixlAgentConfig()
        config.useProgThread = serve
        config.pthrDelay = WAKE_MICROSECONDS
        config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
        self._nixl = bindings
        self._kinds = {"DRAM": bindings.DRAM_SEG, "VRAM": bindings.VRAM_SEG}
        with _Told(bindings, "making an agent"):
            self._agent = bindings.nixlAgent(name, config)
            engine = ",".join(f"{key}={value}" for key, value in ucx.items())
            self._backend = self._agent.createBackend("UCX", {"engine_config": engine})

    def register(self, regions: Sequence[Region]) -> None:
        """Makes memory known to the devices, until the agent is closed. Raises NixlError."""
        for kind in dict.fromkeys(region.kind for region in regions):
            rows = [(r.address, r.nbytes, r.device, "") for r in regions if r.kind == kind]
            with _Told(self._nixl, f"registering {kind}"):
                listed = self._nixl.nixlRegDList(self._kinds[kind], rows)
                self._agent.registerMem(listed, [self._backend])

    def metadata(self) -> bytes:
        """What another agent must load to read from this one's memory."""
        with _Told(self._nixl, "describing the agent"):
            return bytes(self._agent.getLocalMD())

    def load(self, metadata: bytes) -> str:
        """Makes another agent known; its name. Raises NixlError."""
        with _Told(self._nixl, "loading the source's metadata"):
            name = self._agent.loadRemoteMD(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def forget(self, name: str) -> None:
        """Undoes load(). What is being read from it goes on until it ends by itself."""
        with _Told(self._nixl, "forgetting the source"):
            self._agent.invalidateRemoteMD(name)

    def read(self, name: str, work: Descriptors) -> int:
        """Begins to read; a handle. It may be over when this returns. Raises NixlError."""
        with _Told(self._nixl, "preparing to read"):
            handle: int = self._agent.createXferReq(
                self._nixl.NIXL_READ,
                self._listed(work.local_kind, work.local),
                self._listed(work.remote_kind, work.remote),
                name,
                "",
                [self._backend],
            )
        try:
            with _Told(self._nixl, "beginning to read", NixlUnsureError):
                self._agent.postXferReq(handle)
        except NixlError:
            self.release(handle)
            raise
        return handle

    def ended(self, handle: int) -> bool:
        """Whether a read is over, after moving it on. Raises NixlError if it failed."""
        with _Told(self._nixl, "reading", NixlUnsureError):
            return bool(self._agent.getXferStatus(handle) == self._nixl.NIXL_SUCCESS)

    def release(self, handle: int) -> None:
        """Gives a handle up. If the read is still under way it goes on, unseen."""
        with _Told(self._nixl, "releasing a read"):
            self._agent.releaseXferReq(handle)

    def progress(self) -> None:
        """Lets connections move on that nothing is read from."""
        self._agent.getNotifs({})

    def close(self) -> None:
        """Ends every connection and every read: from here on nothing is written anywhere."""
        del self._agent

    def _listed(self, kind: str, table: NDArray[np.uint64]) -> Any:
        return self._nixl.nixlXferDList(self._kinds[kind], np.ascontiguousarray(table))


class _Told:
    """Turns what NIXL raises in the block into NixlErrors that say what was being done."""

    def __init__(self, bindings: Any, doing: str, error: type[NixlError] = NixlError) -> None:
        self._lost = (bindings.nixlRemoteDisconnectError, bindings.nixlCancelledError)
        self._doing = doing
        self._error = error

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, self._lost):
            raise NixlLostError(f"{self._doing}: the connection broke") from error
        if isinstance(error, Exception):
            raise self._error(f"{self._doing}: {error}") from error
