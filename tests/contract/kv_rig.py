"""Starts KV sources in processes of their own and talks to them; see kv_source.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE = 20.0


class RemoteSource:
    """A source process. `await do("offer", lease=..., keys=[...])`."""

    script = "kv_source.py"

    def __init__(self, *, env: dict[str, str] | None = None, **options) -> None:
        self.options = options
        paths = [str(ROOT), str(ROOT / "protos" / "gen")]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / self.script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # UCX tells of peers that died on standard output, which is for answers here.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "UCX_LOG_FILE": "/dev/stderr",
                **(env or {}),
            },
        )
        self.address = self._answer()["address"]

    async def do(self, command: str, **arguments) -> dict:
        if "keys" in arguments:
            arguments["keys"] = [k.hex() for k in arguments["keys"]]
        print(json.dumps({"do": command, **arguments}), file=self.process.stdin, flush=True)
        answer = asyncio.create_task(asyncio.to_thread(self._answer))
        done, _ = await asyncio.wait([answer], timeout=PATIENCE)
        if not done:
            self.kill()  # Or the thread that reads its answers would never end.
            raise AssertionError(f"the source did not {command} {arguments} in {PATIENCE} s")
        return answer.result()

    async def idle(self) -> None:
        """Returns once the source holds nothing for anybody; its books were checked."""
        await self.do("settle", held=0, leases=0, watches=0)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends it, frozen or not."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the source ended with {self.process.poll()}")
        return json.loads(line)
