"""What a cluster needs before its processes start: a model that all of them will find."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.engine.models.catalog import CATALOG
from services.engine.models.errors import ModelNotFoundError
from services.engine.models.folder import resolve
from services.runtime.load import Given, load
from services.runtime.settings import FrontendProcess


def prepare(
    file: Path | None, environment: Mapping[str, str], settings: Mapping[str, str], *, fetch: bool
) -> None:
    """Finds the model that the settings ask for, and converts it if it is a GGUF file.

    With `fetch`, a model of the catalogue that is not here is downloaded. Here, and not in four
    processes at once, which would wait for one another without a word.
    Raises SettingsError and what services.engine.models raises.
    """
    flags = [Given(key, value, f"--set {key}={value}") for key, value in settings.items()]
    model = load(FrontendProcess, file, environment, flags)[0].model
    try:
        resolve(model)
    except ModelNotFoundError:
        if not fetch or model.path or model.name not in CATALOG:
            raise
        from cli.models import fetch as fetch_model

        fetch_model(model.name, None)
