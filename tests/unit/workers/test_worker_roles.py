"""A worker with both services on one engine: who gets what, what a change of role closes."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from services.decode.service import DecodeServicer
from services.engine.api import StepOutput, TokenOutput
from services.prefill.service import PrefillServicer
from services.runtime.errors import from_rpc
from services.runtime.server import Server
from services.runtime.settings import ServerSettings
from services.worker.duty import Duty
from services.worker.worker import Worker
from tandem.decode.v1 import decode_pb2, decode_pb2_grpc
from tandem.generation.v1 import generation_pb2
from tandem.prefill.v1 import prefill_pb2, prefill_pb2_grpc


def token_request(name: str) -> generation_pb2.TokenRequest:
    sampling = generation_pb2.SamplingParams(
        temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, presence_penalty=0,
        frequency_penalty=0, max_tokens=8, min_tokens=0, seed=1,
    )  # fmt: skip
    return generation_pb2.TokenRequest(
        request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling
    )


class World:
    """A worker on a real server, and a frontend's two ways to ask it."""

    def __init__(self, engine, role: str, can_be: tuple[str, ...]) -> None:
        self.engine = engine
        self.now = 0.0
        servicers = {"prefill": PrefillServicer(engine, 30.0), "decode": DecodeServicer(engine)}
        duty = Duty(role, frozenset(can_be), min_seconds=60.0)
        self.worker = Worker(engine, servicers, duty, lambda: self.now)
        self._servicers = servicers

    async def start(self) -> None:
        self.server = Server(ServerSettings(), "test")
        self.server.add(
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
            self._servicers["prefill"],
            "tandem.prefill.v1.PrefillService",
        )
        self.server.add(
            decode_pb2_grpc.add_DecodeServiceServicer_to_server,
            self._servicers["decode"],
            "tandem.decode.v1.DecodeService",
        )
        self.channel = grpc.aio.insecure_channel(await self.server.start())
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(self.channel)
        self.stream = decode_pb2_grpc.DecodeServiceStub(self.channel).Decode()
        await self.stream.write(decode_pb2.DecodeRequest(open=decode_pb2.Open(frontend_id="f")))
        self.delivering = asyncio.create_task(self.worker.deliver())

    async def close(self) -> None:
        self.delivering.cancel()
        self.stream.cancel()
        await self.channel.close()
        await self.server.stop(0.1)

    def prefill(self, name: str):
        return self._prefill.Prefill(prefill_pb2.PrefillRequest(request=token_request(name)))

    async def decode(self, name: str) -> None:
        start = decode_pb2.Start(request=token_request(name))
        await self.stream.write(decode_pb2.DecodeRequest(start=start))

    async def frame(self) -> list[decode_pb2.RequestOutput]:
        return list((await self.stream.read()).outputs)

    def step(self, *outputs: TokenOutput) -> None:
        self.engine._outputs.put_nowait(StepOutput(outputs))


@pytest.fixture
async def make(puppet):
    worlds = []

    async def start(role: str, *can_be: str) -> World:
        world = World(puppet, role, can_be)
        await world.start()
        worlds.append(world)
        return world

    yield start
    for world in worlds:
        await world.close()


async def refusal(call) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return from_rpc(caught.value).reason


async def test_what_an_engine_step_brings_goes_to_whom_it_belongs(make):
    world = await make("both")
    call = world.prefill("p/0")
    await call.read()
    await world.decode("d/0")
    await world.engine.wait_for("decode")
    world.step(TokenOutput("d/0", (4,)), TokenOutput("p/0", (9,), prefill_done=True))
    assert list((await call.read()).done.token_ids) == [9]
    assert [(o.request_id, list(o.token_ids)) for o in await world.frame()] == [("d/0", [4])]


async def test_a_worker_that_may_change_serves_only_its_role_from_the_start(make):
    world = await make("decode", "prefill")
    assert await refusal(world.prefill("p/0")) == "ROLE_CHANGED"
    await world.decode("d/0")
    await world.engine.wait_for("decode")
    assert world.engine.named("prefill") == []


async def test_from_decode_to_prefill_and_back(make):
    world = await make("decode", "prefill", "both")
    await world.decode("d/0")
    await world.engine.wait_for("decode")
    assert world.worker.change_role("prefill", "prompts wait")
    assert [(o.request_id, o.moving) for o in await world.frame()] == [("d/0", True)]
    await world.decode("d/1")
    (refused,) = await world.frame()
    assert (refused.request_id, refused.error.reason) == ("d/1", "ROLE_CHANGED")
    call = world.prefill("p/0")
    assert (await call.read()).WhichOneof("message") == "accepted"
    world.step(TokenOutput("d/0", (4,)))  # what could not move goes on
    assert list((await world.frame())[0].token_ids) == [4]
    assert not world.worker.change_role("decode", "too soon")
    world.now = 60.0
    assert world.worker.change_role("decode", "the batch is full")
    assert await refusal(world.prefill("p/1")) == "ROLE_CHANGED"
    world.step(TokenOutput("p/0", (9,), prefill_done=True))  # what was accepted is finished
    assert list((await call.read()).done.token_ids) == [9]
    await world.decode("d/2")
    await world.engine.wait_for("decode", 2)
    assert world.worker.live == 2


async def test_to_serve_both_closes_nothing(make):
    world = await make("decode", "both")
    await world.decode("d/0")
    await world.engine.wait_for("decode")
    assert world.worker.change_role("both", "no prefill worker is left")
    assert (await world.prefill("p/0").read()).WhichOneof("message") == "accepted"
    world.step(TokenOutput("d/0", (4,)))
    assert [(o.moving, list(o.token_ids)) for o in await world.frame()] == [(False, [4])]


async def test_a_drain_waits_for_requests_to_move_and_changes_no_role(make):
    world = await make("decode", "prefill")
    await world.decode("d/0")
    await world.engine.wait_for("decode")
    drained = asyncio.create_task(world.worker.drain(30.0))
    assert [(o.request_id, o.moving) for o in await world.frame()] == [("d/0", True)]
    assert not world.worker.change_role("prefill", "late")
    cancel = decode_pb2.Cancel(request_id="d/0")
    await world.stream.write(decode_pb2.DecodeRequest(cancel=cancel))
    await asyncio.wait_for(drained, 10)
    assert [c[1] for c in world.engine.named("cancel")] == ["d/0"]
    assert await refusal(world.prefill("p/0")) == "DRAINING"


async def test_what_does_not_move_in_time_is_handed_back(make):
    world = await make("decode", "prefill")
    await world.decode("d/0")
    await world.engine.wait_for("decode")
    await world.worker.drain(0.01)
    outputs = await world.frame()
    while not outputs[-1].finish_reason:
        outputs += await world.frame()
    assert [(o.moving, o.error.reason) for o in outputs] == [(True, ""), (False, "DRAINING")]
