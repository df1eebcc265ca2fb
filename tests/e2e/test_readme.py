"""The README's client, pasted: it runs against a cluster and streams an answer."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from tests.e2e.world import SCRIPTED, running

ROOT = Path(__file__).resolve().parents[2]


async def test_the_client_in_the_readme_works_as_pasted(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.strip().splitlines()) <= 20
    script = tmp_path / "client.py"
    async with running(1, 1, SCRIPTED) as cluster:
        assert "127.0.0.1:7400" in block
        script.write_text(block.replace("127.0.0.1:7400", cluster.local.address("frontend")))
        client = await asyncio.create_subprocess_exec(
            sys.executable, str(script), stdout=-1, stderr=-1, cwd=tmp_path
        )
        out, err = await asyncio.wait_for(client.communicate(), 60)
        assert client.returncode == 0, err.decode()
        assert out.strip()
