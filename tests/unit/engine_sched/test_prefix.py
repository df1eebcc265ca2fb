"""The choice between fetching a prefix and computing it, and the settings about where KV goes."""

from __future__ import annotations

import pytest

from kvtransfer.bandwidth import Estimate
from services.engine.api import KvPrefix
from services.engine.regions import export_policy
from services.engine.stepped.prefix import judge, tier_timeout
from services.runtime.load import SettingsError
from services.runtime.settings import KvSettings

PREFIX = KvPrefix("decode-0", "h:1", 600)


def test_the_faster_way_by_prediction():
    verdict = judge(PREFIX, 512, Estimate(0.1, "this peer"), 2048.0)
    assert verdict.fetch
    assert (verdict.compute_seconds, verdict.timeout) == (0.25, 0.5)
    told = verdict.report(512, 0.125, "fetched in 0.125 s")
    assert told.reason == (
        "512 tokens at decode-0: fetching takes 0.100 s, computing 0.250 s (by this peer; "
        "2048 tokens/s measured): fetched in 0.125 s"
    )
    assert not judge(PREFIX, 512, Estimate(0.3, "this peer"), 2048.0).fetch


def test_before_anything_was_measured_a_rate_is_assumed_and_said():
    verdict = judge(PREFIX, 500, Estimate(0.1, "the prior"), 0.0)
    assert verdict.compute_seconds == 0.5
    assert "by the prior; 1000 tokens/s assumed" in verdict.words


def test_a_fetch_has_a_least_time():
    assert judge(PREFIX, 4, Estimate(0.0, "this peer"), 1e6).timeout == 0.5
    assert judge(PREFIX, 512, Estimate(0.0, "this peer"), 512.0).timeout == 1.0


def test_a_tier_has_as_long_as_computing_would_take():
    assert tier_timeout(512, 1024.0) == 0.5
    assert tier_timeout(500, 0.0) == 0.5  # an assumed rate
    assert tier_timeout(4, 1e6) == 0.1


def test_rules_come_from_settings():
    kv = KvSettings(export_regions=("uk",), tenant_regions=("bank=eu+uk", "closed="))
    policy = export_policy("eu", kv)
    assert policy.allowed("") == {"eu", "uk"}
    assert policy.allowed("bank") == {"eu", "uk"}
    assert policy.allowed("closed") == set()
    with pytest.raises(SettingsError, match="tenant 'bank' has more than one rule"):
        export_policy("eu", KvSettings(tenant_regions=("bank=eu", "bank=us")))
