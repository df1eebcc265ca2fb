"""Values of a config.json, taken by key; what can't be computed is refused with its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.engine.models.errors import UnsupportedModelError

Found = Mapping[str, Any]

CONFIG = "config.json"


def unsupported(key: str, value: object, allowed: str) -> UnsupportedModelError:
    """The error for a value that is not among the allowed ones; None: there is none."""
    what = f"{key} is missing" if value is None else f"{key}={value!r} is not supported"
    return UnsupportedModelError(f"{CONFIG}: {what}; expected {allowed}", key=key, value=value)


def expect(found: Found, key: str, *allowed: object) -> Any:
    """One of `allowed`; the first one if the key is missing or null."""
    value = found.get(key)
    if value is None:
        return allowed[0]
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise unsupported(key, value, " or ".join(map(repr, allowed)))
    return value


def whole(found: Found, key: str, default: int | None = None, least: int = 1) -> int:
    """A whole number."""
    value = found.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise unsupported(key, value, f"a whole number, at least {least}")
    return value


def number(found: Found, key: str, default: float | None = None) -> float:
    """A number above 0."""
    value = found.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise unsupported(key, value, "a number above 0")
    return float(value)


def flag(found: Found, key: str, default: bool = False) -> bool:
    """True or false."""
    value = found.get(key)
    if value is None:
        value = default
    if not isinstance(value, bool):
        raise unsupported(key, value, "true or false")
    return value


def vectors(key: str, value: int, step: int, least: int = 0) -> None:
    """Refuses a size that the kernels' vectors don't divide."""
    if value % step or value < least:
        more = f", at least {least}" if least else ""
        raise unsupported(key, value, f"a multiple of {step}{more}")
