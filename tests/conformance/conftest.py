"""Clients that tests share."""

from __future__ import annotations

import openai
import pytest_asyncio


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(world):
    """OpenAI's own, of asyncio. Nothing is tried twice unless a test asks for it."""
    async with openai.AsyncOpenAI(base_url=world.url, api_key="none", max_retries=0) as it:
        yield it
