"""Flags of the command line as settings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cli.output import UsageError
from services.runtime.client import Ask, Form, Turn
from services.runtime.load import CONFIG_VARIABLE, Given, load, parse_flag
from services.runtime.server import EVERYWHERE
from services.runtime.settings import CoordinatorProcess, FrontendProcess

MAX_TEXT_BYTES = 2**18
"""Of a form's text: the upper bound of frontend.guide_bytes."""

ROLES = ("coordinator", "frontend", "prefill", "decode", "both")
"""Of the processes of a cluster that have settings."""

COORDINATOR_KEY = {"frontend": "frontend.coordinator"}
"""The setting that names the coordinator, where it is not worker.coordinator."""


def given(sets: Iterable[str], **named: tuple[str, str | int | None]) -> list[Given]:
    """`--set` flags, then named ones: `port=("server.port", 7400)`; None was not given."""
    flags = [parse_flag(text) for text in sets]
    for name, (key, value) in named.items():
        if value is not None:
            flags.append(Given(key, value, f"--{name}"))
    return flags


def model(text: str | None) -> list[Given]:
    """`--model`: a name, or a path (it has a slash, ends in .gguf, or is a folder here)."""
    if text is None:
        return []
    path = Path(text)
    if os.sep in text or path.suffix == ".gguf" or path.is_dir():
        full = path.expanduser().resolve()
        name = full.stem if full.suffix == ".gguf" else full.name
        return [
            Given("model.path", str(full), "--model"),
            Given("model.name", name.lower(), "--model"),
        ]
    return [Given("model.name", text, "--model")]


def addresses(file: Path | None, environment: Mapping[str, str]) -> tuple[str, str]:
    """host:port of the frontend, and of coordinators with commas, as the settings have them."""
    settings, _ = load(FrontendProcess, config(file, environment), environment)
    server = settings.server
    host = "127.0.0.1" if server.host in EVERYWHERE else server.host
    return server.advertise or f"{host}:{server.port}", ",".join(settings.frontend.coordinator)


def texts(
    sets: Iterable[str], model_name: str | None, engine: str | None, transport: str | None = None
) -> dict[str, str]:
    """`--set` and the named flags as a cluster passes them on to its processes."""
    named = given(sets, engine=("engine.kind", engine), transport=("kv.transports", transport))
    flags = [*named, *model(model_name)]
    return {flag.key: str(flag.value) for flag in flags}


def by_role(sets: Iterable[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Splits `--set` flags: those for all processes, and ROLE:SECTION.KEY=VALUE by role.

    Raises UsageError, SettingsError.
    """
    shared: list[str] = []
    own: dict[str, dict[str, str]] = {}
    for text in sets:
        role, colon, setting = text.partition(":")
        if not colon or "=" in role:
            shared.append(text)
        elif role not in ROLES:
            raise UsageError(f"--set {text}: {role} is none of {', '.join(ROLES)}")
        else:
            flag = parse_flag(setting)
            own.setdefault(role, {})[flag.key] = str(flag.value)
    return shared, own


def ports(file: Path | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Of frontend and coordinator, as the settings have them."""
    frontend, _ = load(FrontendProcess, file, environment)
    coordinator, _ = load(CoordinatorProcess, file, environment)
    return frontend.server.port, coordinator.server.port


def ask(
    turns: Sequence[tuple[str, str | None]] | None,
    prompt: str,
    model_name: str | None,
    stop: Sequence[str],
    adapter: str | None = None,
    answer_form: Form | None = None,
    **sampling: float | int | None,
) -> Ask:
    """A request: a chat, or the prompt as it is where `turns` is None."""
    return Ask(
        chat=[Turn(role, text) for role, text in turns or () if text is not None],
        prompt=prompt,
        model=model_name or "",
        sampling={name: value for name, value in sampling.items() if value is not None},
        stop=stop,
        adapter=adapter or "",
        form=answer_form,
    )


def form(
    json_schema: Path | None,
    grammar: Path | None,
    regex: str | None,
    choices: Sequence[str],
    json_object: bool,
) -> Form | None:
    """What the answer must look like, if anything was asked for. Raises UsageError."""
    for flag, texts in (("--regex", [regex or ""]), ("--choice", choices)):
        if not all(map(_is_text, texts)):
            raise UsageError(f"{flag}: expected UTF-8")
    found = [
        *([Form("json_schema", (_text("--json-schema", json_schema),))] if json_schema else []),
        *([Form("grammar", (_text("--grammar", grammar),))] if grammar else []),
        *([Form("regex", (regex,))] if regex is not None else []),
        *([Form("choice", choices)] if choices else []),
        *([Form("json_object")] if json_object else []),
    ]
    if len(found) > 1:
        kinds = " and ".join(f"--{one.kind.replace('_', '-')}" for one in found)
        raise UsageError(f"{kinds}: an answer can be held to one form")
    return found[0] if found else None


def _text(flag: str, file: Path) -> str:
    try:
        with file.open("rb") as opened:
            # Some files have no end.
            content = opened.read(MAX_TEXT_BYTES + 1)
        text = content[:MAX_TEXT_BYTES].decode()
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag}: {file} can't be read: {error}") from error
    if len(content) > MAX_TEXT_BYTES:
        most = f"{MAX_TEXT_BYTES} bytes, the most that any frontend takes (frontend.guide_bytes)"
        raise UsageError(f"{flag}: {file} has more than {most}")
    return text


def _is_text(argument: str) -> bool:
    """Not bytes of some other encoding, which Python takes for half a character."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def config(file: Path | None, environment: Mapping[str, str]) -> Path | None:
    """The settings file: `--config`, else TANDEM_CONFIG, else none."""
    if file is None and environment.get(CONFIG_VARIABLE):
        return Path(environment[CONFIG_VARIABLE])
    return file
