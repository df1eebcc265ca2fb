"""Models that come with Tandem: Hugging Face folders below `shipped/`, each with its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HOME = Path(__file__).parent / "shipped"


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """A folder that needs no fetching. Its tandem.json has the SHA-256 of each of its files."""

    name: str
    context_tokens: int
    licence: str
    about: str

    @property
    def folder(self) -> Path:
        """What engines load."""
        return _HOME / self.name


SHIPPED = {
    model.name: model
    for model in (
        ShippedModel(
            name="tiny-deepseek",
            context_tokens=4096,
            licence="Apache-2.0",
            about="DeepSeek V3 in small, 10M parameters: for tests and demos",
        ),
    )
}
