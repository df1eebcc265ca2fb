"""The embedded engine: a model on this machine's CPU, stepped by Tandem."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import numpy as np
from numpy.typing import NDArray

from kvtransfer.layout import KvLayout
from kvtransfer.policy import ExportPolicy
from kvtransfer.store import KvStore
from services.engine.adapters import AdapterLimits
from services.engine.group.followers import Followers
from services.engine.group.part import Part
from services.engine.models.folder import ModelFolder, resolve
from services.engine.models.text import Tokenizer
from services.engine.stepped.batch import AfterLayers, DraftBatch, LoadedModel, StepBatch
from services.engine.stepped.engine import SteppedEngine
from services.engine.stepped.experts import ExpertsHere
from services.engine.torch.model import Batch, DraftRows, TorchModel
from services.engine.torch.parallel.mesh import Mesh
from services.engine.torch.parallel.share import ExpertShare, join, share_of
from services.engine.torch.parallel.tensor_cuts import WHOLE, Cuts
from services.engine.torch.parallel.tensor_gather import TensorGather
from services.engine.torch.parallel.tensor_lead import TensorLead, Together, follow
from services.runtime.errors import WorkerLostError
from services.runtime.load import SettingsError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings

LEAD_PATIENCE = timedelta(seconds=300)
"""For one that shares the model and does not come to an exchange: more than any step takes. It is
noticed before if its process ends or is stopped (Followers)."""
FOLLOW_PATIENCE = timedelta(days=36_500)
"""For rank 0, which says nothing while it has nothing to do."""
CLOSE_SECONDS = 10.0


class TorchEngine(SteppedEngine):
    """See api.Engine. start() raises what resolve() and TorchModel.load() raise."""

    def __init__(
        self,
        model: ModelSettings,
        engine: EngineSettings,
        kv: KvSettings,
        *,
        host: str,
        policy: ExportPolicy | None = None,
        part: Part | None = None,
        followers: Followers | None = None,
    ) -> None:
        """part: it is one rank of several; followers: they share the model with it."""
        super().__init__(self._load_model, engine, kv, host=host, policy=policy)
        self._model_settings = model
        self._part = part
        self._followers = followers
        self._lead: TensorLead | None = None

    async def start(self) -> None:
        """See SteppedEngine. Raises WorkerLostError if one that shares the model ends."""
        followers = self._followers
        if followers is None:
            await super().start()
            return
        try:
            await followers.start(self._follower_lost)
            await super().start()
        except BaseException as error:
            await followers.close(0)
            if followers.failure is not None:
                raise followers.failure from error
            raise
        followers.watch()
        if followers.failure is not None:  # in between
            self._give_up(followers.failure)

    async def close(self) -> None:
        """See SteppedEngine."""
        broken = self._stopped
        await super().close()
        if self._followers is None:
            return
        if self._lead is not None and not broken:
            with contextlib.suppress(WorkerLostError):
                await asyncio.to_thread(self._lead.end)
        await self._followers.close(0 if broken else CLOSE_SECONDS)

    def _follower_lost(self, error: Exception) -> None:
        if self._started:
            self._give_up(error)

    def _load_model(self) -> LoadedModel:
        model, engine = self._model_settings, self._settings
        if self._followers is None:
            return load(model, engine, self._part)
        meeting = Meeting(self._followers.part, LEAD_PATIENCE, self._followers.wait)
        loaded, self._lead = load_shared(model, engine, meeting)
        return loaded

    def _open(self) -> tuple[LoadedModel, KvStore, int]:
        loaded, store, window = super()._open()
        if self._lead is not None:
            self._lead.mirror(store.generations)
        return loaded, store, window


class Meeting:
    """Of those that share a model, each when it has its weights."""

    mesh: Mesh

    def __init__(self, part: Part, patience: timedelta, ready: Callable[[], None]) -> None:
        """`ready` is called first: of rank 0, to wait for the others; of these, to say it."""
        self._part = part
        self._patience = patience
        self._ready = ready
        self.cuts = Cuts(part.rank, part.ranks)

    def __call__(self) -> TensorGather:
        """What brings together what each computes. Blocks until all have come."""
        self._ready()
        self.mesh = join(self._part, self._patience)
        return TensorGather(self.mesh)


class _Steps:
    """A TorchModel as a stepped.batch.Model."""

    def __init__(self, model: TorchModel | TensorLead) -> None:
        self._model = model

    @property
    def layout(self) -> KvLayout:
        return self._model.layout

    @property
    def numerics(self) -> str:
        return self._model.numerics

    def bind(self, memory: NDArray[np.uint8]) -> None:
        self._model.bind(memory)

    def warm_up(self) -> None:
        self._model.warm_up()

    def forward(
        self, batch: StepBatch, after_layers: AfterLayers | None, layers_per_piece: int
    ) -> NDArray[np.float32]:
        rows = Batch(
            token_ids=batch.token_ids,
            positions=batch.positions,
            query_starts=batch.query_starts,
            block_tables=batch.block_tables,
            logit_rows=batch.logit_rows,
            fresh=batch.fresh,
            hidden=batch.hidden,
            adapters=batch.adapters,
        )
        return self._model.forward(rows, after_layers, layers_per_piece)


class _Drafts:
    """A TorchModel with a module of multi-token prediction, as a stepped.batch.Drafter."""

    layers = 1

    def __init__(self, model: TorchModel | TensorLead) -> None:
        self._model = model

    def draft(self, batch: DraftBatch) -> NDArray[np.float32]:
        rows = DraftRows(
            token_ids=batch.token_ids,
            positions=batch.positions,
            query_starts=batch.query_starts,
            block_tables=batch.block_tables,
            logit_rows=batch.logit_rows,
            hidden_rows=batch.hidden_rows,
            deeper=batch.deeper,
            adapters=batch.adapters,
        )
        return self._model.draft(rows)


def load(model: ModelSettings, engine: EngineSettings, part: Part | None = None) -> LoadedModel:
    """The model that the settings ask for. Raises what resolve() and TorchModel.load() raise."""
    _check_weights(engine)
    folder = resolve(model)
    share = share_of(part, folder.path, engine)
    loaded = _read(folder, engine, share=share)
    if share is not None:
        share.experts.counts = lambda: loaded.expert_tokens
    described = _described(folder, loaded, loaded)
    if share is None:
        return described
    return replace(described, experts=share.experts, rounds=share.rounds)


def load_shared(
    model: ModelSettings, engine: EngineSettings, meeting: Meeting
) -> tuple[LoadedModel, TensorLead]:
    """Of rank 0 of those that share a model. Raises as load() does, and WorkerLostError."""
    _check_weights(engine)
    folder = resolve(model)
    share_of(None, folder.path, engine)
    loaded = _read(folder, engine, meeting=meeting)
    lead = TensorLead(loaded, meeting.mesh)
    described = _described(folder, loaded, lead)
    return replace(described, rounds=Together(), adapters=lead.adapters), lead


def compute_along(
    model: ModelSettings, engine: EngineSettings, part: Part, loaded: Callable[[], None]
) -> None:
    """See build.compute_along()."""
    meeting = Meeting(part, FOLLOW_PATIENCE, loaded)
    found = _read(resolve(model), engine, meeting=meeting)
    follow(found, meeting.mesh, AdapterLimits.of(engine))


def _check_weights(engine: EngineSettings) -> None:
    if engine.weights == "int4" and (engine.batch_invariant or engine.dtype != "bfloat16"):
        raise SettingsError(
            "engine.weights: int4 needs engine.dtype=bfloat16 and engine.batch_invariant=false: "
            "its products round differently with the number of rows, so requests can't be resumed "
            "with exactly the same tokens"
        )


def _read(
    folder: ModelFolder,
    engine: EngineSettings,
    *,
    share: ExpertShare | None = None,
    meeting: Meeting | None = None,
) -> TorchModel:
    return TorchModel.load(
        folder.path,
        dtype=engine.dtype,
        kv_dtype=engine.kv_dtype,
        block_tokens=engine.block_tokens,
        batch_invariant=engine.batch_invariant,
        threads=engine.threads,
        device=engine.device,
        model_name=folder.name,
        draft=engine.draft_tokens > 0,
        int4=engine.weights == "int4",
        places=None if share is None else share.places,
        compute=None if share is None else share.compute,
        cuts=WHOLE if meeting is None else meeting.cuts,
        meet=meeting,
    )


def _described(
    folder: ModelFolder, loaded: TorchModel, called: TorchModel | TensorLead
) -> LoadedModel:
    """`called`: what steps are asked of."""
    return LoadedModel(
        _Steps(called),
        folder.name,
        min(folder.context_tokens, loaded.config.positions),
        folder.vocabulary,
        folder.eos_token_ids,
        experts=_experts(loaded),
        adapters=loaded.adapters,
        drafter=_Drafts(called) if loaded.weights.draft is not None else None,
        tokens=lambda: Tokenizer(folder).table.tokens,
    )


def _experts(loaded: TorchModel) -> ExpertsHere | None:
    moe = loaded.config.moe
    if moe is None:
        return None
    values = 3 * loaded.config.hidden * moe.intermediate
    size = values * loaded.weights.embedding.element_size()
    return ExpertsHere(moe.groups, size, lambda: loaded.expert_tokens)
