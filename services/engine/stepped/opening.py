"""What a stepped engine begins with, beside its model: how long a context may be, tiers of KV."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from kvtransfer.errors import TierUnusableError
from kvtransfer.store import KvStore
from kvtransfer.tiers.build import open_tiers
from services.runtime.load import SettingsError
from services.runtime.settings import EngineSettings, KvSettings

log = logging.getLogger(__name__)

MEBIBYTE = 2**20


def context_window(own: int, settings: EngineSettings, store: KvStore) -> int:
    """Tokens of the longest sequence: the model's own window or less, and never beyond the pool.

    So whatever is accepted fits when it is alone. Raises SettingsError if more was asked for.
    """
    pool = store.total_blocks * store.layout.block_tokens
    wanted = settings.context_tokens
    if wanted > min(own, pool):
        raise SettingsError(
            f"engine.context_tokens: {wanted} is not possible; the model's window is {own} tokens, "
            f"the KV pool holds {pool} (engine.kv_blocks, engine.kv_memory_mib)"
        )
    if not wanted and pool < own:
        log.warning("context window cut from %d to %d tokens, which the KV pool holds", own, pool)
    return wanted or min(own, pool)


def open_tiers_of(
    store: KvStore, numerics: str, kv: KvSettings, clock: Callable[[], float]
) -> None:
    """Starts the tiers below the pool that the settings ask for. Raises SettingsError."""
    if kv.disk_tier_mib and not kv.disk_tier_folder:
        raise SettingsError("kv.disk_tier_mib: a disk tier needs a kv.disk_tier_folder")
    try:
        tiers = open_tiers(
            store,
            # Without a digest of its numbers nothing says that a model is the one that a
            # folder's blocks were computed by.
            numerics or secrets.token_hex(),
            host_bytes=kv.host_tier_mib * MEBIBYTE,
            disk_bytes=kv.disk_tier_mib * MEBIBYTE,
            folder=kv.disk_tier_folder,
            clock=clock,
        )
    except (TierUnusableError, ValueError) as error:
        raise SettingsError(f"kv.host_tier_mib, kv.disk_tier_mib: {error}") from error
    if tiers is not None:
        tiers.start()
