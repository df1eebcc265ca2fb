"""Settings of a process from defaults, a file, the environment and flags, and where each came from.

A file and an environment may be shared by all processes of a cluster, so what belongs to
another kind of process is passed over; what belongs to none is an error.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from services.runtime.describe import allowed, fields, is_tuple, sections, show
from services.runtime.settings import (
    CoordinatorProcess,
    FrontendProcess,
    RankProcess,
    WorkerProcess,
)

PREFIX = "TANDEM_"

CONFIG_VARIABLE = "TANDEM_CONFIG"

OTHER_VARIABLES = {CONFIG_VARIABLE: "Settings file, where no --config is given."}
"""Variables that are not settings of a process."""

PROCESSES: tuple[type[BaseModel], ...] = (
    CoordinatorProcess,
    FrontendProcess,
    WorkerProcess,
    RankProcess,
)

ProcessT = TypeVar("ProcessT", bound=BaseModel)

DEFAULT = "default"


class SettingsError(Exception):
    """A setting can't be used. Its words name key, value, origin, and what was expected."""


@dataclass(frozen=True, slots=True)
class Given:
    """One setting as somebody wrote it: "section.key", the value, and where it stands."""

    key: str
    value: Any
    origin: str


def load(
    process: type[ProcessT],
    file: Path | None,
    environment: Mapping[str, str],
    flags: Sequence[Given] = (),
) -> tuple[ProcessT, dict[str, str]]:
    """The settings, and for each "section.key" where it came from.

    Weakest first: defaults, file, environment, flags; of two flags the later one wins.
    Raises SettingsError.
    """
    given = [*_from_file(file), *_from_environment(environment), *flags]
    for item in given:
        _check_known(item)
    chosen = {item.key: item for item in given}
    values: dict[str, BaseModel] = {}
    origins: dict[str, str] = {}
    for name, default in sections(process).items():
        mine = {k: chosen.get(f"{name}.{k}") for k in fields(default)}
        values[name] = _section(default, {k: v for k, v in mine.items() if v is not None})
        origins |= {f"{name}.{k}": v.origin if v else DEFAULT for k, v in mine.items()}
    return process(**values), origins


def parse_flag(text: str) -> Given:
    """`--set section.key=value`. Raises SettingsError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"--set {text}: expected section.key=value")
    return Given(key.strip(), value.strip(), f"--set {text}")


def known() -> dict[str, FieldInfo]:
    """Every "section.key" that some process has."""
    return {
        f"{name}.{key}": field
        for process in PROCESSES
        for name, section in sections(process).items()
        for key, field in fields(section).items()
    }


def variable(key: str) -> str:
    """The environment variable that gives a setting."""
    return PREFIX + key.replace(".", "__").upper()


def _from_file(file: Path | None) -> Iterable[Given]:
    if file is None:
        return
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"settings file {file}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"settings file {file} is not TOML: {error}") from None
    for name, section in content.items():
        if not isinstance(section, dict):
            raise SettingsError(
                f"{name} = {section!r} in {file}: expected sections such as [server]"
            )
        if not section and name not in {key.partition(".")[0] for key in known()}:
            _check_known(Given(f"{name}.", "", f"file {file}"))
        for key, value in section.items():
            yield Given(f"{name}.{key}", value, f"file {file}")


def _from_environment(environment: Mapping[str, str]) -> Iterable[Given]:
    variables = {variable(key): key for key in known()}
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES:
            continue
        if name not in variables:
            near = _nearest(name, [*variables, *OTHER_VARIABLES])
            raise SettingsError(
                f"environment variable {name}={value} is not a setting of Tandem{near}; "
                "`tandem settings` lists all"
            )
        yield Given(variables[name], value, f"environment {name}")


def _check_known(item: Given) -> None:
    keys = known()
    if item.key in keys:
        return
    section = item.key.partition(".")[0]
    siblings = [key for key in keys if key.startswith(section + ".")]
    near = _nearest(item.key, list(keys))
    if siblings:
        names = ", ".join(key.partition(".")[2] for key in siblings)
        expected = f"[{section}] has: {names}"
    else:
        names = ", ".join(dict.fromkeys(key.partition(".")[0] for key in keys))
        expected = f"sections are: {names}"
    raise SettingsError(
        f"unknown setting {item.key} = {show(item.value)} ({item.origin}){near}; {expected}"
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f" (did you mean {found[0]}?)" if found else ""


def _section(default: BaseModel, given: Mapping[str, Given]) -> BaseModel:
    declared = fields(default)
    values = {key: getattr(default, key) for key in declared}
    for key, item in given.items():
        value = item.value
        if isinstance(value, bool) and declared[key].annotation is not bool:
            raise _bad(item, declared[key])  # or pydantic would take true for 1
        if isinstance(value, str) and is_tuple(declared[key]):
            value = [part.strip() for part in value.split(",") if part.strip()]
        values[key] = value
    try:
        return type(default).model_validate(values)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise _bad(given[key], declared[key]) from None


def _bad(item: Given, field: FieldInfo) -> SettingsError:
    return SettingsError(
        f"bad value for {item.key}: {show(item.value)!r} ({item.origin}); "
        f"expected {allowed(field)}. {field.description}"
    )
