"""Opens the gateway's page in a browser, asks what it offers, and keeps a picture.

python -m tests.conformance.browse [docs/figures/rest.png]
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.conformance.conformance_world import MODEL, serving

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0
PICTURE = "docs/figures/rest.png"


class NoBrowserError(Exception):
    """There is none on this machine; the words say what was looked for."""


async def browse(url: str, *what: str) -> str:
    """Runs Chromium without a window; what it wrote. Raises NoBrowserError, RuntimeError."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise NoBrowserError(f"no browser here: looked for {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            # Without its sandbox it also runs as root; the page is our own.
            *(found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={profile}", "--hide-scrollbars", "--virtual-time-budget=8000"),
            *what,
            url,
            stdout=-1,
            stderr=-1,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"{found}: {err.decode(errors='replace')[-2000:]}")
    return out.decode(errors="replace")


async def check(url: str) -> None:
    """The page is there, made by its script, which asks the server. Raises RuntimeError if not."""
    shown = await browse(url, "--dump-dom")
    for text in ("/v1/chat/completions", "CreateChatCompletionRequest", MODEL):
        if text not in shown:
            raise RuntimeError(f"{url} does not show {text!r}, but {shown[-500:]}")


async def main(picture: str) -> None:
    """Raises NoBrowserError, RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        async with serving(Path(folder)) as world:
            url = f"{world.url.removesuffix('/v1')}/docs"
            await check(url)
            await browse(url, "--window-size=1000,1100", f"--screenshot={picture}")


if __name__ == "__main__":
    asyncio.run(main(os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else PICTURE)))
