"""Which engine a worker runs."""

from __future__ import annotations

from services.engine.regions import export_policy
from services.engine.scripted.engine import ScriptedEngine
from services.engine.stepped.engine import SteppedEngine
from services.runtime.load import SettingsError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings

_TORCH_MODULES = ("torch", "numba", "safetensors", "gguf")


def build(
    model: ModelSettings,
    engine: EngineSettings,
    kv: KvSettings,
    host: str,
    region: str = "",
) -> SteppedEngine:
    """The engine that the settings ask for, not started.

    `host` is the address to listen on, `region` where the worker is. Raises SettingsError if what
    it needs is not installed, or not there yet.
    """
    policy = export_policy(region, kv)
    if engine.kind == "scripted":
        return ScriptedEngine(model, engine, kv, host=host, policy=policy)
    if engine.device != "cpu":
        raise SettingsError(
            f"engine.device: {engine.device!r} is not supported yet; the embedded engine "
            "computes on 'cpu'"
        )
    try:
        from services.engine.torch.engine import TorchEngine
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _TORCH_MODULES:
            raise
        raise SettingsError(
            f"engine.kind: torch needs the package {error.name}, which is not installed; "
            "pip install 'tandem-serving[torch]' brings it"
        ) from None
    return TorchEngine(model, engine, kv, host=host, policy=policy)
