"""`tandem status`: what a coordinator sees."""

from __future__ import annotations

import asyncio

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cli import view
from services.runtime.client import CallFailedError, Client

WATCH_SECONDS = 1.0


async def show(coordinator: str) -> None:
    """Prints it once. Raises CallFailedError."""
    async with Client("", coordinator) as client:
        Console().print(view.cluster(await client.status()))


async def watch(coordinator: str) -> None:
    """Keeps it current until cancelled; a coordinator that is away may come back."""
    async with Client("", coordinator) as client:
        with Live(refresh_per_second=4) as live:
            while True:
                try:
                    live.update(view.cluster(await client.status()))
                except CallFailedError as error:
                    live.update(Text(f"{coordinator}: {error.message}", style="yellow"))
                await asyncio.sleep(WATCH_SECONDS)
