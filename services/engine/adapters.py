"""LoRA adapters as every engine has them: what names one, where it may be read from, who uses it.

An adapter is known as name@digest, the digest being of its files. So is it in block keys, in what
workers report and in what requests are placed by: KV of other weights is never taken for its own,
whoever loads what under which name. Only clients say a bare name; the frontend makes an id of it.

Rules of the books:

 1. Of a name one version is present: the one that was loaded last. Loading the same files again
    makes that version present, and changes nothing else.
 2. One that was replaced takes requests that were placed with it for LINGER_SECONDS more, since
    placements are on their way. One that was unloaded takes none.
 3. Either is gone when no request has it. Until then it counts for the limits.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from services.engine.models.errors import UnsupportedAdapterError
from services.runtime.errors import (
    AdapterLimitError,
    AdapterNotLoadedError,
    InvalidRequestError,
    UnknownAdapterError,
)
from services.runtime.settings import EngineSettings

LINGER_SECONDS = 5.0
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_BYTES = 2**20
DIGEST_BYTES = 16

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What a worker holds at most."""

    count: int
    rank: int
    bytes: int

    @classmethod
    def of(cls, settings: EngineSettings) -> AdapterLimits:
        """As the settings have them."""
        size = settings.adapter_memory_mib * 2**20
        return cls(settings.max_adapters, settings.max_adapter_rank, size)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that was read; `rank` is its highest, `bytes` what its weights take."""

    id: str
    rank: int
    bytes: int

    @property
    def name(self) -> str:
        """What clients ask for."""
        return name_of(self.id)


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """An adapter that is held, and how many requests run with it or wait."""

    adapter: Adapter
    requests: int
    leaving: bool


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What was read of an adapter's folder, once: what is digested is what is used."""

    id: str
    config: bytes
    weights: bytes


def name_of(adapter_id: str) -> str:
    """The name in name@digest."""
    return adapter_id.partition("@")[0]


def check_name(name: str) -> str:
    """Raises InvalidRequestError for a name that no adapter can have."""
    if not _NAME.fullmatch(name):
        allowed = '1 to 64 letters, digits and "-_.", the first a letter or a digit'
        raise InvalidRequestError("name", name, allowed)
    return name


def named_paths(settings: Iterable[str], folder: str) -> list[tuple[str, Path]]:
    """Of engine.adapters, name=path each: those are the operator's, who may name any folder."""
    parted = (text.partition("=") for text in settings)
    return [(name, Path(folder, path).expanduser()) for name, _, path in parted]


def folder_within(root: str, path: str) -> Path:
    """Where a caller's path leads, below `root` (engine.adapter_folder) and nowhere else.

    Links are followed first. Raises InvalidRequestError.
    """
    if not root:
        raise InvalidRequestError(
            "path", path, "this worker loads none while it runs: engine.adapter_folder is not set"
        )
    base = Path(root).expanduser().resolve()
    try:
        found = (base / path).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL
        found = base.parent
    if not found.is_relative_to(base) or found == base:
        raise InvalidRequestError("path", path, "a folder below engine.adapter_folder")
    return found


def read_files(name: str, folder: Path, limits: AdapterLimits, within: str = "") -> AdapterFiles:
    """The files of an adapter, which lie below `within` if that is given, links followed.

    Raises UnsupportedAdapterError, AdapterLimitError.
    """
    config = _read(folder / CONFIG, within, CONFIG_BYTES, "a configuration is smaller")
    most = f"engine.adapter_memory_mib allows {limits.bytes >> 20} MiB for all adapters"
    weights = _read(folder / WEIGHTS, within, limits.bytes, most)
    found = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"tandem-adapter")
    for part in (config, weights):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return AdapterFiles(f"{name}@{found.hexdigest()}", config, weights)


def _read(asked: Path, within: str, most: int, why: str) -> bytes:
    try:
        file = asked.resolve(strict=True)
        if within and not file.is_relative_to(Path(within).expanduser().resolve()):
            raise UnsupportedAdapterError(f"{asked}: leads out of {within}", file=asked)
        # What was resolved holds no link; nor is a pipe waited for.
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnsupportedAdapterError(f"{asked}: is not a regular file", file=asked)
            if status.st_size > most:
                raise AdapterLimitError(f"{asked}: {status.st_size} bytes; {why}", file=asked)
            return opened.read(most)
    except (OSError, RuntimeError) as error:
        raise UnsupportedAdapterError(
            f"{asked}: {getattr(error, 'strerror', None) or error}; an adapter is a folder with "
            f"{CONFIG} and {WEIGHTS}",
            file=asked,
        ) from None


class _State(enum.Enum):
    PRESENT = "takes requests"
    REPLACED = "takes requests that were placed with it"
    UNLOADED = "takes none"


@dataclass(slots=True)
class _Held:
    adapter: Adapter
    state: _State = _State.PRESENT
    since: float = 0.0
    requests: int = 0


class AdapterBooks:
    """Who has what. Times are seconds of a clock that never goes back; see the module's rules."""

    def __init__(self, limits: AdapterLimits) -> None:
        self._limits = limits
        self._held: dict[str, _Held] = {}

    def get(self, adapter_id: str) -> Adapter | None:
        """One that is held."""
        held = self._held.get(adapter_id)
        return None if held is None else held.adapter

    def check_room(self, adapter: Adapter) -> None:
        """Raises AdapterLimitError if it may not be taken in beside what is held."""
        limits, others = self._limits, [h for i, h in self._held.items() if i != adapter.id]
        if adapter.rank > limits.rank:
            raise AdapterLimitError(
                f"{adapter.name} has rank {adapter.rank}; engine.max_adapter_rank is {limits.rank}",
                rank=adapter.rank,
            )
        if len(others) >= limits.count:
            names = ", ".join(h.adapter.id for h in others) or "none"
            raise AdapterLimitError(
                f"engine.max_adapters is {limits.count}; held: {names}", held=len(others)
            )
        taken = sum(h.adapter.bytes for h in others)
        if taken + adapter.bytes > limits.bytes:
            raise AdapterLimitError(
                f"{adapter.name} takes {adapter.bytes} bytes and others {taken}; "
                f"engine.adapter_memory_mib allows {limits.bytes}",
                bytes=adapter.bytes,
            )

    def load(self, adapter: Adapter, now: float) -> None:
        """Makes it the present one of its name. Raises AdapterLimitError."""
        self.check_room(adapter)
        for held in self._of(adapter.name):
            if held.state is _State.PRESENT and held.adapter.id != adapter.id:
                held.state, held.since = _State.REPLACED, now
        held = self._held.setdefault(adapter.id, _Held(adapter))
        held.state = _State.PRESENT

    def unload(self, name: str) -> list[AdapterStatus]:
        """All versions of a name leave. Raises UnknownAdapterError if there is none."""
        found = self._of(name)
        if not found:
            have = ", ".join(sorted({h.adapter.name for h in self._held.values()})) or "none"
            raise UnknownAdapterError(f"no adapter {name!r} here; loaded: {have}", adapter=name)
        for held in found:
            held.state = _State.UNLOADED
        return [_status(held) for held in found]

    def check(self, adapter_id: str) -> None:
        """Raises AdapterNotLoadedError if no request can have it."""
        held = self._held.get(adapter_id)
        if held is None or held.state is _State.UNLOADED:
            have = ", ".join(self.listed) or "none"
            raise AdapterNotLoadedError(
                f"adapter {adapter_id!r} is not loaded on this worker; loaded: {have}",
                adapter=adapter_id,
            )

    def begin(self, adapter_id: str) -> None:
        """A request has it from now on."""
        self._held[adapter_id].requests += 1

    def end(self, adapter_id: str) -> None:
        """A request has it no more."""
        self._held[adapter_id].requests -= 1

    def take_gone(self, now: float) -> list[str]:
        """Forgets those that are gone by rule 3; their ids."""
        gone = [
            adapter_id
            for adapter_id, held in self._held.items()
            if not held.requests
            and (
                held.state is _State.UNLOADED
                or (held.state is _State.REPLACED and now - held.since >= LINGER_SECONDS)
            )
        ]
        for adapter_id in gone:
            del self._held[adapter_id]
        return gone

    @property
    def listed(self) -> tuple[str, ...]:
        """Ids that requests are taken with; of a name the present version first."""
        return tuple(h.adapter.id for h in self._sorted() if h.state is not _State.UNLOADED)

    def status(self) -> list[AdapterStatus]:
        """All that is held, by name, the present version first."""
        return [_status(held) for held in self._sorted()]

    def _sorted(self) -> list[_Held]:
        return sorted(
            self._held.values(),
            key=lambda h: (h.adapter.name, h.state is not _State.PRESENT, -h.since),
        )

    def _of(self, name: str) -> list[_Held]:
        return [held for held in self._held.values() if held.adapter.name == name]


def _status(held: _Held) -> AdapterStatus:
    return AdapterStatus(held.adapter, held.requests, held.state is not _State.PRESENT)
