"""Which transports this machine can offer, found out before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.offload import Offload
from kvtransfer.transports.build import make_transports


def why_not_here(names: Sequence[str]) -> dict[str, str]:
    """Of these transports, those that can't be offered here: name to why, for a person."""
    segment, offload = Segment(1, bytes(NONCE_BYTES)), Offload()
    try:
        made = make_transports(names, segment, offload, host="127.0.0.1", port=0)
        return {t.name: why for t in made if (why := t.why_not())}
    finally:
        offload.close()
        segment.close()
