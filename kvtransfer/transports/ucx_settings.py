"""What UCX is told, by whichever transport uses it. Without the prefix UCX_. Pure."""

from __future__ import annotations


def loopback_only(host: str) -> dict[str, str]:
    """Keeps UCX off every other network if `host` is a loopback address, and else lets it choose.

    UCX listens on every device that it may use, whatever address anything else listens on.
    """
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    return {"NET_DEVICES": "lo"} if loopback else {}
