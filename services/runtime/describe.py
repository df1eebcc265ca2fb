"""What a setting may be, in words, from its declaration: for errors, the command, the docs."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_BOUNDS = {Ge: ("at least {}", "ge"), Gt: ("above {}", "gt"), Le: ("at most {}", "le")}


def sections(process: type[BaseModel]) -> dict[str, BaseModel]:
    """Name of each section of a process's settings, and its defaults there."""
    return {name: field.default for name, field in process.model_fields.items()}


def fields(section: BaseModel) -> dict[str, FieldInfo]:
    """The settings of a section."""
    return type(section).model_fields


def is_tuple(field: FieldInfo) -> bool:
    """Whether the setting is a list of values."""
    return get_origin(field.annotation) is tuple


def allowed(field: FieldInfo) -> str:
    """The values a setting takes, such as "a whole number from 0 to 65535"."""
    if is_tuple(field):
        least = next((m.min_length for m in field.metadata if isinstance(m, MinLen)), 0)
        some = f" (at least {least})" if least else ""
        each = get_args(field.annotation)[0]
        kinds = [m.description for m in get_args(each)[1:] if isinstance(m, FieldInfo)]
        choices = _choices(each) or next(filter(None, kinds), "")
        return f"a list{some} of: {choices}" if choices else f"a list{some} of texts"
    if get_origin(field.annotation) is Literal:
        return f"one of: {_choices(field.annotation)}"
    if field.annotation is bool:
        return "true or false"
    if field.annotation is str:
        return "text"
    return _number(field)


def show(value: Any) -> str:
    """A value as one would write it in an environment variable or after --set."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices(annotation: Any) -> str:
    """Of a Literal; "" where the values are not counted up."""
    if get_origin(annotation) is not Literal:
        return ""
    return ", ".join(map(str, get_args(annotation)))


def _number(field: FieldInfo) -> str:
    words = "a whole number" if field.annotation is int else "a number"
    bounds = {type(m): m for m in field.metadata}
    if Ge in bounds and Le in bounds:
        return f"{words} from {bounds[Ge].ge} to {bounds[Le].le}"
    limits = [
        text.format(getattr(bounds[kind], name))
        for kind, (text, name) in _BOUNDS.items()
        if kind in bounds
    ]
    return " ".join([words, " and ".join(limits)]).rstrip()
