"""LoRA adapters without matrices: one changes every letter, as a function of its files' digest.

What is written into the KV pool changes, too: a block that was computed with another adapter reads
as other tokens, so KV that is taken for what it is not shows in the answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.engine.adapters import Adapter, AdapterFiles, AdapterLimits

RANK = 1


class ScriptedAdapters:
    """See stepped.batch.Adapters."""

    def __init__(self) -> None:
        self._masks: dict[str, np.uint32] = {}

    def read(self, files: AdapterFiles, limits: AdapterLimits) -> tuple[Adapter, np.uint32]:
        """Any files will do."""
        return Adapter(files.id, RANK, len(files.weights)), mask_of(files.id)

    def put(self, adapter_id: str, weights: np.uint32) -> None:
        """Batches may name it."""
        self._masks[adapter_id] = weights

    def drop(self, adapter_id: str) -> None:
        """No batch will name it."""
        del self._masks[adapter_id]

    def masks(self, adapters: tuple[str, ...], sequences: int) -> NDArray[np.uint32]:
        """What each sequence's tokens are masked with. Raises KeyError for one not loaded."""
        if not adapters:
            return np.zeros(sequences, np.uint32)
        return np.array([self._masks[a] if a else 0 for a in adapters], np.uint32)


def mask_of(adapter_id: str) -> np.uint32:
    """Of name@digest: the digest's first 32 bits, never 0."""
    return np.uint32(int(adapter_id.rpartition("@")[2][:8], 16) | 1)
