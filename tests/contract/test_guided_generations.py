"""A share of the generations that `python -m tests.contract.guided_generations` has in full."""

from __future__ import annotations

from tests.contract.guided_generations import run, scripted, trained


async def test_documents_are_valid_under_drafts_and_disaggregation(tmp_path):
    outcome = await run(scripted(tmp_path), 60, 0)
    assert outcome.checked == 60
    assert outcome.accepted > 50
    assert outcome.drafted > outcome.accepted
    assert outcome.kv_bytes > 0


async def test_documents_of_a_trained_model_are_valid_under_drafts_and_disaggregation():
    outcome = await run(trained("tiny-deepseek"), 24, 1)
    assert outcome.checked == 24
    assert outcome.drafted > outcome.accepted > 50
    assert outcome.kv_bytes > 0
