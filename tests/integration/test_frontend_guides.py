"""What a frontend does about guides before it asks anybody else."""

from __future__ import annotations

import pytest

from services.runtime.errors import from_rpc
from tandem.generation.v1 import generation_pb2
from tests.integration.test_frontend import VOCABULARY, Letters, a_world, ask, failure

TOKENS = [b"", *(bytes([96 + t]) for t in range(1, VOCABULARY))]


def guided(**form) -> generation_pb2.Guide:
    return generation_pb2.Guide(**form)


@pytest.fixture
async def world(monkeypatch):
    monkeypatch.setattr(Letters, "tokens", TOKENS, raising=False)
    async with a_world(guide_bytes=1000, guide_seconds=10.0) as it:
        await it.add_prefill("p0")
        await it.add_decode("d0")
        yield it


@pytest.mark.parametrize(
    ("more", "field", "words"),
    [
        ({"guide": guided()}, "sampling.guide", "must be set"),
        ({"guide": guided(regex="(a")}, "sampling.guide.regex", "unclosed"),
        ({"guide": guided(regex="[0-9]+")}, "sampling.guide.regex", "no text"),
        ({"guide": guided(regex="a" * 1001)}, "sampling.guide.regex", "frontend.guide_bytes"),
        ({"guide": guided(json_schema='{"not": {}}')}, "sampling.guide.json_schema", "at #"),
        ({"guide": guided(choice=generation_pb2.Choice())}, "sampling.guide.choice.texts", "1 to"),
        ({"guide": guided(grammar="start: b")}, "sampling.guide.grammar", "unknown name"),
        ({"guide": guided(regex="a"), "ignore_eos": True}, "sampling.ignore_eos", "guide"),
    ],
)
async def test_a_bad_guide_is_refused_before_anything_is_asked(world, more, field, words):
    error = from_rpc(await failure(world.whole(ask(**more))))
    assert error.reason == "INVALID_REQUEST"
    assert error.metadata["field"] == field
    assert words in error.message
    assert not world.coordinator.places
    assert not world.decode["d0"].starts
    assert not world.prefill["p0"].requests


@pytest.mark.parametrize(
    "guide",
    [
        guided(regex="[a-z]+"),
        guided(grammar="start: /[a-z]/ start?"),
        guided(choice=generation_pb2.Choice(texts=["ab", "cd"])),
    ],
)
async def test_a_good_guide_reaches_both_workers_as_it_came(world, guide):
    await world.whole(ask(guide=guide))
    assert world.prefill["p0"].requests[0].request.sampling.guide == guide
    assert world.decode["d0"].starts[0].request.sampling.guide == guide
