"""Where KV blocks may go: a source's rules, by region and by tenant. Pure.

The rules of one source, the most specific one first:

1. A tenant that has a rule of its own: to the regions that it names, and nowhere else.
2. Export regions are given: to these, and within the source's own region.
3. The source has a region: within it.
4. Nothing is known about regions: anywhere.

A sink that names no region is in none of them, and so gets blocks only by rule 4. What a sink
says of its region is its own word, as long as nothing proves who it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvtransfer.errors import RegionDeniedError


@dataclass(frozen=True, slots=True)
class ExportPolicy:
    """The rules of one source. "" is no region."""

    region: str = ""
    """The source's own."""
    export_regions: Sequence[str] = ()
    tenant_regions: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def regions(self) -> frozenset[str] | None:
        """Where blocks of tenants without a rule may go; None: anywhere."""
        named = {*self.export_regions, self.region} - {""}
        return frozenset(named) if named else None

    def allowed(self, tenant: str) -> frozenset[str] | None:
        """Where this tenant's blocks may go; None: anywhere."""
        own = self.tenant_regions.get(tenant)
        return self.regions if own is None else frozenset(own) - {""}

    def check(self, tenant: str, sink_region: str) -> None:
        """Raises RegionDeniedError, which names the rule, unless the blocks may go there."""
        allowed = self.allowed(tenant)
        if allowed is None or sink_region in allowed:
            return
        if tenant in self.tenant_regions:
            rule = f"blocks of tenant {tenant!r} may go only to {_listed(allowed)}"
        elif self.export_regions:
            rule = f"blocks may go only to {_listed(allowed)}"
        else:
            rule = f"blocks stay in the source's region, {self.region}"
        sink = f"region {sink_region}" if sink_region else "no region"
        raise RegionDeniedError(
            f"{rule}; the sink says it is in {sink}",
            region=sink_region,
            allowed=",".join(sorted(allowed)),
        )


def _listed(regions: frozenset[str]) -> str:
    return ", ".join(sorted(regions)) or "no region at all"
