"""`tandem version`."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

SHOWN = ("grpcio", "protobuf", "torch", "numba", "tokenizers")


def lines() -> Iterator[str]:
    """Tandem's version, then those of what it stands on."""
    yield f"tandem {metadata.version('tandem-serving')}"
    yield f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in SHOWN:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} is not installed"
