"""Jinja for chat templates: sandboxed, and bounded in time and size.

A template is a program that came with a model's weights. What it may touch, Jinja's sandbox
bounds; what it may take, this does: every round of a loop and every call of a macro looks at the
thread's CPU time, and whatever makes texts or lists longer looks at their length. So none holds a
thread for ever, and none fills the memory.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LENGTH = 2**25
"""Characters of a rendered conversation, or of anything on the way to it; items of a list."""
MAX_BITS = 4096
"""Of a power."""
_ROUNDS = 16
"""That pass between two looks at the clock."""


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what training learns from; here just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Budget(threading.local):
    """What the rendering on this thread has left."""

    until = 0.0
    rounds = 0


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of Hugging Face's templates. `seconds`: of CPU, for one rendering.

    now: what strftime_now formats. cpu_clock: of the calling thread.
    """

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(
        self,
        now: Callable[[], datetime],
        seconds: float,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        self._seconds = seconds
        self._clock = cpu_clock
        self._budget = _Budget()

    def rendered(self, template: jinja2.Template, given: Mapping[str, object]) -> str:
        """The text. Raises what templates raise: TemplateError, TypeError and the like."""
        budget = self._budget
        budget.until, budget.rounds = self._clock() + self._seconds, 0
        pieces, length = [], 0
        for piece in template.generate(given):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_LENGTH:
                _too_long()
        return "".join(pieces)

    def tick(self) -> str:
        """Called in every round of a loop, and by every macro."""
        budget = self._budget
        budget.rounds += 1
        if budget.rounds % _ROUNDS == 0 and self._clock() > budget.until:
            raise jinja2.TemplateRuntimeError(f"it takes more than {self._seconds:g} s")
        return ""

    def joined(self, *parts: object) -> str:
        """What a ~ b ~ ... is."""
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > MAX_LENGTH:
            _too_long()
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja asks here for the operators that are intercepted."""
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * right > MAX_BITS:
            raise jinja2.TemplateRuntimeError(f"a power of more than {MAX_BITS} bits")
        if operator == "*" and (_length(left) * _times(right) + _length(right) * _times(left)) > (
            MAX_LENGTH
        ):
            _too_long()
        if operator == "+" and _length(left) + _length(right) > MAX_LENGTH:
            _too_long()
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _bound(tree)
        return tree


def _bound(node: nodes.Node) -> None:
    """Puts ticks into loops and macros, and joined() in the place of ~."""
    for field, value in list(node.iter_fields()):
        if isinstance(value, nodes.Concat):
            setattr(node, field, _joined(value))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, nodes.Concat):
                    value[i] = _joined(item)
    for child in node.iter_child_nodes():
        _bound(child)
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        node.body.insert(0, nodes.Output([_asked("tick", [], node.lineno)], lineno=node.lineno))


def _joined(concat: nodes.Concat) -> nodes.Call:
    return _asked("joined", concat.nodes, concat.lineno)


def _asked(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    method = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(method, arguments, [], None, None, lineno=line)


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _times(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _too_long() -> NoReturn:
    raise jinja2.TemplateRuntimeError(f"it makes more than {MAX_LENGTH} characters or items")


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
