"""Reads a Hugging Face folder's weights, joins them, and lays them out as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
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
from services.engine.torch.parallel.tensor_cuts import WHOLE, Cuts, Edges, widths
from services.engine.torch.shapes import GroupedShape, MlaShape, Module, MoeShape
from services.engine.torch.tensors import TensorFiles
from services.engine.torch.weights import (
    DenseWeights,
    DraftWeights,
    GroupedWeights,
    Layer,
    MlaWeights,
    ModelWeights,
    MoeWeights,
    Slice,
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
    cuts: Cuts = WHOLE,
) -> ModelWeights:
    """Reads, converts, joins and lays out everything. Raises UnsupportedModelError.

    Layers are read by so many threads at once, which also is how a disk gives most. What is stored
    as it is used (the embedding; where nothing can be packed, all) stays mapped: processes on a
    host share it.
    draft: with the module of multi-token prediction, if the folder has it; places: which experts,
    None: all of them; int4: quantize linear layers, but not the head; cuts: which columns of each
    layer (embedding, norms and routers are whole everywhere). Raises SettingsError if a layer can't
    be cut so.
    """
    reader = _Reader(TensorFiles(folder, config.fp8_block), config, dtype, packed, int4, cuts)
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
        slices=tuple(reader.slices.values()),
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
        cuts: Cuts,
    ) -> None:
        self.files = files
        self._config = config
        self._dtype = dtype
        self._packed = packed
        self._linear = Int4Linear if int4 else Linear
        self._cuts = cuts
        self.slices: dict[tuple[int, int, tuple[range, ...]], Slice] = {}
        """By inputs, outputs of the whole layer, and which of them."""
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
        self,
        parts: dict[str, int],
        inputs: int,
        *,
        biased: Sequence[str] = (),
        spread: tuple[int, ...] = (),
        gather: bool = True,
    ) -> Projection:
        """Modules side by side, of which each rank computes a part; all get all with `gather`.

        Those that are not `biased` have zeros where others are.
        """
        edges = self._cuts.edges(" and ".join(parts), sum(parts.values()))
        modules = self._cuts.within(parts, self._cuts.here(edges))
        gathered = self._shares(edges) if gather else ()
        return Projection(self._joined(modules, inputs, biased), modules, spread, gathered)

    def _shares(self, edges: Edges) -> tuple[int, ...]:
        """What each rank has; () if there is one."""
        return widths(edges) if self._cuts.ranks > 1 else ()

    def _joined(self, modules: Sequence[Module], inputs: int, biased: Sequence[str]) -> Linear:
        found = self._linear_of(modules, inputs, biased)
        whole = [replace(m, columns=range(m.outputs)) for m in modules]
        return self._noted(found, modules, lambda: self._linear_of(whole, inputs, biased))

    def _linear_of(self, modules: Sequence[Module], inputs: int, biased: Sequence[str]) -> Linear:
        weight = [self._matrix(m.name, m.outputs, inputs, m.columns) for m in modules]
        offset = None
        if biased:
            offset = torch.cat([
                self.files.get(f"{m.name}.bias", m.outputs)[m.columns.start : m.columns.stop]
                if m.name in biased
                else torch.zeros(len(m.columns))
                for m in modules
            ]).to(self._dtype)  # fmt: skip
        outputs = sum(m.outputs for m in modules)
        return self._linear(torch.cat(weight), offset, packed=self._packed, whole_outputs=outputs)

    def _noted(
        self, linear: Linear, modules: Sequence[Module], whole: Callable[[], Linear]
    ) -> Linear:
        """If it is a slice of a layer by a library's kernel it has to be proven."""
        starts = accumulate((m.outputs for m in modules), initial=0)
        columns = tuple(
            range(start + m.columns.start, start + m.columns.stop)
            for m, start in zip(modules, starts, strict=False)
            if m.columns
        )
        outputs = sum(m.outputs for m in modules)
        if linear.outputs < outputs and not linear.own:
            key = linear.inputs, outputs, columns
            self.slices.setdefault(key, Slice(linear, whole, columns))
        return linear

    def _matrix(
        self, name: str, outputs: int, inputs: int, here: range | None = None
    ) -> torch.Tensor:
        return self.files.matrix(f"{name}.weight", outputs, inputs, self._dtype, here)

    def head(self, name: str, weight: torch.Tensor | None) -> Projection:
        """A head of its own, or of a weight that is there."""
        outputs, inputs = self._config.vocabulary, self._config.hidden
        edges = self._cuts.edges(name, outputs)

        def linear(here: range) -> Linear:
            if weight is None:
                found = self._matrix(name, outputs, inputs, here)
            else:
                found = weight[here.start : here.stop]
            given = {"most_rows": HEAD_ROWS, "whole_outputs": outputs}
            return Linear(found, None, packed=self._packed, **given)

        module = Module(name, outputs, self._cuts.here(edges))
        found = self._noted(linear(module.columns), (module,), lambda: linear(range(outputs)))
        return Projection(found, (module,), gathered=self._shares(edges))

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
        cuts, dim = self._cuts, shape.head_dim
        kv, shares = shape.kv_heads * dim, cuts.grouped(shape)
        here = shares[cuts.rank]
        columns = range(here.first * dim, (here.first + here.heads) * dim)
        q, output = Module(f"{prefix}q_proj", shape.attended, columns), f"{prefix}o_proj"
        both = {f"{prefix}k_proj": kv, f"{prefix}v_proj": kv}
        edges = cuts.edges(" and ".join(both), 2 * kv)
        modules = q, *cuts.within(both, cuts.here(edges))
        biased = tuple(m.name for m in modules) if shape.qkv_bias else ()
        norms = None
        if shape.norms:
            norms = (
                self.norm(f"{prefix}q_norm", shape.head_dim),
                self.norm(f"{prefix}k_norm", shape.head_dim),
            )
        hidden = self._config.hidden
        return GroupedWeights(
            qkv=Projection(
                self._joined(modules, hidden, biased), modules, gathered=self._shares(edges)
            ),
            output=self._projection(
                {output: hidden},
                shape.attended,
                biased=(output,) if shape.output_bias else (),
                spread=tuple(share.heads * dim for share in shares) if cuts.ranks > 1 else (),
            ),
            norms=norms,
        )

    def _mla(self, prefix: str, shape: MlaShape) -> MlaWeights:
        hidden, cuts = self._config.hidden, self._cuts
        heads = cuts.heads(shape.heads)
        here, width = cuts.here(heads), shape.nope + shape.rope
        whole_q, my_q = shape.heads * width, range(here.start * width, here.stop * width)
        kv, output = f"{prefix}kv_a_proj_with_mqa", f"{prefix}o_proj"
        q = f"{prefix}q_proj" if shape.q_rank is None else f"{prefix}q_a_proj"
        q_norm = q_up = None
        biased: tuple[str, ...] = (kv,)
        if shape.q_rank is not None:
            q_norm = self.norm(f"{prefix}q_a_layernorm", shape.q_rank)
            up = (Module(f"{prefix}q_b_proj", whole_q, my_q),)
            q_up = Projection(self._joined(up, shape.q_rank, ()), up)
            biased = (q, kv)
        biased = biased if shape.bias else ()
        keys = {kv: shape.latent + shape.rope}
        if shape.q_rank is not None:
            down = self._projection({q: shape.q_rank, **keys}, hidden, biased=biased)
        else:
            edges = cuts.edges(kv, keys[kv])
            modules = Module(q, whole_q, my_q), *cuts.within(keys, cuts.here(edges))
            joined = self._joined(modules, hidden, biased)
            down = Projection(joined, modules, gathered=self._shares(edges))
        each = shape.nope + shape.value
        kv_b = self._matrix(
            f"{prefix}kv_b_proj",
            shape.heads * each,
            shape.latent,
            range(here.start * each, here.stop * each),
        )
        norm = self.norm(f"{prefix}kv_a_layernorm", shape.latent)
        return MlaWeights(
            down=down,
            q_norm=q_norm,
            q_up=q_up,
            latent=latent_steps.pack(latent_shape(self._config, shape, len(here)), kv_b, norm),
            output=self._projection(
                {output: hidden},
                shape.attended,
                biased=(output,) if shape.bias else (),
                spread=self._shares(tuple(head * shape.value for head in heads)),
            ),
        )

    def _dense(
        self, prefix: str, wide: int, *, bias: bool = False, gather: bool = True
    ) -> DenseWeights:
        """Without `gather` each rank keeps its columns of what comes of it."""
        hidden = self._config.hidden
        both = f"{prefix}gate_proj", f"{prefix}up_proj"
        down = {f"{prefix}down_proj": hidden}
        edges = self._cuts.edges(" and ".join(both), wide)
        modules = tuple(Module(name, wide, self._cuts.here(edges)) for name in both)
        return DenseWeights(
            gate_up=Projection(self._joined(modules, hidden, both if bias else ()), modules),
            down=self._projection(
                down,
                wide,
                biased=tuple(down) if bias else (),
                spread=self._shares(edges),
                gather=gather,
            ),
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
            shared = self._dense(f"{prefix}{shape.shared_name}.", shape.shared, gather=False)
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
        """Gate and up [intermediate, hidden], down [hidden, intermediate]: the columns here."""
        wide, hidden, cuts = shape.intermediate, self._config.hidden, self._cuts
        name = f"{prefix}{expert}."
        mine = cuts.here(cuts.edges(name + "gate_proj", wide))
        narrow = cuts.here(cuts.edges(name + "down_proj", hidden))
        return (
            self._matrix(f"{name}gate_proj", wide, hidden, mine),
            self._matrix(f"{name}up_proj", wide, hidden, mine),
            self._matrix(f"{name}down_proj", hidden, wide, narrow),
        )
