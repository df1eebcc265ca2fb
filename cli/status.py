"""`tandem status`: what a coordinator sees."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cli import view
from services.runtime.client import CallFailedError, Client
from services.runtime.oneline import one_line

WATCH_SECONDS = 1.0


async def show(coordinator: str, *, as_json: bool) -> None:
    """Prints it once. Raises CallFailedError."""
    async with Client("", coordinator) as client:
        status = await client.status()
    if as_json:
        print(json.dumps(asdict(status), indent=2))
    else:
        Console().print(view.cluster(status))


async def watch(coordinator: str) -> None:
    """Keeps it current until cancelled; a coordinator that is away may come back."""
    async with Client("", coordinator) as client:
        with Live(refresh_per_second=4) as live:
            while True:
                try:
                    live.update(view.cluster(await client.status()))
                except CallFailedError as error:
                    live.update(Text(one_line(f"{coordinator}: {error.message}"), style="yellow"))
                await asyncio.sleep(WATCH_SECONDS)
