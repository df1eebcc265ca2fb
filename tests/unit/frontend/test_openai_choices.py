"""Choices: the answers to one request end together."""

from __future__ import annotations

import asyncio
import gc

import pytest

from services.frontend.openai.choices import Choice, Choices
from services.runtime.errors import NoWorkersError


class Failing:
    """A request that nobody can answer."""

    async def begun(self):
        raise NoWorkersError("nobody")

    async def piece(self):
        raise NoWorkersError("nobody")

    def close(self):
        pass


@pytest.mark.parametrize("streamed", [False, True])
async def test_of_answers_that_fail_at_once_none_is_taken_for_a_bug(streamed):
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: reported.append(told))
    choices = Choices(lambda index, prompt, _: Choice(index, prompt, Failing()), prompts=3, n=2)
    with pytest.raises(NoWorkersError):
        await (anext(choices.parts()) if streamed else choices.whole())
    choices.close()
    # Let what was cancelled end, and what was forgotten be found.
    await asyncio.sleep(0)
    gc.collect()
    assert reported == []
