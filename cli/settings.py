"""`tandem settings`: every setting, its value, where that came from, what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from cli.serve import PROCESSES
from services.runtime.describe import allowed, fields, sections, show
from services.runtime.load import DEFAULT, Given, load

ALL = {"coordinator": "coordinator", "frontend": "frontend", "decode": "prefill, decode, both"}
EMPTY = '""'


def print_settings(
    process: str | None,
    file: Path | None,
    environment: Mapping[str, str],
    flags: Sequence[Given],
) -> None:
    """Prints the settings of one kind of process, or of all. Raises SettingsError."""
    console = Console(highlight=False)
    titles = {process: process} if process else ALL
    for role, title in titles.items():
        settings, origins = load(PROCESSES[role], file, environment, flags)
        console.print(f"\n# tandem serve {title}", style="bold")
        for section in sections(PROCESSES[role]):
            console.print(f"\n[{section}]", style="bold", markup=False)
            for line in _lines(section, getattr(settings, section), origins):
                console.print(line, soft_wrap=True)


def _lines(section: str, values: BaseModel, origins: Mapping[str, str]) -> Iterator[Text]:
    for key, field in fields(values).items():
        origin = origins[f"{section}.{key}"]
        setting = f"{key} = {show(getattr(values, key)) or EMPTY}"
        style = "" if origin == DEFAULT else "bold green"
        yield Text.assemble((f"{setting:44}", style), ("from ", "dim"), (origin, style or "dim"))
        yield Text(f"    {field.description} ({allowed(field)})", "dim")
