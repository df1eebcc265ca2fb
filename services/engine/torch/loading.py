"""Reads a Hugging Face folder's weights, joins them, and lays them out as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from services.engine.models.errors import UnsupportedModelError
from services.engine.torch.config import ModelConfig
from services.engine.torch.kernels import experts, latent_steps, route
from services.engine.torch.kernels.int4 import Int4Linear
from services.engine.torch.kernels.linear import Linear
from services.engine.torch.kernels.moe_steps import ExpertWeights, RouterWeights
from services.engine.torch.linears import Projection
from services.engine.torch.shapes import GroupedShape, MlaShape, MoeShape
from services.engine.torch.tensors import TensorFiles
from services.engine.torch.weights import (
    DenseWeights,
    DraftWeights,
    GroupedWeights,
    Layer,
    MlaWeights,
    ModelWeights,
    MoeWeights,
    latent_shape,
)

# Rows that the head computes at once, at most: probing it with many would take long.
HEAD_ROWS = 64

T = TypeVar("T")

ExpertPlaces = Sequence[Sequence[int]]
"""By layer with experts, that of multi-token prediction last: the expert in each place here."""


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    packed: bool,
    draft: bool = False,
    places: ExpertPlaces | None = None,
    threads: int = 1,
    int4: bool = False,
) -> ModelWeights:
    """Reads, converts, joins and lays out everything. Raises UnsupportedModelError.

    Layers are read by so many threads at once, which also is how a disk gives most. What is stored
    as it is used (the embedding; where nothing can be packed, all) stays mapped: processes on a
    host share it.
    draft: with the module of multi-token prediction, if the folder has it; places: which experts,
    None: all of them; int4: quantize linear layers, but not the head.
    """
    reader = _Reader(TensorFiles(folder, config.fp8_block), config, dtype, packed, int4)
    wide = config.vocabulary, config.hidden
    embedding = reader.files.get("model.embed_tokens.weight", *wide).to(dtype)
    head = reader.head("lm_head", None if not config.tied_embeddings else embedding)
    with _Threads(threads) as pool:
        layers = tuple(pool.map(reader.layer, range(config.layers), config.sparse))
        drafting = reader.draft(embedding, head) if draft else None
        experts = list(pool.map(reader.experts, *reader.sparse(places)))
    return ModelWeights(
        embedding=embedding,
        layers=layers,
        norm=reader.norm("model.norm", config.hidden),
        head=head,
        draft=drafting,
        experts=experts,
    )


class _Threads:
    """Threads that each compute alone, as they read."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, call: Callable[..., T], *arguments: Iterable[Any]) -> Iterator[T]:
        """In order. The first error is raised."""

        def quiet(*given: Any) -> T:
            with torch.inference_mode():  # which each thread has to say
                return call(*given)

        return self._pool.map(quiet, *arguments)


class _Reader:
    """Turns tensors into layers. Several threads may call layer() and experts()."""

    def __init__(
        self,
        files: TensorFiles,
        config: ModelConfig,
        dtype: torch.dtype,
        packed: bool,
        int4: bool,
    ) -> None:
        self.files = files
        self._config = config
        self._dtype = dtype
        self._packed = packed
        self._linear = Int4Linear if int4 else Linear
        if int4 and config.moe is not None:
            raise UnsupportedModelError(
                "engine.weights=int4 is for models without experts: theirs are not quantized"
            )
        self._sparse = [
            f"model.layers.{i}.mlp." for i, sparse in enumerate(config.sparse) if sparse
        ]
        """Prefixes of parts with experts; that of multi-token prediction joins last."""

    def norm(self, name: str, width: int) -> torch.Tensor:
        return self.files.get(f"{name}.weight", width).to(torch.float32, copy=True)

    def _projection(
        self, parts: dict[str, int], inputs: int, *, biased: Sequence[str] = ()
    ) -> Projection:
        """Modules side by side; those that are not `biased` have zeros where others are."""
        weight = [self._matrix(name, n, inputs) for name, n in parts.items()]
        offset = None
        if biased:
            offset = torch.cat([
                self.files.get(f"{name}.bias", n) if name in biased else torch.zeros(n)
                for name, n in parts.items()
            ]).to(self._dtype)  # fmt: skip
        linear = self._linear(torch.cat(weight), offset, packed=self._packed)
        return Projection(linear, tuple(parts.items()))

    def _matrix(self, name: str, outputs: int, inputs: int) -> torch.Tensor:
        return self.files.matrix(f"{name}.weight", outputs, inputs, self._dtype)

    def head(self, name: str, weight: torch.Tensor | None) -> Projection:
        """A head of its own, or of a weight that is there."""
        if weight is None:
            weight = self._matrix(name, self._config.vocabulary, self._config.hidden)
        linear = Linear(weight, None, packed=self._packed, most_rows=HEAD_ROWS)
        return Projection(linear, ((name, self._config.vocabulary),))

    def layer(self, index: int, sparse: bool) -> Layer:
        config, prefix = self._config, f"model.layers.{index}."
        attention = config.attention
        return Layer(
            attention_norm=self.norm(f"{prefix}input_layernorm", config.hidden),
            attention=(
                self._grouped(f"{prefix}self_attn.", attention)
                if isinstance(attention, GroupedShape)
                else self._mla(f"{prefix}self_attn.", attention)
            ),
            feed_forward_norm=self.norm(f"{prefix}post_attention_layernorm", config.hidden),
            feed_forward=(
                self._moe(f"{prefix}mlp.", config.moe)
                if sparse and config.moe is not None
                else self._dense(f"{prefix}mlp.", config.intermediate, bias=config.mlp_bias)
            ),
        )

    def _grouped(self, prefix: str, shape: GroupedShape) -> GroupedWeights:
        kv = shape.kv_heads * shape.head_dim
        parts = {"q_proj": shape.attended, "k_proj": kv, "v_proj": kv}
        named = {prefix + name: outputs for name, outputs in parts.items()}
        output = f"{prefix}o_proj"
        norms = None
        if shape.norms:
            norms = (
                self.norm(f"{prefix}q_norm", shape.head_dim),
                self.norm(f"{prefix}k_norm", shape.head_dim),
            )
        hidden = self._config.hidden
        return GroupedWeights(
            qkv=self._projection(named, hidden, biased=tuple(named) if shape.qkv_bias else ()),
            output=self._projection(
                {output: hidden}, shape.attended, biased=(output,) if shape.output_bias else ()
            ),
            norms=norms,
        )

    def _mla(self, prefix: str, shape: MlaShape) -> MlaWeights:
        hidden = self._config.hidden
        whole_q = shape.heads * (shape.nope + shape.rope)
        kv, output = f"{prefix}kv_a_proj_with_mqa", f"{prefix}o_proj"
        q = f"{prefix}q_proj" if shape.q_rank is None else f"{prefix}q_a_proj"
        q_norm = q_up = None
        biased: tuple[str, ...] = (kv,)
        if shape.q_rank is not None:
            q_norm = self.norm(f"{prefix}q_a_layernorm", shape.q_rank)
            q_up = self._projection({f"{prefix}q_b_proj": whole_q}, shape.q_rank)
            biased = (q, kv)
        down = {q: shape.q_rank or whole_q, kv: shape.latent + shape.rope}
        kv_b = self._matrix(
            f"{prefix}kv_b_proj", shape.heads * (shape.nope + shape.value), shape.latent
        )
        norm = self.norm(f"{prefix}kv_a_layernorm", shape.latent)
        return MlaWeights(
            down=self._projection(down, hidden, biased=biased if shape.bias else ()),
            q_norm=q_norm,
            q_up=q_up,
            latent=latent_steps.pack(latent_shape(self._config, shape), kv_b, norm),
            output=self._projection(
                {output: hidden}, shape.attended, biased=(output,) if shape.bias else ()
            ),
        )

    def _dense(self, prefix: str, wide: int, *, bias: bool = False) -> DenseWeights:
        hidden = self._config.hidden
        both = {f"{prefix}gate_proj": wide, f"{prefix}up_proj": wide}
        down = {f"{prefix}down_proj": hidden}
        return DenseWeights(
            gate_up=self._projection(both, hidden, biased=tuple(both) if bias else ()),
            down=self._projection(down, wide, biased=tuple(down) if bias else ()),
        )

    def _moe(self, prefix: str, shape: MoeShape) -> MoeWeights:
        hidden = self._config.hidden
        weight = self.files.matrix(f"{prefix}gate.weight", shape.experts, hidden, torch.float32)
        bias = torch.zeros(route.padded(shape.experts))
        if shape.corrected:
            name = f"{prefix}gate.e_score_correction_bias"
            bias[: shape.experts] = self.files.get(name, shape.experts)
        gate = None
        if shape.shared_gate:
            gate = self.files.get(f"{prefix}shared_expert_gate.weight", 1, hidden)
        shared = None
        if shape.shared:
            shared = self._dense(f"{prefix}{shape.shared_name}.", shape.shared)
        if prefix not in self._sparse:
            self._sparse.append(prefix)
        router = RouterWeights(route.pack(weight, gate), bias)
        return MoeWeights(self._sparse.index(prefix), router, shared)

    def draft(self, embedding: torch.Tensor, head: Projection) -> DraftWeights | None:
        """None if the folder has none."""
        config, prefix = self._config, f"model.layers.{self._config.layers}."
        if not config.draft_layers or f"{prefix}eh_proj.weight" not in self.files:
            return None
        hidden = config.hidden
        own_head, own_tokens = f"{prefix}shared_head.head", f"{prefix}embed_tokens.weight"
        # Released models repeat embedding and head; where they are the same they are shared.
        if f"{own_head}.weight" in self.files:
            weight = self._matrix(own_head, config.vocabulary, hidden)
            named = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
            same = self.files.matrix(named, config.vocabulary, hidden, self._dtype)
            if not torch.equal(weight, same):
                head = self.head(own_head, weight)
        if own_tokens in self.files:
            found = self.files.get(own_tokens, config.vocabulary, hidden).to(self._dtype)
            embedding = embedding if torch.equal(found, embedding) else found.clone()
        return DraftWeights(
            token_norm=self.norm(f"{prefix}enorm", hidden),
            hidden_norm=self.norm(f"{prefix}hnorm", hidden),
            joined=self._projection({f"{prefix}eh_proj": hidden}, 2 * hidden),
            layer=self.layer(config.layers, sparse=config.moe is not None),
            norm=self.norm(f"{prefix}shared_head.norm", hidden),
            embedding=embedding,
            head=head,
        )

    def sparse(self, places: ExpertPlaces | None) -> tuple[list[str], ExpertPlaces]:
        """Of the layers read so far that have experts: their prefixes, and which to read."""
        shape = self._config.moe
        if shape is None:
            return [], []
        if places is None:
            places = [range(shape.experts)] * len(self._sparse)
        if len(places) != len(self._sparse):
            raise ValueError(f"places of {len(places)} layers, expected {len(self._sparse)}")
        return self._sparse, places

    def experts(self, prefix: str, here: Sequence[int]) -> ExpertWeights:
        """Experts of one layer."""
        shape = self._config.moe
        assert shape is not None, "sparse() names none without"
        gate_up: torch.Tensor | None = None
        down: torch.Tensor | None = None
        for place, expert in enumerate(here):
            gate, up, out = self._expert(f"{prefix}experts.", shape, expert)
            wide, narrow = experts.pack_gated(gate, up), experts.pack(out)
            if gate_up is None or down is None:
                gate_up = wide.new_empty((len(here), *wide.shape))
                down = narrow.new_empty((len(here), *narrow.shape))
            gate_up[place], down[place] = wide, narrow
        if gate_up is None or down is None:
            none = torch.zeros(0, dtype=self._dtype)
            return ExpertWeights(none, none)
        return ExpertWeights(gate_up, down)

    def _expert(
        self, prefix: str, shape: MoeShape, expert: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate and up [intermediate, hidden], down [hidden, intermediate]."""
        wide, hidden = shape.intermediate, self._config.hidden
        name = f"{prefix}{expert}."
        return (
            self._matrix(f"{name}gate_proj", wide, hidden),
            self._matrix(f"{name}up_proj", wide, hidden),
            self._matrix(f"{name}down_proj", hidden, wide),
        )
