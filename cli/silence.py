"""Whether a process that lives still answers: one that is stopped, or hangs, does not end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.channels import Channels

ASKED_SECONDS = 2.0
"""Between an answer and the next question."""
ANSWER_SECONDS = 3.0
"""That an answer may take."""

_NO_ANSWER = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


async def silences(address: str) -> AsyncIterator[float]:
    """For how many seconds nothing has been answered, after each question; 0: it has been, now.

    Only time in which this process itself waited counts: one that was stopped with all others, or
    a machine that slept, makes nobody silent.
    """
    channels = Channels()
    stub = health_pb2_grpc.HealthStub(channels.get(address))
    silent = 0.0
    try:
        while True:
            await asyncio.sleep(ASKED_SECONDS)
            try:
                await stub.Check(
                    health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS, wait_for_ready=True
                )
                silent = 0.0
            except grpc.aio.AioRpcError as error:
                answered = error.code() not in _NO_ANSWER
                silent = 0.0 if answered else silent + ASKED_SECONDS + ANSWER_SECONDS
            yield silent
    finally:
        await channels.close()
