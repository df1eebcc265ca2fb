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
PATIENCE = 60.0
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos" / "gen")]),
    # UCX tells of peers that died on standard output, which is for answers here.
    "UCX_LOG_FILE": "/dev/stderr",
}


class RemoteSource:
    """A source process. `await do("offer", lease=..., keys=[...])`."""

    script = "kv_source.py"

    def __init__(self, *, env: dict[str, str] | None = None, **options) -> None:
        self.options = options
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / self.script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **(env or {})},
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

    async def fetched_often(self, transport: str, keys: list[bytes], **counts: int) -> dict:
        """What a sink in another process has left of fetching these often; see kv_often.py."""
        asked = {"transport": transport, "address": self.address, "keys": [k.hex() for k in keys]}
        sink = await asyncio.create_subprocess_exec(
            *(sys.executable, str(HERE / "kv_often.py"), json.dumps(asked | counts)),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
        )
        said, _ = await sink.communicate()
        assert sink.returncode == 0
        return json.loads(said)

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
