"""What the gateway costs: `python -m tests.gateway.measure`, CPU microseconds of its process.

The frontend is the scripted one of the tests, in a process of its own; it answers at once. A
request has a prompt of 900 bytes. What a piece of a stream costs is the difference between streams
of 16 and of 80 pieces; what a request costs is the rest.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from multiprocessing.connection import Connection as Pipe

from tests.gateway.gateway_rig import Backend, Gateway, chat, gateway

CONCURRENCY = (1, 16, 64, 256)
FEW, MANY = 16, 80
STREAMS, WHOLES = 1500, 3000
PROMPT = "x" * 900


def serve(pipe: Pipe) -> None:
    """The frontend's process; `max_tokens` says how many pieces."""
    piece = chat(content=" token")

    async def pieces(request):
        for _ in range(request.max_tokens):
            yield piece

    async def run() -> None:
        backend = Backend()
        backend.pieces = pieces
        backend.asked = backend.metadata = backend.remaining = Forgets()
        await backend.start()
        pipe.send(backend.address)
        await asyncio.to_thread(pipe.recv)

    asyncio.run(run())


class Forgets(list):
    """What the backend was asked is not kept."""

    def append(self, _):
        pass


async def load(running: Gateway, concurrency: int, requests: int, body: dict[str, object]) -> None:
    """Asks so often, on so many connections."""
    raw = json.dumps(body).encode()
    left = iter(range(requests))

    async def client() -> None:
        connection = await running.connect()
        for _ in left:
            await connection.ask("POST", "/v1/chat/completions", raw)
            await connection.answer()
        connection.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def cost(running: Gateway, concurrency: int, requests: int, **body: object) -> float:
    """Of one request, CPU microseconds."""
    body |= {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
    await load(running, concurrency, concurrency * 4, body)
    before = await running.metric("process_cpu_seconds_total")
    await load(running, concurrency, requests, body)
    return (await running.metric("process_cpu_seconds_total") - before) / requests * 1e6


async def measure(address: str) -> None:
    """Prints a line for each concurrency."""
    print("at once | whole answer | stream of 16 | a request of it | a piece of it")
    async with gateway(address) as running:
        for concurrency in CONCURRENCY:
            whole = await cost(running, concurrency, WHOLES)
            few = await cost(running, concurrency, STREAMS, stream=True, max_tokens=FEW)
            many = await cost(running, concurrency, STREAMS // 2, stream=True, max_tokens=MANY)
            piece = (many - few) / (MANY - FEW)
            begin = few - FEW * piece
            print(f"{concurrency:7} | {whole:12.0f} | {few:12.0f} | {begin:15.0f} | {piece:13.1f}")


def main() -> None:
    """Starts the frontend and measures."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there,))
    process.start()
    try:
        asyncio.run(measure(here.recv()))
    finally:
        here.send("end")
        process.join()


if __name__ == "__main__":
    main()
