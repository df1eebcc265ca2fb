"""What a leader tells its ranks to be."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from services.runtime.settings import EngineSettings, KvSettings, ModelSettings


@dataclass(frozen=True, slots=True)
class Task:
    """A worker's settings, as far as its engine goes."""

    model: ModelSettings
    engine: EngineSettings
    kv: KvSettings
    region: str = ""
    host: str = "127.0.0.1"
    """Address that the worker listens on: for the ranks' KV transports, too, if they are here."""

    def to_json(self) -> str:
        """For the wire."""
        sections = {"model": self.model, "engine": self.engine, "kv": self.kv}
        told = {name: section.model_dump(mode="json") for name, section in sections.items()}
        return json.dumps(told | {"region": self.region, "host": self.host})

    @classmethod
    def from_json(cls, text: str) -> Task:
        """From the wire. Raises ValueError."""
        told = json.loads(text)
        return cls(
            ModelSettings.model_validate_json(json.dumps(told["model"])),
            EngineSettings.model_validate_json(json.dumps(told["engine"])),
            KvSettings.model_validate_json(json.dumps(told["kv"])),
            told["region"],
            told["host"],
        )

    def of_rank(self, rank: int) -> Task:
        """What one rank is to be: with ports and folders of its own; here with a share of cores."""
        engine, kv = self.engine, self.kv
        if not engine.group_address:
            threads = engine.threads or _cores()
            sharers = engine.ranks * engine.tensor_parallel
            engine = engine.model_copy(update={"threads": max(1, threads // sharers)})
        own: dict[str, object] = {}
        if kv.tcp_port:
            own["tcp_port"] = kv.tcp_port + rank
        if kv.disk_tier_folder:
            own["disk_tier_folder"] = str(Path(kv.disk_tier_folder) / f"rank-{rank}")
        return Task(self.model, engine, kv.model_copy(update=own), self.region, self.host)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
