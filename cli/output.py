"""What the command prints and how it ends."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

FAILED = 1
USAGE = 2
UNREACHABLE = 3
INTERRUPTED = 130


class CommandError(Exception):
    """A command could not do what it was asked for. The words are for a person."""


class UsageError(CommandError):
    """A command was asked for something that makes no sense."""


def fail(message: str, status: int = FAILED) -> NoReturn:
    """Says why on standard error and ends the command."""
    print(f"tandem: {printable(message)}", file=sys.stderr)
    raise typer.Exit(status)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turns the errors a person can do something about into words and an exit status."""
    from cli.advice import explain
    from services.runtime.client import CallFailedError
    from services.runtime.errors import StatusError
    from services.runtime.load import SettingsError
    from services.runtime.server import ListenError

    try:
        yield
    except SettingsError as error:
        fail(str(error), USAGE)
    except CallFailedError as error:
        fail(explain(error), UNREACHABLE if error.unreachable else FAILED)
    except UsageError as error:
        fail(str(error), USAGE)
    except (ListenError, CommandError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if not isinstance(error, StatusError):
            raise
        fail(f"{error.message} ({error.reason})")


_DRIVING = frozenset({"Cc", "Cf", "Cs"})
_HARMLESS = frozenset("\n\t\u200c\u200d")
"""The last two join and part letters, and make emoji of several: they belong to the text."""


def printable(text: str) -> str:
    """Text for a terminal: without control and format characters.

    They could drive it, or show a line in another order than it has.
    """
    return "".join(c for c in text if c in _HARMLESS or unicodedata.category(c) not in _DRIVING)
