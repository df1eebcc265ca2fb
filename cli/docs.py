"""The pages of docs/ that are made from the code: `python -m cli.docs` writes them.

A test compares them with what would be written.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cli.advice import ADVICE
from kvtransfer import errors as kv_errors
from services.engine.models import errors as model_errors
from services.runtime import errors
from services.runtime.describe import allowed, fields, sections, show
from services.runtime.load import OTHER_VARIABLES
from services.runtime.settings import (
    CoordinatorProcess,
    FrontendProcess,
    RankProcess,
    WorkerProcess,
)

DOCS = Path(__file__).parent.parent / "docs"

READERS: dict[type[BaseModel], str] = {
    CoordinatorProcess: "coordinator",
    FrontendProcess: "frontend",
    WorkerProcess: "workers",
    RankProcess: "ranks started by hand",
}

ROOTS: dict[type[Exception], str] = {
    errors.TandemError: "Something nobody expected broke in the process that answered.",
    kv_errors.KvError: "An error of the KV plane that this version does not know.",
}
"""What the roots of the trees stand for, on the wire."""

SETTINGS_TABLE = "| key | default | allowed | meaning |\n|---|---|---|---|\n"

SETTINGS_HEAD = """\
# Settings

<!-- Made from services/runtime/settings.py by `make docs`. -->

Every process has one settings object. Values come from, weakest first: the defaults below, a
TOML file (`--config FILE`, or the variable `TANDEM_CONFIG`), environment variables, flags
(`--set section.key=value` and the named flags of a command). An unknown key, an unknown `TANDEM_`
variable or a bad value stops the process with the key, the value, where it came from and what was
expected. One file may serve all processes: what belongs to another kind of process is passed over.

`tandem settings [coordinator|frontend|prefill|decode|both]` prints what holds and whence.

```toml
[engine]
threads = 2          # or TANDEM_ENGINE__THREADS=2, or --set engine.threads=2
kv_dtype = "bfloat16"
```
"""

ERRORS_HEAD = """\
# Errors

<!-- Made from the error trees and cli/advice.py by `make docs`. -->

Every failed call ends with a gRPC status whose details carry a `google.rpc.ErrorInfo`: a stable
`reason` from the table below, the domain `tandem`, and in `metadata` the values that the message
names. `INVALID_REQUEST` also has a `BadRequest` with the field; reasons that a retry may help have
a `RetryInfo` with how long to wait. An error inside a stream that goes on for other requests has
the same reason, message and metadata.

Two statuses are gRPC's own and have no `ErrorInfo`: `UNAVAILABLE` where no server answers, and
`RESOURCE_EXHAUSTED` for a message over `server.max_message_bytes` (the message names both sizes).

| reason | gRPC code | meaning | what to do |
|---|---|---|---|
"""


def settings_page() -> str:
    """docs/settings.md."""
    readers: dict[str, list[str]] = {}
    found: dict[str, BaseModel] = {}
    for process, name in READERS.items():
        for section, defaults in sections(process).items():
            readers.setdefault(section, []).append(name)
            found.setdefault(section, defaults)
    parts = [SETTINGS_HEAD]
    for section, defaults in found.items():
        about = inspect.getdoc(type(defaults))
        parts.append(f"## [{section}]\n\n{about} Read by {', '.join(readers[section])}.\n")
        parts.append(SETTINGS_TABLE + "".join(_rows(section, defaults)))
    parts.append("## Other variables\n\n| variable | meaning |\n|---|---|")
    parts += [f"| `{name}` | {meaning} |" for name, meaning in OTHER_VARIABLES.items()]
    return "\n".join(parts) + "\n"


def _rows(section: str, defaults: BaseModel) -> Iterator[str]:
    for key, field in fields(defaults).items():
        yield (f"| `{key}` | {_default(section, key)} | {allowed(field)} | {field.description} |\n")


def _default(section: str, key: str) -> str:
    """The default, or each process's own where they differ."""
    values = {
        name: show(getattr(sections(process)[section], key))
        for process, name in READERS.items()
        if section in sections(process)
    }
    if len(set(values.values())) == 1:
        (value,) = set(values.values())
        return f"`{value}`" if value else "empty"
    return "; ".join(f"{name} `{value}`" for name, value in values.items())


def errors_page() -> str:
    """docs/errors.md."""
    kinds = {kind.reason: kind for kind in _kinds()}
    return ERRORS_HEAD + "".join(
        f"| `{reason}` | {kind.code} | {_meaning(kind)} | {ADVICE[reason]} |\n"
        for reason, kind in sorted(kinds.items())
    )


def _kinds() -> Iterator[Any]:
    """Every error there is; where two trees have a reason, the services' meaning is shown."""
    for module in (kv_errors, model_errors, errors):
        for kind in vars(module).values():
            ours = isinstance(kind, type) and kind.__module__ == module.__name__
            if ours and issubclass(kind, Exception) and kind is not errors.RetryableError:
                yield kind


def _meaning(kind: Any) -> str:
    if kind in ROOTS:
        return ROOTS[kind]
    return (inspect.getdoc(kind) or "").splitlines()[0]


def main() -> None:
    """Writes the pages."""
    DOCS.mkdir(exist_ok=True)
    (DOCS / "settings.md").write_text(settings_page())
    (DOCS / "errors.md").write_text(errors_page())


if __name__ == "__main__":
    main()
