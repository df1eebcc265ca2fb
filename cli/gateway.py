"""The HTTP gateway (deploy/gateway) as one more process of a local cluster."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.child import Child, ChildFailedError
from services.runtime.process import die_with_parent

PORT = 7480
BUILD = "make gateway builds the HTTP gateway, by which OpenAI's clients can ask"

_BUILT = Path(__file__).resolve().parents[1] / "out" / "gateway" / "tandem-gateway"


def program() -> Path | None:
    """The gateway: as built in this checkout, or on the PATH; None if it is at neither."""
    if _BUILT.exists():
        return _BUILT
    on_path = shutil.which("tandem-gateway")
    return Path(on_path) if on_path else None


def curl(address: str, model: str, prompt: str) -> list[str]:
    """A question for `curl`, greedy, whose answer is that of the demo."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 64,
    }
    url = f"http://{address}/v1/chat/completions"
    return ["curl", "-sS", url, "-H", "content-type: application/json", "-d", json.dumps(body)]


def shown(command: Sequence[str]) -> str:
    """A command as a person would type it."""
    return shlex.join(command)


async def asked(command: Sequence[str], seconds: float) -> str:
    """Runs curl(); the answer's text, or what came instead of one."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=-1, stderr=-1
    )
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        text: str = json.loads(out)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError):
        return (out + err).decode(errors="replace").strip()
    return text


class GatewayChild(Child):
    """A running gateway."""

    @classmethod
    async def launch(
        cls,
        name: str,
        built: Path,
        frontends: Sequence[str],
        port: int,
        *,
        drain_seconds: float,
        log: Path,
        timeout: float,
    ) -> GatewayChild:
        """Starts it on a port of loopback, 0 for a free one; returns when it serves.

        It dies with this process (on Linux). Raises ChildFailedError; then, and when cancelled, no
        process is left.
        """
        read_fd, write_fd = os.pipe()
        with open(read_fd, "rb", buffering=0) as ready:  # noqa: ASYNC230 - a pipe
            try:
                with log.open("ab") as output:
                    process = await asyncio.create_subprocess_exec(
                        *(sys.executable, "-P", "-m", "cli.gateway", str(os.getpid()), str(built)),
                        *("--listen", f"127.0.0.1:{port}", "--frontends", ",".join(frontends)),
                        *("--drain", f"{drain_seconds}s", "--ready-fd", str(write_fd)),
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        pass_fds=(write_fd,),
                        start_new_session=True,
                    )
            except OSError as error:
                raise ChildFailedError(f"{name} can't be started: {error}") from None
            finally:
                os.close(write_fd)
            child = cls(name, process, log)
            try:
                child.address = await child._ready(ready, timeout)
            except BaseException:
                await child.end(0)
                raise
        return child


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
