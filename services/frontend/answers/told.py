"""How models are told of functions where their chat template has none, by family.

DeepSeek's published templates render calls and results, and leave it to the caller to describe
functions in the system's message; for V3.1 its model card says how. Hermes is the common form, and
what a model is told that nobody trained for calls: `frontend.answer_format = hermes`, with a guide
to hold it to the form.
"""

from __future__ import annotations

from services.engine.models.template import ToolTexts
from services.frontend.answers.families import DEEPSEEK_V3, DEEPSEEK_V31, HERMES
from services.frontend.answers.marks import Marker

_RESULT = "<tool_response>\n{{ message.content }}\n</tool_response>"

_HERMES = ToolTexts(
    preface=(
        "You can call functions to help the user. In <tools> each line describes one, in JSON:\n"
        "<tools>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>\n"
        "To call a function, answer with its name and arguments, as JSON in <tool_call>:\n"
        '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
    ),
    calls=(
        "{% for call in calls %}{{ '\\n<tool_call>\\n' }}"
        '{"name": {{ call.function.name | tojson }}, "arguments": '
        "{% if call.function.arguments is string %}{{ call.function.arguments }}"
        "{% else %}{{ call.function.arguments | tojson }}{% endif %}"
        "}{{ '\\n</tool_call>' }}{% endfor %}"
    ),
    result=_RESULT,
)

_M = DEEPSEEK_V3.calls

_DESCRIBED = (
    "## Tools\nYou have access to the following tools:\n"
    "{% for tool in tools %}{% set f = tool.function %}\n### {{ f.name }}\n"
    "Description: {{ f.description }}\n\nParameters: {{ f.parameters | tojson }}\n{% endfor %}\n"
    "To call tools, answer in this format and no other:\n"
)


def _deepseek(call: str) -> ToolTexts:
    section, end = _M[Marker.CALLS], _M[Marker.CALLS_END]
    told = f"{section}{call}, then further calls in the same way, and {end}"
    written = (
        "{% for call in calls %}"
        + call.replace("NAME", "{{ call.function.name }}").replace(
            "ARGUMENTS", "{{ call.function.arguments }}"
        )
        + "{% endfor %}"
    )
    preface = (
        f"{_DESCRIBED}{told}\nNAME is a tool's name, ARGUMENTS a JSON object of its parameters."
    )
    return ToolTexts(preface, f"{section}{written}{end}", _RESULT)


def _call(family: str) -> str:
    begin, inside, end = _M[Marker.CALL], _M[Marker.INSIDE], _M[Marker.CALL_END]
    if family == DEEPSEEK_V3.name:
        return f"{begin}function{inside}NAME\n```json\nARGUMENTS\n```{end}"
    return f"{begin}NAME{inside}ARGUMENTS{end}"


TOLD = {
    HERMES.name: _HERMES,
    DEEPSEEK_V3.name: _deepseek(_call(DEEPSEEK_V3.name)),
    DEEPSEEK_V31.name: _deepseek(_call(DEEPSEEK_V31.name)),
}
