"""What the coordinator says of a model."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.adapters import name_of


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """A LoRA adapter that some decode worker has; fields as in coordinator.proto."""

    id: str
    decode_workers: int
    current_workers: int

    @property
    def name(self) -> str:
        """What clients ask for, of name@digest."""
        return name_of(self.id)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that some worker serves; fields as in coordinator.proto."""

    name: str
    kv_layout: str
    block_tokens: int
    context_tokens: int
    prefill_workers: int
    decode_workers: int
    adapters: tuple[ServedAdapter, ...] = ()
    numerics: tuple[str, ...] = ()

    def adapter_for(self, asked: str) -> str:
        """The id that a client means by a name or an id; "" if no decode worker has it.

        Where workers hold different weights under a name it is what most of them mean by it, while
        one set of weights takes the place of another; of equally many any, but always the same.
        """
        same = [a for a in self.adapters if asked in (a.id, a.name)]
        return max(same, key=lambda a: (a.current_workers, a.id)).id if same else ""
