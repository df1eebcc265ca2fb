"""What a model is made of, from the config.json of its Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from services.engine.models.errors import UnsupportedModelError
from services.engine.torch import families
from services.engine.torch.fields import CONFIG, Found, expect, flag, number, vectors, whole
from services.engine.torch.rope import Rope, read_rope
from services.engine.torch.shapes import GroupedShape, MlaShape, MoeShape


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of a model: see shapes.py for its parts."""

    vocabulary: int
    hidden: int
    intermediate: int
    """Of dense feed-forward parts."""
    layers: int
    attention: GroupedShape | MlaShape
    moe: MoeShape | None
    sparse: tuple[bool, ...]
    """Which layers have experts."""
    positions: int
    norm_epsilon: float
    rope: Rope
    tied_embeddings: bool
    mlp_bias: bool
    draft_layers: int
    """Layers for multi-token prediction, after the others; the weights may lack them."""
    fp8_block: tuple[int, int] = (128, 128)
    """Rows and columns that share a scale, where weights are FP8."""

    @property
    def group(self) -> int:
        """Query heads that look at the same keys."""
        attention = self.attention
        return attention.group if isinstance(attention, GroupedShape) else attention.heads

    @classmethod
    def from_folder(cls, path: Path) -> ModelConfig:
        """Reads `path`/config.json. Raises UnsupportedModelError, which names the key."""
        file = path / CONFIG
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"{file}: {error}", file=file) from error
        if not isinstance(found, dict):
            raise UnsupportedModelError(f"{file}: expected a JSON object", file=file)
        try:
            return cls.from_dict(found)
        except UnsupportedModelError as error:
            words = error.message.removeprefix(f"{CONFIG}: ")
            raise UnsupportedModelError(
                f"{file}: {words}", **{**error.metadata, "file": file}
            ) from error

    @classmethod
    def from_dict(cls, found: Found) -> ModelConfig:
        """From the content of a config.json."""
        family = families.of(found)
        expect(found, "hidden_act", "silu")
        layers = whole(found, "num_hidden_layers")
        feed_forwards = family.feed_forwards(found, layers)
        config = cls(
            vocabulary=whole(found, "vocab_size"),
            hidden=whole(found, "hidden_size"),
            intermediate=whole(found, "intermediate_size"),
            layers=layers,
            attention=family.attention(found),
            moe=feed_forwards.moe,
            sparse=feed_forwards.sparse,
            positions=whole(found, "max_position_embeddings", 2048),
            norm_epsilon=number(found, "rms_norm_eps", 1e-6),
            rope=read_rope(found),
            tied_embeddings=flag(found, "tie_word_embeddings"),
            mlp_bias=flag(found, "mlp_bias"),
            draft_layers=family.draft_layers(found),
            fp8_block=families.fp8_block(found),
        )
        vectors("hidden_size", config.hidden, families.VECTOR)
        vectors("intermediate_size", config.intermediate, families.VECTOR)
        return config
