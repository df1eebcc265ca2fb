"""The model and its adapters as OpenAI lists models, and the fingerprint of what answers. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from services.frontend.served import ServedModel

OWNER = "tandem"


def fingerprint(served: ServedModel, adapter: str) -> str:
    """Of all that decides tokens; the same as long as that is.

    That is the model, its KV's layout, the adapter (name@digest, or "") and by what numerics
    workers compute: a digest of logits, and so of weights, kernels and hardware.
    """
    digest = hashlib.blake2b(digest_size=6)
    for part in (served.name, served.kv_layout, adapter, *served.numerics):
        digest.update(f"{len(part)}:{part}".encode())
    return f"fp_{digest.hexdigest()}"


def named(served: ServedModel) -> Iterator[tuple[str, str]]:
    """(what to ask for, the model that it is an adapter of, if it is one), the model first."""
    yield served.name, ""
    for name in sorted({a.name for a in served.adapters} - {served.name}):
        yield name, served.name
