"""What an operator decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.coordinator.core.admission import PATIENCE_SECONDS
from services.coordinator.core.expert_plans import ExpertRules


@dataclass(frozen=True, slots=True)
class Rules:
    """Fields are the settings of these names (docs/settings.md)."""

    lease_seconds: float
    queue_limit: int
    local_prefill_tokens: int
    worker_wait_seconds: float = 0.0
    rebalance_seconds: float = 0.0
    experts: ExpertRules = field(default_factory=ExpertRules)
    ttft_seconds: float = 0.0
    """Service level of requests that ask for none; 0: none."""
    itl_seconds: float = 0.0
    """The same."""
    explain_decisions: int = 4096
    region_seconds: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Round-trip times between regions."""
    queue_patience_seconds: float = PATIENCE_SECONDS
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
