"""Chat templates: Jinja, with the variables and functions that Hugging Face gives them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.meta

from services.engine.models.errors import ModelFileError
from services.engine.models.sandbox import Sandbox
from services.engine.models.special import NONCHARACTERS
from services.runtime.errors import InvalidRequestError

FIELD = "chat.messages"
SECONDS = 2.0
"""Of CPU that a rendering may take, if nobody says otherwise."""

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_OWN = frozenset({"messages", "tools", "add_generation_prompt", *_SPECIAL_NAMES})
_DEFAULT, _TOOL_USE = "default", "tool_use"


@dataclass(frozen=True, slots=True)
class ToolTexts:
    """How a model is told of functions by a template that has none; Jinja, each.

    `preface`: of `tools`; it joins the system's message. `calls`: of `calls`, behind what an
    assistant said. `result`: of a tool's `message`, as a user's. The last two are for templates
    that know no calls at all.
    """

    preface: str
    calls: str
    result: str


@dataclass(frozen=True, slots=True)
class _Calls:
    """How a template wants turns with calls: arguments as objects, as is custom, or as text.

    `empty`: the content of a turn without any.
    """

    objects: bool
    empty: str | None

    def of(self, message: Mapping[str, Any]) -> dict[str, Any]:
        calls = message["tool_calls"]
        if self.objects:
            calls = [_with_object(call) for call in calls]
        return {**message, "content": message.get("content") or self.empty, "tool_calls": calls}


class ChatTemplate:
    """A model's template.

    sources: the text of each by name; "tool_use" is for conversations with functions, "default"
    for all others. file: for errors. special: text of bos_token, eos_token and so on, which
    templates refer to. now: what strftime_now formats.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        file: Path,
        special: Mapping[str, str],
        now: Callable[[], datetime],
        seconds: float = SECONDS,
    ) -> None:
        self.source = "\n".join(sources.values())
        self.knows_developers = '"developer"' in self.source or "'developer'" in self.source
        self._sandbox = Sandbox(now, seconds)
        self._special = dict(special)
        try:
            self._templates = {k: self._sandbox.from_string(s) for k, s in sources.items()}
            variables = [
                jinja2.meta.find_undeclared_variables(self._sandbox.parse(source))
                for source in sources.values()
            ]
        except jinja2.TemplateSyntaxError as error:
            raise ModelFileError(
                file, f"chat template, line {error.lineno}: {error.message}"
            ) from error
        self.knows_tools = any("tools" in found for found in variables)
        self._knows_calls = "tool_calls" in self.source
        self._calls = self._probed() if self._knows_calls else _Calls(objects=False, empty=None)
        self._told: dict[str, jinja2.Template] = {}

    def prepared(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """With calls as the template takes them; their arguments come as JSON text."""
        return [
            self._calls.of(message) if message.get("tool_calls") else dict(message)
            for message in messages
        ]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, object] = MappingProxyType({}),
        continues: bool = False,
        told: ToolTexts | None = None,
    ) -> str:
        """The conversation as text, up to where the model's answer begins.

        With `continues` up to the end of the last message's content. Raises InvalidRequestError
        if the template refuses the conversation.
        """
        taken = sorted(_OWN & set(variables))
        if taken:
            own = ", ".join(sorted(_OWN))
            raise InvalidRequestError("chat.variables", taken[0], f"templates have their own {own}")
        end = ""
        try:
            if told is not None:
                messages = self._retold(messages, tools, told)
            if continues:
                messages, end = _with_end(messages)
            given = {
                "documents": None,
                **self._special,
                **variables,
                "messages": messages,
                "tools": list(tools) or None,
                "add_generation_prompt": not continues,
            }
            text = self._sandbox.rendered(self._for(tools), given)
        except jinja2.TemplateError as error:
            why = error.message or type(error).__name__
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            why = type(error).__name__  # its words may quote the conversation
        else:
            return _up_to(text, end) if end else text
        roles = [m.get("role") for m in messages]
        raise InvalidRequestError(FIELD, roles, f"the model's chat template says: {why}")

    def _for(self, tools: Sequence[object]) -> jinja2.Template:
        if tools and _TOOL_USE in self._templates:
            return self._templates[_TOOL_USE]
        return self._templates.get(_DEFAULT) or next(iter(self._templates.values()))

    def _retold(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        told: ToolTexts,
    ) -> list[Mapping[str, Any]]:
        """Messages that say what the template does not."""
        retold = list(messages)
        if not self._knows_calls:
            retold = []
            for message in messages:
                self._retell(message, retold, told)
        if tools and not self.knows_tools:
            preface = self._render_told(told.preface, {"tools": tools})
            if retold and retold[0].get("role") == "system":
                preface = f"{retold.pop(0).get('content') or ''}\n\n{preface}"
            retold.insert(0, {"role": "system", "content": preface})
        return retold

    def _retell(
        self, message: Mapping[str, Any], retold: list[Mapping[str, Any]], told: ToolTexts
    ) -> None:
        """Adds a message as one that a template without calls understands."""
        content = message.get("content") or ""
        if message.get("tool_calls"):
            content += self._render_told(told.calls, {"calls": message["tool_calls"]})
            retold.append({"role": message["role"], "content": content})
        elif message.get("role") == "tool":
            result = self._render_told(told.result, {"message": message})
            if retold and retold[-1].get("results"):  # a turn has the results of all its calls
                result = f"{retold.pop()['content']}\n{result}"
            retold.append({"role": "user", "content": result, "results": True})
        else:
            retold.append(message)

    def _render_told(self, source: str, given: Mapping[str, object]) -> str:
        template = self._told.get(source)
        if template is None:
            template = self._told[source] = self._sandbox.from_string(source)
        return self._sandbox.rendered(template, given)

    def _probed(self) -> _Calls:
        """The first way in which a call comes out whole; that which is custom, if none does."""
        function = {"name": "name", "arguments": '{"key": "value"}'}
        call = {"id": "call-0001", "type": "function", "function": function}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        ways = [_Calls(objects, empty) for empty in (None, "") for objects in (True, False)]
        for way in ways:
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": "question"},
                way.of(turn),
                {"role": "tool", "content": "result", "name": "name", "tool_call_id": "call-0001"},
            ]
            try:
                text = self.render(messages, [{"type": "function", "function": {"name": "name"}}])
            except InvalidRequestError:
                continue
            if '"key"' in text:
                return way
        return ways[0]


def template_of(
    folder: Path,
    config: Mapping[str, Any],
    now: Callable[[], datetime],
    seconds: float = SECONDS,
) -> ChatTemplate | None:
    """The template in chat_template.jinja, or else in tokenizer_config.json (`config`), if any.

    There may be several by name: in a list, or as additional_chat_templates/NAME.jinja.
    Raises ModelFileError.
    """
    separate, file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if separate.is_file():
        sources = {_DEFAULT: separate.read_text(encoding="utf-8")}
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = path.read_text(encoding="utf-8")
        return ChatTemplate(sources, separate, _special(config), now, seconds)
    found = config.get("chat_template")
    if found is None:
        return None
    if isinstance(found, str):
        return ChatTemplate({_DEFAULT: found}, file, _special(config), now, seconds)
    if not isinstance(found, list):
        raise ModelFileError(file, f"chat_template is a {type(found).__name__}, expected text")
    named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    sources = {k: v for k, v in named.items() if isinstance(k, str) and isinstance(v, str)}
    if _DEFAULT not in sources:
        raise ModelFileError(file, f"chat_template has {sorted(sources)}, expected a default")
    return ChatTemplate(sources, file, _special(config), now, seconds)


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return dict(call)
    if not isinstance(arguments, dict):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _with_end(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The messages with a character behind the last content that is nowhere else in them."""
    said = json.dumps(messages, ensure_ascii=False)
    end = next((c for c in reversed(NONCHARACTERS) if c not in said), "")
    if not end:
        raise InvalidRequestError(FIELD, "every Unicode noncharacter", "leave one out")
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{last.get('content') or ''}{end}"}], end


def _up_to(text: str, end: str) -> str:
    found = text.rfind(end)
    if found < 0:
        allowed = "the model's chat template leaves the last message out: it can't be gone on with"
        raise InvalidRequestError(FIELD, "the last message", allowed)
    return text[:found]


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
