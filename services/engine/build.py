"""Which engine a worker runs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from kvtransfer.policy import ExportPolicy
from services.engine.group.engine import GroupEngine
from services.engine.group.followers import Followers
from services.engine.group.launch import ByHand, Launch, Processes
from services.engine.group.part import Part
from services.engine.group.task import Task
from services.engine.regions import export_policy
from services.engine.scripted.engine import ScriptedEngine
from services.engine.stepped.engine import SteppedEngine
from services.runtime.load import SettingsError
from services.runtime.settings import (
    EngineSettings,
    KvSettings,
    LogSettings,
    ModelSettings,
    ServerSettings,
)

_TORCH_MODULES = ("torch", "numba", "safetensors", "gguf")


def build(
    model: ModelSettings,
    engine: EngineSettings,
    kv: KvSettings,
    host: str,
    region: str = "",
    *,
    remote: bool = False,
    logs: LogSettings | None = None,
    name: str = "rank",
) -> SteppedEngine | GroupEngine:
    """The engine that the settings ask for, not started.

    `host` is the address to listen on, `region` where the worker is. Of several processes: `remote`
    allows them to meet beyond this host, they log as `logs` say, under the worker's `name`. Raises
    SettingsError if what it needs is not installed, or not there yet.
    """
    if engine.ranks > 1 and engine.tensor_parallel > 1:
        raise SettingsError(
            "engine.tensor_parallel: not possible with engine.ranks above 1, whose ranks have "
            "requests of their own"
        )
    if engine.ranks == 1 and engine.tensor_parallel == 1:
        if engine.group_address:
            raise SettingsError(
                "engine.group_address: there is no group with engine.ranks=1 and "
                "engine.tensor_parallel=1"
            )
        return _stepped(model, engine, kv, host, export_policy(region, kv), None)
    if engine.kind == "scripted" and engine.tensor_parallel > 1:
        raise SettingsError("engine.tensor_parallel: a scripted engine has no model to share")
    if engine.kind == "scripted" and (engine.scripted_dp_ranks > 1 or engine.scripted_experts):
        raise SettingsError(
            "engine.ranks: real ranks can't be had with scripted ones (engine.scripted_dp_ranks, "
            "engine.scripted_experts)"
        )
    task = Task(model, engine, kv, region, host)
    launch: Launch = Processes(logs or LogSettings(), name)
    server = ServerSettings()
    if engine.group_address:
        met, _, port = engine.group_address.rpartition(":")
        launch, server = (
            ByHand(),
            ServerSettings(
                host=met.strip("[]"), port=int(port), allow_unauthenticated_remote=remote
            ),
        )
    if engine.ranks > 1:
        return GroupEngine(task, launch, server)
    own = task.of_rank(0).engine
    followers = Followers(task, launch, server)
    policy = export_policy(region, kv)
    return _stepped(model, own, kv, host, policy, None, followers)


def build_rank(task: Task, part: Part) -> SteppedEngine:
    """The engine of one rank of a group, not started. Raises SettingsError."""
    host = part.host if task.engine.group_address else task.host
    policy = export_policy(task.region, task.kv)
    return _stepped(task.model, task.engine, task.kv, host, policy, part)


def compute_along(task: Task, part: Part, loaded: Callable[[], None]) -> None:
    """Computes what a worker's engine computes, until it ends: one of those that share its model.

    Calls `loaded` when the weights are read. Raises SettingsError, UnsupportedModelError and
    WorkerLostError.
    """
    _torch(task.engine).compute_along(task.model, task.engine, part, loaded)


def _stepped(
    model: ModelSettings,
    engine: EngineSettings,
    kv: KvSettings,
    host: str,
    policy: ExportPolicy,
    part: Part | None,
    followers: Followers | None = None,
) -> SteppedEngine:
    if engine.kind == "scripted":
        return ScriptedEngine(model, engine, kv, host=host, policy=policy)
    made: SteppedEngine = _torch(engine).TorchEngine(
        model, engine, kv, host=host, policy=policy, part=part, followers=followers
    )
    return made


def _torch(engine: EngineSettings) -> ModuleType:
    """The torch engine's module, which takes long to import. Raises SettingsError."""
    if engine.device != "cpu":
        raise SettingsError(
            f"engine.device: {engine.device!r} is not supported yet; the embedded engine "
            "computes on 'cpu'"
        )
    try:
        from services.engine.torch import engine as found
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _TORCH_MODULES:
            raise
        raise SettingsError(
            f"engine.kind: torch needs the package {error.name}, which is not installed; "
            "pip install 'tandem-serving[torch]' brings it"
        ) from None
    return found
