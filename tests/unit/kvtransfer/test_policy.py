"""Where KV may go: the table of the rules, and what a refusal says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.errors import RegionDeniedError
from kvtransfer.policy import ExportPolicy

TENANTS = {"bank": ("eu", "uk"), "closed": ()}


def allows(policy: ExportPolicy, tenant: str, region: str) -> bool:
    try:
        policy.check(tenant, region)
    except RegionDeniedError:
        return False
    return True


@pytest.mark.parametrize(
    ("policy", "tenant", "goes_to"),
    [
        (ExportPolicy(), "", {"eu", "us", ""}),
        (ExportPolicy("eu"), "", {"eu"}),
        (ExportPolicy("eu", ("us",)), "", {"eu", "us"}),
        (ExportPolicy("", ("us",)), "", {"us"}),
        (ExportPolicy("us", (), TENANTS), "bank", {"eu"}),
        (ExportPolicy("us", ("eu", "us"), TENANTS), "bank", {"eu"}),
        (ExportPolicy("us", ("eu", "us"), TENANTS), "closed", set()),
        (ExportPolicy("", (), TENANTS), "closed", set()),
        (ExportPolicy("", (), TENANTS), "anybody", {"eu", "us", ""}),
        (ExportPolicy("us", (), TENANTS), "anybody", {"us"}),
        (ExportPolicy("", ("",), {"bank": ("",)}), "bank", set()),
    ],
)
def test_rules(policy, tenant, goes_to):
    assert {r for r in ("eu", "us", "") if allows(policy, tenant, r)} == goes_to


@pytest.mark.parametrize(
    ("policy", "tenant", "region", "words"),
    [
        (
            ExportPolicy("eu"), "", "us",
            "blocks stay in the source's region, eu; the sink says it is in region us",
        ),
        (
            ExportPolicy("eu", ("uk",)), "x", "",
            "blocks may go only to eu, uk; the sink says it is in no region",
        ),
        (
            ExportPolicy("us", (), TENANTS), "bank", "us",
            "blocks of tenant 'bank' may go only to eu, uk; the sink says it is in region us",
        ),
        (
            ExportPolicy("us", (), TENANTS), "closed", "us",
            "blocks of tenant 'closed' may go only to no region at all; "
            "the sink says it is in region us",
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_the_rule(policy, tenant, region, words):
    with pytest.raises(RegionDeniedError) as raised:
        policy.check(tenant, region)
    assert raised.value.message == words
    assert raised.value.metadata["region"] == region


REGIONS = st.sampled_from(["", "a", "b", "c"])


@settings(deadline=None)
@given(
    own=REGIONS,
    export=st.lists(REGIONS, max_size=3),
    tenants=st.dictionaries(st.sampled_from("xyz"), st.lists(REGIONS, max_size=3)),
    tenant=st.sampled_from("wxyz"),
    sink=REGIONS,
)
def test_no_rule_ever_widens_by_a_nameless_region(own, export, tenants, tenant, sink):
    policy = ExportPolicy(own, export, tenants)
    open_to_all = not own and not any(export) and tenant not in tenants
    if sink == "":
        assert allows(policy, tenant, sink) == open_to_all
    elif tenant in tenants:
        assert allows(policy, tenant, sink) == (sink in tenants[tenant])
    else:
        assert allows(policy, tenant, sink) == (open_to_all or sink in {own, *export})
