"""What a request asks of the coordinator, hung workers, and moves: the frontend on real gRPC."""

from __future__ import annotations

import time

import grpc
import pytest

from kvtransfer.keys import block_keys, salt
from services.runtime.errors import OverloadedError, SloUnattainableError, from_rpc
from tandem.decode.v1 import decode_pb2
from tests.integration.test_frontend import (
    LAYOUT,
    a_world,
    answer_to,
    ask,
    eventually,
    failure,
    tokens_of,
)


async def test_wishes_reach_the_coordinator():
    async with a_world(region="fra") as world:
        await world.add_decode("d0")
        request = ask()
        request.priority, request.session = -3, "chat 1"
        request.service_level.ttft_seconds = 0.5
        request.service_level.itl_seconds = 0.05
        await world.whole(request)
        (place,) = world.coordinator.places
        assert (place.priority, place.session, place.region) == (-3, "chat 1", "fra")
        # What was spent before it asks is gone.
        assert 0 < place.ttft_seconds <= 0.5
        assert place.itl_seconds == 0.05
        assert (place.tenant, list(place.allowed_regions)) == ("", [])


async def test_what_came_of_an_attempt_is_reported():
    async with a_world() as world:
        await world.add_prefill("p0")
        await world.add_decode("d0")
        await world.whole(ask("abcdefgh", max_tokens=5))
        await world.settled()
        (report,) = world.coordinator.reports
        assert (report.generated_tokens, report.computed_tokens) == (5, 6)
        assert 0 < report.ttft_seconds < 5


async def test_a_tenants_requests_are_salted_and_kept_where_they_may_be():
    rules = ("acme=fra+ams",)
    async with a_world(tenant_metadata="x-tenant", tenant_regions=rules) as world:
        await world.add_prefill("p0")
        await world.add_decode("d0")
        for tenant in ("acme", "other"):
            await world.whole(ask("abcdefgh"), metadata=[("x-tenant", tenant)])
        first, second = world.coordinator.places
        assert (first.tenant, list(first.allowed_regions)) == ("acme", ["fra", "ams"])
        assert (second.tenant, list(second.allowed_regions)) == ("other", [])
        prompt = list(range(1, 9))
        for place in (first, second):
            expected = block_keys(prompt, 4, salt("letters", LAYOUT, place.tenant))
            assert list(place.block_keys) == expected
        requests = [p.request for p in world.prefill["p0"].requests]
        starts = [s.request for s in world.decode["d0"].starts]
        assert [r.tenant for r in requests] == [r.tenant for r in starts] == ["acme", "other"]


@pytest.mark.parametrize(
    "metadata", [[], [("x-tenant", "")], [("x-tenant", "a"), ("x-tenant", "b")]]
)
async def test_a_request_that_nobody_marked_is_of_no_tenant(metadata):
    async with a_world(tenant_metadata="x-tenant") as world:
        await world.add_decode("d0")
        error = await failure(world.whole(ask(), metadata=metadata))
        assert from_rpc(error).reason == "INVALID_REQUEST"
        assert "x-tenant" in error.details()
        assert not world.coordinator.places


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 101),
        ("priority", -101),
        ("session", "s" * 129),
        ("service_level.ttft_seconds", -0.1),
        ("service_level.itl_seconds", float("nan")),
        ("service_level.itl_seconds", float("inf")),
    ],
)
async def test_wishes_that_make_no_sense(field, value):
    async with a_world() as world:
        await world.add_decode("d0")
        request = ask()
        owner = request.service_level if "." in field else request
        setattr(owner, field.rpartition(".")[2], value)
        error = await failure(world.whole(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_rpc(error).metadata["field"] == field


@pytest.mark.parametrize("kind", [OverloadedError, SloUnattainableError])
async def test_a_refusal_says_when_to_come_back_and_what_to_ask_about(kind):
    async with a_world() as world:
        await world.add_decode("d0")
        world.coordinator.failures.append(kind("not now", retry_seconds=4.25))
        told = from_rpc(await failure(world.whole(ask())))
        assert (told.reason, told.retry_seconds) == (kind.reason, 4.25)
        assert told.metadata["request_id"] == "made-0"
        world.coordinator.failures.append(kind("not now"))
        told = from_rpc(await failure(world.stream(ask(request_id="mine"))))
        assert told.metadata["request_id"] == "mine"


# Hung engines: the process answers pings

SILENCE = 0.8
"""Seconds: half of it is there to answer a ping, and this process may be late by Awake's 0.25."""


async def test_an_engine_that_hangs_in_mid_stream_is_found_by_its_own_rhythm():
    async with a_world(silence_seconds=SILENCE) as world:
        (await world.add_decode("d0")).pause_at = 6
        await world.add_decode("d1")
        began = time.monotonic()
        answer = await world.whole(ask())
        assert 2 * SILENCE < time.monotonic() - began < 20.0, "stall_seconds are 30"
        assert list(answer.token_ids) == answer_to("tandem", 12)
        first, second = answer.route.attempts
        assert (first.failure, first.tokens, second.tokens) == ("WORKER_SILENT", 6, 6)
        assert not world.coordinator.reports[0].unreachable
        await world.settled()


async def test_an_engine_that_hangs_with_a_prompt_is_found_by_what_was_predicted():
    async with a_world(silence_seconds=SILENCE) as world:
        world.coordinator.predicted_ttft = 0.06
        (await world.add_prefill("p0")).gate.clear()
        await world.add_prefill("p1")
        await world.add_decode("d0")
        began = time.monotonic()
        answer = await world.whole(ask())
        assert 2 * SILENCE < time.monotonic() - began < 20.0
        assert list(answer.token_ids) == answer_to("tandem", 12)
        assert [a.prefill_worker for a in answer.route.attempts] == ["p0", "p1"]


async def test_a_prompt_that_is_not_accepted():
    async with a_world(silence_seconds=SILENCE) as world:
        (await world.add_prefill("p0")).accepts.clear()
        await world.add_prefill("p1")
        await world.add_decode("d0")
        answer = await world.whole(ask())
        assert list(answer.token_ids) == answer_to("tandem", 12)
        assert [a.failure for a in answer.route.attempts] == ["WORKER_SILENT", ""]


# Moving


async def test_a_request_moves_and_what_the_old_worker_says_late_is_dropped():
    async with a_world() as world:
        old = await world.add_decode("d0")
        new = await world.add_decode("d1")
        old.pause_at = 5
        call = world.stream(ask(max_tokens=20, request_id="x"))
        messages = [await call.read()]
        while len(tokens_of(messages)) < 5:
            messages.append(await call.read())
        new.pause_at = 0  # of no token yet: the successor begins, and waits
        (stream,) = old.streams_out
        moving = decode_pb2.RequestOutput(request_id="x/0", moving=True)
        stream.put_nowait(decode_pb2.DecodeResponse(outputs=[moving]))
        old.go_on(until=8)
        await eventually(lambda: new.starts)
        start = new.starts[0]
        assert start.prefix.worker_id == "d0"
        assert start.prefix.tokens == 6 + len(start.request.output_token_ids) - 1
        assert not start.HasField("source")
        while len(tokens_of(messages)) < 8:
            messages.append(await call.read())
        assert not old.cancels
        new.go_on()
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
        assert tokens_of(messages) == answer_to("tandem", 20)
        await eventually(lambda: old.cancels == ["x/0"])
        assert list(world.coordinator.places[1].exclude_workers) == ["d0"]
        first, second = messages[-1].route.attempts
        assert (first.failure, second.failure) == ("DRAINING", "")
        assert first.tokens + second.tokens == 20
        await world.settled()
        assert all(not r.failed_worker for r in world.coordinator.reports)
