"""What a model's layers are made of: shapes and constants, without a weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the Hugging Face model: which of its `outputs` are computed here."""

    name: str
    outputs: int
    columns: range


@dataclass(frozen=True, slots=True)
class GroupedShape:
    """Grouped-query attention (arXiv 2305.13245)."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    norms: bool = False
    """Queries and keys go through an RMSNorm over each head before they are rotated."""

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def all_heads(self) -> GroupedHeads:
        """What one that computes alone attends with."""
        return GroupedHeads(0, 0, self.kv_heads, self.group)

    @property
    def rotary(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_dim

    @property
    def attended(self) -> int:
        """Values of a row that the output projection takes."""
        return self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class GroupedHeads:
    """Query heads that are attended with here: `group` for each of some KV heads."""

    first: int
    first_kv: int
    kv_heads: int
    group: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group


@dataclass(frozen=True, slots=True)
class MlaShape:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    heads: int
    q_rank: int | None
    """q_lora_rank; None: queries are projected at once."""
    latent: int
    """kv_lora_rank"""
    nope: int
    rope: int
    value: int
    interleaved: bool = True
    """Neighbours are rotated, not halves."""
    bias: bool = False
    """Of the projections down to the ranks, and of the output."""

    @property
    def rotary(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.rope

    @property
    def attended(self) -> int:
        """Values of a row that the output projection takes."""
        return self.heads * self.value


@dataclass(frozen=True, slots=True)
class MoeShape:
    """A mixture of experts. `intermediate` is one expert's."""

    experts: int
    choices: int
    """Experts that a row chooses."""
    intermediate: int
    groups: int = 1
    kept_groups: int = 1
    sigmoid: bool = False
    """Scores are sigmoids of the logits; else their softmax."""
    normalized: bool = False
    """Weights are divided by their sum."""
    factor: float = 1.0
    corrected: bool = False
    """Experts are chosen by score and a bias (e_score_correction_bias)."""
    shared: int = 0
    """Intermediate size of the shared expert; 0: none."""
    shared_name: str = "shared_experts"
    shared_gate: bool = False
    """The shared expert's output is weighed by a sigmoid."""


@dataclass(frozen=True, slots=True)
class FeedForwards:
    """Which feed-forward part each layer has: a dense one, or experts where `sparse`."""

    moe: MoeShape | None = None
    sparse: tuple[bool, ...] = ()
