"""A process that gives a folder's files, or fetches them, for tests. Options are JSON.

A source says {"address": ...} and serves until it is killed; `wrong` names pieces whose bytes it
spoils, `rate` is bytes a second. A sink says {"bytes": ...} whenever more has come, then
{"done": true}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import uvloop

from kvtransfer.weights.describing import Digests
from kvtransfer.weights.driving import Means
from kvtransfer.weights.fetch import fetch_weights
from kvtransfer.weights.finding import Wanted
from kvtransfer.weights.giving import Slots
from kvtransfer.weights.source import Given, WeightsSource
from services.runtime.server import Server
from services.runtime.settings import ServerSettings
from tandem.weights.v1 import weights_pb2_grpc

SERVICE = "tandem.weights.v1.WeightsService"
MODEL = "m"


def say(**what) -> None:
    print(json.dumps(what), flush=True)


def spoil(wrong: list[int]) -> None:
    """From now on, reads of a file at these offsets give other bytes; [-1]: at all."""
    fill = Slots.fill

    def spoiled(self, offset, fd, start, length):
        done = fill(self, offset, fd, start, length)
        if start in wrong or wrong == [-1]:
            self._view[offset] ^= 1
        return done

    Slots.fill = spoiled


async def give(options: dict) -> None:
    spoil(options.get("wrong", []))
    source = WeightsSource(
        Given(options.get("model", MODEL), Path(options["folder"]), Digests()),
        transports=options["transports"],
        rate=lambda: options.get("rate", 0.0),
        piece_bytes=options["piece_bytes"],
    )
    server = Server(ServerSettings(port=options.get("port", 0)), "source")
    server.add(weights_pb2_grpc.add_WeightsServiceServicer_to_server, source, SERVICE)
    say(address=await server.start())
    await asyncio.Event().wait()


async def take(options: dict) -> None:
    await fetch_weights(
        Path(options["folder"]),
        Wanted(MODEL, options["peers"]),
        Means(options["transports"]),
        watch=lambda stage, done, total: stage == "fetch" and say(bytes=done),
    )
    say(done=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    given = json.loads(sys.argv[1])
    uvloop.run((give if given["do"] == "give" else take)(given))
