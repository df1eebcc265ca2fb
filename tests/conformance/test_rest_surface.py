"""The JSON surface as a whole: requests made of its OpenAPI document, and its page in a browser."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.conformance.browse import NoBrowserError, check
from tests.conformance.conformance_world import serving
from tests.conformance.fuzz import run

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(tmp_path_factory):
    async with serving(tmp_path_factory.mktemp("model")) as it:
        yield it


async def test_a_hundred_of_the_requests_that_fuzz_makes(world):
    report = await run(world, cases=100, seed=7)
    # Some can't be sent at all.
    assert report.cases > 80
    assert {status for _, status in report.statuses} >= {200, 400, 404}


async def test_a_browser_shows_the_page(world):
    try:
        await check(f"{world.url.removesuffix('/v1')}/docs")
    except NoBrowserError as error:
        pytest.skip(str(error))
