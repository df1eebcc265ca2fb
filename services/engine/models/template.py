"""Chat templates: Jinja, sandboxed, with the functions that Hugging Face gives them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.engine.models.errors import ModelFileError
from services.runtime.errors import InvalidRequestError

FIELD = "chat.messages"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what training learns from; here just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """A model's template.

    file: for errors. special: text of bos_token, eos_token and so on, which templates refer to.
    now: what strftime_now formats.
    """

    def __init__(
        self, source: str, file: Path, special: Mapping[str, str], now: Callable[[], datetime]
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self._special = dict(special)
        self.knows_developers = '"developer"' in source or "'developer'" in source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelFileError(
                file, f"chat template, line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, object] = MappingProxyType({}),
        continues: bool = False,
    ) -> str:
        """The conversation as text, up to where the model's answer begins.

        Raises InvalidRequestError if the template refuses the conversation.
        """
        given: dict[str, object] = {
            "documents": None,
            **self._special,
            **variables,
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": not continues,
        }
        try:
            return self._template.render(given)
        except jinja2.TemplateError as error:
            why = error.message or type(error).__name__
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            why = type(error).__name__  # its words may quote the conversation
        roles = [m.get("role") for m in messages]
        raise InvalidRequestError(FIELD, roles, f"the model's chat template says: {why}")


def template_of(
    folder: Path, config: Mapping[str, Any], now: Callable[[], datetime]
) -> ChatTemplate | None:
    """The template in chat_template.jinja, or else in tokenizer_config.json (`config`), if any.

    Raises ModelFileError.
    """
    separate, shared = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if separate.is_file():
        return ChatTemplate(separate.read_text(encoding="utf-8"), separate, _special(config), now)
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if found is None:
        return None
    if not isinstance(found, str):
        raise ModelFileError(shared, f"chat_template is a {type(found).__name__}, expected text")
    return ChatTemplate(found, shared, _special(config), now)


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))
