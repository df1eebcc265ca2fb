"""`tandem generate` and `tandem chat`: ask a served model, see the answer as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

from cli.advice import explain
from cli.output import printable
from cli.view import duration, size
from services.runtime.client import Ask, CallFailedError, Client, End, Piece, Turn


async def answer(client: Client, ask: Ask, see: Callable[[Piece], None]) -> End:
    """Streams one answer to `see`. Raises CallFailedError."""
    async with contextlib.aclosing(client.stream(ask)) as pieces:
        async for piece in pieces:
            see(piece)
            if piece.end is not None:
                return piece.end
    message = "the answer broke off without its last message"
    raise CallFailedError(client.address, "UNKNOWN", "", message)


async def generate(address: str, ask: Ask, *, as_json: bool, stats: bool) -> None:
    """Prints one answer. Raises CallFailedError."""
    pieces: list[Piece] = []

    def see(piece: Piece) -> None:
        pieces.append(piece)
        if not as_json:
            to_terminal(piece.text)

    async with Client(address) as client:
        end = await answer(client, ask, see)
    if as_json:
        whole = {
            "model": pieces[0].model,
            "seed": pieces[0].seed,
            "text": "".join(piece.text for piece in pieces),
            "token_ids": [token for piece in pieces for token in piece.token_ids],
        }
        print(json.dumps(whole | asdict(end), indent=2, ensure_ascii=False))
        return
    to_terminal("\n")
    if stats:
        print(describe(end), file=sys.stderr)


def to_terminal(text: str) -> None:
    """Writes at once, so that a stream is seen as one."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def describe(end: End) -> str:
    """What an answer took, in a line for each placement."""
    lines = [
        f"{end.prompt_tokens} prompt tokens ({end.cached_tokens} cached), "
        f"{end.completion_tokens} generated ({end.finish_reason}); "
        f"first after {duration(end.ttft_seconds)}, all in {duration(end.total_seconds)}"
    ]
    for attempt in end.attempts:
        route = f"{attempt.prefill_worker or '(no prefill worker)'} -> {attempt.decode_worker}"
        moved = f"{size(attempt.kv_bytes)} of KV by {attempt.transport or 'no transport'}"
        failed = f", lost: {attempt.failure}" if attempt.failure else ""
        lines.append(f"{route}: {attempt.tokens} tokens, {moved}{failed}")
        lines += [f"  {reason}" for reason in attempt.reasons]
        if attempt.prefix:
            lines.append(f"  prefix: {attempt.prefix}")
        if attempt.lost:
            lines.append(f"  a fetch was lost: {attempt.lost}")
    return "\n".join(lines)


def chat(address: str, template: Ask, *, stats: bool) -> None:
    """A conversation until the end of input. Ctrl-C cancels an answer; at the prompt, it ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()

    turns = list(template.chat)
    with asyncio.Runner() as runner:
        client = runner.run(_open(address))
        try:
            while True:
                line = _read()
                if line is None:
                    return
                if line.strip():
                    turns.append(Turn("user", line))
                    _reply(runner, client, template, turns, stats)
        finally:
            runner.run(client.close())


async def _open(address: str) -> Client:
    client = Client(address)
    names = await client.models()
    print(f"{', '.join(names) or 'no model'} at {address}. Ctrl-C stops an answer, Ctrl-D ends.")
    return client


def _read() -> str | None:
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _reply(
    runner: asyncio.Runner, client: Client, template: Ask, turns: list[Turn], stats: bool
) -> None:
    """Asks with all turns, and appends the answer to them, or takes the question back."""
    said: list[str] = []

    def see(piece: Piece) -> None:
        said.append(piece.text)
        to_terminal(piece.text)

    ask = replace(template, chat=turns)
    try:
        end = runner.run(answer(client, ask, see))
        print()
        if stats:
            print(describe(end), file=sys.stderr)
    except KeyboardInterrupt:
        print(" (stopped)")
    except CallFailedError as error:
        print(f"\ntandem: {explain(error)}", file=sys.stderr)
    if any(said):
        turns.append(Turn("assistant", "".join(said)))
    else:
        turns.pop()
