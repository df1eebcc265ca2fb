"""Where a worker's KV may go, as its settings say."""

from __future__ import annotations

from kvtransfer.policy import ExportPolicy
from services.runtime.load import SettingsError
from services.runtime.settings import KvSettings


def export_policy(region: str, kv: KvSettings) -> ExportPolicy:
    """The rules of a worker in `region`. Raises SettingsError if a tenant has two."""
    tenants: dict[str, tuple[str, ...]] = {}
    for rule in kv.tenant_regions:
        tenant, _, regions = rule.partition("=")
        if tenant in tenants:
            raise SettingsError(f"kv.tenant_regions: tenant {tenant!r} has more than one rule")
        tenants[tenant] = tuple(name for name in regions.split("+") if name)
    return ExportPolicy(region, kv.export_regions, tenants)
