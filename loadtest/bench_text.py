"""What text costs a frontend: prompts to tokens, tokens to text, answers taken apart.

    python -m loadtest.bench_text [--model NAME | --path FOLDER]

CPU time of one thread; of the prompts also how long the event loop was kept from running, which
says something on an idle machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from services.frontend.answers.families import FAMILIES
from services.frontend.answers.format import AnswerFormat
from services.frontend.app import TEXT_THREADS
from services.frontend.chat import Chat, Function, ToolChoice, Turn
from services.frontend.folder import FolderModel
from services.frontend.validate import Prompt
from services.runtime.settings import ModelSettings

PROMPTS, PROMPT_TOKENS = 64, 4000
TEXT = "A prefill worker computes the prompt; 東京 is a city, 🌦️ the weather, and 42 a number.\n"
TOOLS = (Function("get_weather"),)
BEGUN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "'


def cpu(work: Callable[[], object], times: int) -> float:
    """Microseconds."""
    work()
    began = time.thread_time()
    for _ in range(times):
        work()
    return (time.thread_time() - began) / times * 1e6


def parsing() -> None:
    """Microseconds for a piece of a token's length."""
    for tokens in (True, False):
        family = FAMILIES["hermes"]
        known = family.markers.values() if tokens else ()
        answers = AnswerFormat(family, list(known), thinks=True)
        print(f"markers are {'tokens' if tokens else 'spelled'}:")
        for what, before, piece, thinking in (
            ("content", "Hi", " word", False),
            ("thought", "Hm", " word", True),
            ("arguments", BEGUN, " word", False),
        ):
            parser = answers.parser(TOOLS, ToolChoice(), thinking)
            for marker, mark in answers.markers.items():
                before = before.replace(marker, mark)
            parser.push(before)
            took = cpu(functools.partial(parser.push, piece), 20_000)
            print(f"  {what:10} {took:6.2f} us a piece")
        made = cpu(functools.partial(answers.parser, TOOLS, ToolChoice(), False), 5000)
        print(f"  {'a parser':10} {made:6.2f} us")


def detokenizing(model: FolderModel) -> None:
    """Microseconds a token."""
    tokens = model.encode(Prompt(TEXT * 150))
    for size in (1, 16):
        frames = [tokens[i : i + size] for i in range(0, len(tokens), size)]

        def run(frames: Sequence[Sequence[int]] = frames) -> None:
            detokenizer = model.detokenizer(marked=True)
            for frame in frames:
                detokenizer.push(frame)
            detokenizer.finish()

        print(f"tokens to text, {size:2} at a time: {cpu(run, 5) / len(tokens):.3f} us a token")


async def tokenizing(model: FolderModel) -> None:
    """All prompts at once, as a frontend takes them."""
    each = len(model.encode(Prompt(TEXT)))
    text = TEXT * (PROMPT_TOKENS // each)
    chats = [Chat((Turn("user", f"{i}: {text}"),)) for i in range(PROMPTS)]
    late: list[float] = []

    async def watch() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - began - 0.001)

    loop = asyncio.get_running_loop()
    watching = asyncio.create_task(watch())
    with ThreadPoolExecutor(TEXT_THREADS) as threads:
        wall, used = time.perf_counter(), time.process_time()
        jobs = [loop.run_in_executor(threads, model.encode, chat) for chat in chats]
        count = sum(map(len, await asyncio.gather(*jobs)))
        wall, used = time.perf_counter() - wall, time.process_time() - used
    watching.cancel()
    late.sort()
    print(
        f"text to tokens, {PROMPTS} prompts of {count // PROMPTS}: "
        f"{used / count * 1e6:.2f} us of CPU a token, {count / wall / 1e3:.0f}k tokens/s; "
        f"the loop was late by {late[len(late) // 2] * 1e3:.1f} ms (median), "
        f"{late[-1] * 1e3:.1f} ms (most)"
    )


def main() -> None:
    """See the module."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="tiny-deepseek")
    arguments.add_argument("--path", default="")
    given = arguments.parse_args()
    model = FolderModel(ModelSettings(name=given.model, path=given.path))
    parsing()
    detokenizing(model)
    asyncio.run(tokenizing(model))


if __name__ == "__main__":
    main()
