"""The scripted engine: all of the embedded engine but the model. For tests and for load tests."""

from __future__ import annotations

from kvtransfer.policy import ExportPolicy
from services.engine.models.folder import resolve
from services.engine.models.text import Tokenizer
from services.engine.scripted.adapters import ScriptedAdapters
from services.engine.scripted.drafter import ScriptedDrafter
from services.engine.scripted.experts import ScriptedExperts, shape_of
from services.engine.scripted.model import (
    CONTEXT_TOKENS,
    EOS,
    GENERATED,
    VOCABULARY,
    ScriptedModel,
)
from services.engine.stepped.batch import LoadedModel
from services.engine.stepped.engine import SteppedEngine
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings


class ScriptedEngine(SteppedEngine):
    """Tokens are a function of the tokens before them (and of the seed, if sampled).

    Raises SettingsError if engine.scripted_experts can't be.
    """

    def __init__(
        self,
        model: ModelSettings,
        engine: EngineSettings,
        kv: KvSettings,
        *,
        host: str,
        policy: ExportPolicy | None = None,
    ) -> None:
        shape = shape_of(engine.scripted_experts)

        def load() -> LoadedModel:
            experts = None if shape is None else ScriptedExperts(shape)
            adapters = ScriptedAdapters()
            drafts = engine.draft_tokens > 0 and engine.scripted_draft_chance > 0
            scripted = ScriptedModel(
                model.name,
                block_tokens=engine.block_tokens,
                step_seconds=engine.scripted_step_seconds,
                experts=experts,
                adapters=adapters,
                draft_layers=ScriptedDrafter.layers if drafts else 0,
            )
            drafter = ScriptedDrafter(scripted, engine.scripted_draft_chance) if drafts else None
            return LoadedModel(
                scripted,
                model.name,
                CONTEXT_TOKENS,
                VOCABULARY,
                (EOS,),
                dp_ranks=engine.scripted_dp_ranks,
                experts=experts,
                adapters=adapters,
                drafter=drafter,
                # Only guides ask what text the tokens of the model that it stands in for are.
                tokens=lambda: Tokenizer(resolve(model)).table.tokens[:GENERATED],
            )

        super().__init__(load, engine, kv, host=host, policy=policy)
