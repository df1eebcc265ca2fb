"""A share of the generations that `python -m tests.contract.guided_generations` has in full."""

from __future__ import annotations

from tests.contract.guided_generations import run

COUNT = 60


async def test_documents_are_valid_under_drafts_and_disaggregation(tmp_path):
    outcome = await run(COUNT, 0, tmp_path)
    assert outcome.checked == COUNT
    assert outcome.cut_off < COUNT // 10
    assert outcome.accepted > 50
    assert outcome.drafted > outcome.accepted
