"""The embedded engine: a model on this machine's CPU, stepped by Tandem."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtransfer.layout import KvLayout
from kvtransfer.policy import ExportPolicy
from services.engine.group.part import Part
from services.engine.models.folder import resolve
from services.engine.models.text import Tokenizer
from services.engine.stepped.batch import AfterLayers, DraftBatch, LoadedModel, StepBatch
from services.engine.stepped.engine import SteppedEngine
from services.engine.torch.model import Batch, DraftRows, TorchModel
from services.engine.torch.parallel.share import share_of
from services.runtime.load import SettingsError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings


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
    ) -> None:
        """part: it is one rank of several."""
        super().__init__(lambda: load(model, engine, part), engine, kv, host=host, policy=policy)


class _Steps:
    """A TorchModel as a stepped.batch.Model."""

    def __init__(self, model: TorchModel) -> None:
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

    def __init__(self, model: TorchModel) -> None:
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
    folder = resolve(model)
    int4 = engine.weights == "int4"
    if int4 and (engine.batch_invariant or engine.dtype != "bfloat16"):
        raise SettingsError(
            "engine.weights: int4 needs engine.dtype=bfloat16 and engine.batch_invariant=false: "
            "its products round differently with the number of rows, so requests can't be resumed "
            "with exactly the same tokens"
        )
    share = share_of(part, folder.path, engine)
    loaded = TorchModel.load(
        folder.path,
        dtype=engine.dtype,
        kv_dtype=engine.kv_dtype,
        block_tokens=engine.block_tokens,
        batch_invariant=engine.batch_invariant,
        threads=engine.threads,
        device=engine.device,
        model_name=folder.name,
        draft=engine.draft_tokens > 0,
        int4=int4,
        places=None if share is None else share.places,
        compute=None if share is None else share.compute,
    )
    if share is not None:
        share.experts.counts = lambda: loaded.expert_tokens
    return LoadedModel(
        _Steps(loaded),
        folder.name,
        min(folder.context_tokens, loaded.config.positions),
        folder.vocabulary,
        folder.eos_token_ids,
        experts=None if share is None else share.experts,
        rounds=None if share is None else share.rounds,
        adapters=loaded.adapters,
        drafter=_Drafts(loaded) if loaded.weights.draft is not None else None,
        tokens=lambda: Tokenizer(folder).table.tokens,
    )
