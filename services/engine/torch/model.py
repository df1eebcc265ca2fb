"""The model: layers of attention and feed-forward parts over a paged KV pool.

A step (`forward`) takes rows (tokens) of any number of sequences, prompts' chunks and single
decoded tokens alike. Every layer writes the rows' keys and values into the pool, rounded to the
pool's dtype, and only then attends, reading the pool: so a row sees the same numbers however its
context came to be there. Linear layers are torch's; everything else is kernels/.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.layout import KvLayout, gqa_layout, mla_layout
from services.engine.torch import numerics
from services.engine.torch.attention import attention_of
from services.engine.torch.config import ModelConfig
from services.engine.torch.kernels.batch import Batch, DraftRows, Limits, Plan, plan
from services.engine.torch.kernels.linear import can_pack
from services.engine.torch.kernels.moe_steps import ExpertColumns, ExpertSteps
from services.engine.torch.kernels.steps import Steps
from services.engine.torch.linears import Gather, Linears, Projection
from services.engine.torch.loading import ExpertPlaces, load_weights
from services.engine.torch.lora import LoraAdapters
from services.engine.torch.moe import ExpertCompute, MixtureOfExperts
from services.engine.torch.numerics import Rules
from services.engine.torch.parallel.tensor_cuts import WHOLE, Cuts, widths
from services.engine.torch.proven import Proven
from services.engine.torch.shapes import GroupedShape, MoeShape
from services.engine.torch.weights import DenseWeights, Layer, ModelWeights, MoeWeights
from services.runtime import milestones

__all__ = ["Batch", "DraftRows", "TorchModel"]

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Values of a latent that share a scale in fp8.
SCALE_VALUES = 128
# Rows of the fixed prompt that the digest of numerics is taken of: more than a tile of keys.
DIGEST_ROWS = 80
# Steps that warm_up prepares for: decode batches, and chunks of prompts.
WARM_BATCH = 32
WARM_CHUNKS = (64, 128, 256)

AfterLayers = Callable[[int, int], None]
Pool = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


class TorchModel:
    """Weights, layout, and the pool that it is bound to. One thread at a time may call it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        layout: KvLayout,
        *,
        dtype: torch.dtype,
        batch_invariant: bool,
        threads: int,
        compute: ExpertCompute | None = None,
        cuts: Cuts = WHOLE,
        gather: Gather | None = None,
    ) -> None:
        """compute: applies experts; None: those of `weights`, which are all of them.

        cuts: what `weights` are of every layer; gather: puts together what others have of it.
        """
        self.config = config
        self.layout = layout
        self.weights = weights
        self._dtype = dtype
        self._pool: Pool | None = None
        torch.set_num_threads(threads)
        rules = Rules({})
        if batch_invariant:
            with torch.inference_mode():
                proven = Proven.here(threads, dtype)
                for part in weights.slices:
                    numerics.prove_slice(part.linear, part.whole(), part.columns, dtype, proven)
                rules = numerics.choose_rules(weights.shapes, dtype, proven)
            log.info("batch-invariant with %s", rules)
        milestones.reached(milestones.RULES)
        self.linear = Linears(rules, gather)
        self.adapters = LoraAdapters(weights.projections, dtype, threads)
        moe = config.moe
        widest = max(config.intermediate, moe.shared if moe else 0)
        self._steps = Steps(config.hidden, widest, config.norm_epsilon, dtype, threads)
        self._attention = attention_of(config, layout, dtype, threads, self.linear, cuts)
        self._experts = None if moe is None else self._mixture(moe, threads, compute, cuts)
        self._hidden = self._drafted = torch.empty((0, config.hidden), dtype=dtype)
        self.numerics = ""
        if batch_invariant:
            self.numerics = numerics.digest(self._fixed_step())
            milestones.reached(milestones.TRIED)

    def _mixture(
        self, moe: MoeShape, threads: int, compute: ExpertCompute | None, cuts: Cuts
    ) -> MixtureOfExperts:
        hidden, dtype, weights = self.config.hidden, self._dtype, self.weights
        wide, narrow = cuts.edges("experts", moe.intermediate), cuts.edges("experts", hidden)
        columns, gather = len(cuts.here(narrow)), self.linear.gather
        mine = ExpertColumns(
            len(cuts.here(wide)), columns, lambda x, count: gather(x, count, widths(wide))
        )
        if compute is None:
            alone = cuts.ranks == 1
            compute = ExpertSteps(
                weights.experts,
                hidden,
                moe.intermediate,
                dtype,
                threads,
                None if alone else mine,
            )
        return MixtureOfExperts(
            moe,
            sum(self.config.sparse) + (weights.draft is not None),
            hidden,
            dtype,
            threads,
            compute=compute,
            dense=self._dense,
            columns=columns,
            gather=lambda x, count: gather(x, count, widths(narrow)),
        )

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str = "bfloat16",
        kv_dtype: str = "fp8_e4m3",
        block_tokens: int = 32,
        batch_invariant: bool = True,
        threads: int = 0,
        device: str = "cpu",
        model_name: str = "",
        draft: bool = False,
        places: ExpertPlaces | None = None,
        compute: Callable[[ModelConfig, ModelWeights], ExpertCompute] | None = None,
        int4: bool = False,
        cuts: Cuts = WHOLE,
        meet: Callable[[], Gather] | None = None,
    ) -> TorchModel:
        """Reads a Hugging Face folder. threads 0: every core this process may use.

        draft: with the module of multi-token prediction, if the folder has one. places: which
        experts to read (all), for `compute`, which makes what applies them (here, by places).
        int4: quantize linear layers (bfloat16, without batch invariance only). cuts: which columns
        of every layer to read, to be computed with others, whom `meet` waits for then.
        Raises UnsupportedModelError, NotInvariantError; ValueError for another device than cpu.
        """
        if device != "cpu":
            raise ValueError(f"device {device!r} is not supported by this engine; expected 'cpu'")
        if int4 and (batch_invariant or dtype != "bfloat16"):
            raise ValueError("int4 needs bfloat16, and can't be batch-invariant")
        config = ModelConfig.from_folder(folder)
        threads = threads or _cores()
        torch.set_num_threads(threads)
        with torch.inference_mode():
            weights = load_weights(
                folder,
                config,
                DTYPES[dtype],
                packed=can_pack(),
                draft=draft,
                places=places,
                threads=threads,
                int4=int4,
                cuts=cuts,
            )
        milestones.reached(milestones.WEIGHTS)
        layers = config.layers + (weights.draft is not None)
        return cls(
            config,
            weights,
            _layout(config, model_name or folder.name, layers, kv_dtype, block_tokens),
            dtype=DTYPES[dtype],
            batch_invariant=batch_invariant,
            threads=threads,
            compute=None if compute is None else compute(config, weights),
            cuts=cuts,
            gather=None if meet is None else meet(),
        )

    @property
    def expert_tokens(self) -> npt.NDArray[np.int64]:
        """Rows that chose each expert since start, [layers with experts, experts]. Any thread."""
        return np.zeros((0, 0), np.int64) if self._experts is None else self._experts.tokens

    def bind(self, memory: Pool) -> None:
        """Gives the model its pool, uint8 [blocks, layout.block_bytes], rows contiguous."""
        if memory.shape[1:] != (self.layout.block_bytes,) or memory.strides[1] != 1:
            raise ValueError(f"pool: expected [blocks, {self.layout.block_bytes}] contiguous bytes")
        self._pool = memory

    def forward(
        self,
        batch: Batch,
        after_layers: AfterLayers | None = None,
        layers_per_piece: int = 1,
    ) -> Logits:
        """Computes a step: writes the rows' KV, returns logits float32 [R, vocabulary].

        after_layers(first_layer, layers) is called on this thread as soon as the KV of those
        layers is final, for every layers_per_piece layers and the rest at the end; the layer of
        multi-token prediction is draft()'s. A batch without rows meets other ranks and does nothing
        else. Raises ValueError for a batch that can't be computed; the pool is then untouched.
        """
        with torch.inference_mode():
            step = self._begin(batch)
            if step is None:
                return self._idle(self.weights.layers)
            return self._compute(step, batch.hidden, after_layers, layers_per_piece)

    def draft(self, batch: DraftRows) -> Logits:
        """Logits float32 [R, vocabulary] of the tokens after the rows', by multi-token prediction.

        Writes the rows' KV of the layout's last layer. Raises as forward() does.
        """
        draft = self.weights.draft
        if draft is None:
            raise ValueError("this model has no module of multi-token prediction")
        with torch.inference_mode():
            before = self._drafted if batch.deeper else self._hidden
            step = self._begin(batch)
            if step is None:
                return self._idle((draft.layer,))
            count = len(step.positions)
            from_rows = _hidden_rows(batch, count, len(before))
            steps = self._steps
            steps.embed(draft.embedding)
            tokens = steps.normalize(None, draft.token_norm).clone()
            steps.replace(torch.index_select(before, 0, from_rows.clamp(min=0)))
            hidden = steps.normalize(None, draft.hidden_norm)
            hidden[:count][from_rows < 0] = 0
            joined = torch.cat([tokens, hidden], dim=1)
            steps.replace(self.linear(draft.joined, joined, count))
            delta = self._layer(self.config.layers, draft.layer, None, count)
            x = steps.normalize(delta, draft.norm)
            self._drafted = x[:count].clone()
            return self._logits(step, draft.head, x, picked=False)

    def _begin(self, batch: Batch | DraftRows) -> Plan | None:
        """Checks a batch; None if it has no rows."""
        if self._pool is None:
            raise ValueError("no pool: call bind() first")
        if len(batch.token_ids) == 0:
            return None
        limits = Limits(
            vocabulary=self.config.vocabulary,
            positions=self.config.positions,
            blocks=len(self._pool),
            block_tokens=self.layout.block_tokens,
        )
        step = plan(batch, limits, self.config.group)
        # A row's logits may be wanted twice: so these may be more than the step's rows.
        room = self.linear.room(max(len(step.positions), len(step.logit_rows)))
        self.linear.begin(self.adapters.rows(batch.adapters, step.sequences))
        self._steps.begin(step, room)
        self._attention.begin(step, self._pool, room)
        return step

    def _compute(
        self, step: Plan, hidden: bool, after_layers: AfterLayers | None, piece: int
    ) -> Logits:
        self._steps.embed(self.weights.embedding)
        delta: torch.Tensor | None = None
        count = len(step.positions)
        last = self.config.layers - 1
        for index, layer in enumerate(self.weights.layers):
            attended = self._attend(index, layer, delta, count)
            self._tell(index, after_layers, piece)
            if index == last and not hidden:
                count = self._pick(step, self._steps.state, attended)
            delta = self._feed(layer, attended, count)
        if not count:
            return self._none()
        x = self._steps.normalize(delta, self.weights.norm)
        self._hidden = x[: count if hidden else 0].clone()
        return self._logits(step, self.weights.head, x, picked=not hidden)

    def _layer(
        self, index: int, layer: Layer, delta: torch.Tensor | None, count: int
    ) -> torch.Tensor:
        return self._feed(layer, self._attend(index, layer, delta, count), count)

    def _attend(
        self, index: int, layer: Layer, delta: torch.Tensor | None, count: int
    ) -> torch.Tensor:
        x = self._steps.normalize(delta, layer.attention_norm)
        return self._attention(index, layer.attention, x, count)

    def _feed(self, layer: Layer, attended: torch.Tensor, count: int) -> torch.Tensor:
        """The feed-forward part's contribution to the residual state."""
        part = layer.feed_forward
        if not count:
            return self._mixed(part, attended, 0) if isinstance(part, MoeWeights) else attended
        projected = self.linear(layer.attention.output, attended, count)
        x = self._steps.normalize(projected, layer.feed_forward_norm)
        if isinstance(part, MoeWeights):
            return self._mixed(part, x, count)
        return self._dense(part, x, count)

    def _dense(self, weights: DenseWeights, x: torch.Tensor, count: int) -> torch.Tensor:
        gated = self._steps.gate(self.linear(weights.gate_up, x, count))
        return self.linear(weights.down, gated, count)

    def _mixed(self, weights: MoeWeights, x: torch.Tensor, count: int) -> torch.Tensor:
        assert self._experts is not None, "made where weights have experts"
        return self._experts(weights, x, count)

    def _logits(self, step: Plan, head: Projection, x: torch.Tensor, *, picked: bool) -> Logits:
        """Of the rows that are wanted, which are `picked` already, or all are there."""
        count = len(step.logit_rows)
        if not count:
            return self._none()
        if not picked:
            self._pick(step, x)
        found: Logits = self.linear(head, x, count)[:count].float().numpy()
        return found

    def _pick(self, step: Plan, *buffers: torch.Tensor) -> int:
        """Rows whose logits are wanted come to the buffers' start and go on alone: how many."""
        self.linear.pick(step.logit_rows)
        return self._steps.pick(*buffers)

    def _none(self) -> Logits:
        return np.empty((0, self.config.vocabulary), np.float32)

    def _idle(self, layers: tuple[Layer, ...]) -> Logits:
        """A step without rows: other ranks may wait for it at every layer with experts."""
        empty = torch.empty((0, self.config.hidden), dtype=self._dtype)
        for layer in layers:
            self._feed(layer, empty, 0)
        self._hidden = empty
        return self._none()

    def _tell(self, index: int, after_layers: AfterLayers | None, piece: int) -> None:
        """Calls after_layers if a piece ends with this layer."""
        done = index + 1
        if after_layers is not None and (done % piece == 0 or done == self.config.layers):
            first = index // piece * piece
            after_layers(first, done - first)

    def warm_up(self) -> None:
        """Compiles what is not yet, and lets oneDNN prepare the row counts of usual steps.

        Others cost a few milliseconds when they come first.
        """
        self._fixed_step(1)
        with torch.inference_mode():
            counts = (*numerics.probe_counts(WARM_BATCH), *WARM_CHUNKS)
            self.linear.prepare(self.weights.shapes, counts, self._dtype)

    def _fixed_step(self, rows: int = DIGEST_ROWS) -> list[Logits]:
        """Logits of a prompt that is always the same, in a pool of its own; drafts' beside them."""
        rows = min(rows, self.config.positions)
        blocks = self.layout.blocks_for(rows)
        places = np.arange(rows, dtype=np.int32)
        batch = Batch(
            token_ids=(np.arange(1, rows + 1) * 7919 % self.config.vocabulary).astype(np.int32),
            positions=places,
            query_starts=np.array([0, rows], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            logit_rows=places[:32],
            hidden=self.weights.draft is not None,
        )
        bound, tokens = self._pool, self.expert_tokens.copy()
        self._pool = np.zeros((blocks, self.layout.block_bytes), np.uint8)
        try:
            found = [self.forward(batch)]
            if self.weights.draft is not None:
                found.append(self.draft(DraftRows.of(batch, places - 1)))
            return found
        finally:
            self._pool = bound
            self.expert_tokens[:] = tokens


def _hidden_rows(batch: DraftRows, count: int, known: int) -> torch.Tensor:
    """Checked: one a row, from -1 to below the rows whose hidden states are known."""
    rows = np.asarray(batch.hidden_rows, np.int64)
    if len(rows) != count or int(rows.min()) < -1 or int(rows.max()) >= known:
        raise ValueError(f"hidden_rows: {count}, each from -1 to below {known}")
    return torch.from_numpy(rows)


def _layout(
    config: ModelConfig, model: str, layers: int, dtype: str, block_tokens: int
) -> KvLayout:
    shape = config.attention
    if isinstance(shape, GroupedShape):
        return gqa_layout(
            model,
            layers=layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=dtype,
            block_tokens=block_tokens,
        )
    return mla_layout(
        model,
        layers=layers,
        dtype=dtype,
        block_tokens=block_tokens,
        latent=shape.latent,
        rope=shape.rope,
        scale_values=min(SCALE_VALUES, shape.latent),
    )


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
