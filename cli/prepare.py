"""What a cluster needs before its processes start: a model they all find, a way to move KV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cli.peers import fetch_from
from kvtransfer.transports.available import why_not_here
from services.engine.models.catalog import CATALOG
from services.engine.models.errors import ModelNotFoundError
from services.engine.models.folder import resolve
from services.runtime.load import Given, SettingsError, load
from services.runtime.settings import ANY_WORKER, FrontendProcess, WorkerProcess


def prepare(
    file: Path | None, environment: Mapping[str, str], settings: Mapping[str, str], *, fetch: bool
) -> str:
    """Finds the model that the settings ask for, and converts it if it is a GGUF file.

    What is not here comes from the workers that weights.sources names; with `fetch` a model of the
    catalogue is downloaded. Here, and not in four
    processes at once, which would wait for one another without a word. Returns the model's name.
    Raises SettingsError, also if no KV transport that is asked for can be had here, and what
    services.engine.models raises.
    """
    flags = [Given(key, value, f"--set {key}={value}") for key, value in settings.items()]
    worker = load(WorkerProcess, file, environment, flags)[0]
    _require_a_transport(worker.kv.transports)
    model = load(FrontendProcess, file, environment, flags)[0].model
    try:
        resolve(model)
    except ModelNotFoundError:
        peers = [address for address in worker.weights.sources if address != ANY_WORKER]
        if peers:
            from cli.models import bars

            with bars() as watch:
                fetch_from(peers, worker, watch)
            return model.name
        if not fetch or model.path or model.name not in CATALOG:
            raise
        from cli.models import fetch as fetch_model

        fetch_model(model.name, None)
    return model.name


def _require_a_transport(names: Sequence[str]) -> None:
    why = why_not_here(names)
    if len(why) == len(set(names)):
        said = "; ".join(f"{name}: {words}" for name, words in why.items())
        raise SettingsError(f"kv.transports: none can be used here. {said}")
