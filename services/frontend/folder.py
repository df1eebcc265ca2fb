"""A model out of a folder, as services.engine.models finds it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from services.engine.models.folder import resolve
from services.engine.models.text import Detokenizer, Tokenizer
from services.frontend import text
from services.frontend.answers.format import AnswerFormat
from services.frontend.answers.plain import PlainFormat
from services.frontend.chat import Chat, Function, Turn
from services.frontend.validate import Input, Prompt, Tokens
from services.runtime.settings import ModelSettings

TAIL_TOKENS = 16
"""Of a prompt, in which the template may open a thought."""


class FolderModel:
    """A model of services.engine.models. Raises ModelNotFoundError with what would bring it."""

    def __init__(self, settings: ModelSettings) -> None:
        folder = resolve(settings)
        self._tokenizer = Tokenizer(folder)
        self.name: str = settings.name
        self.vocabulary: int = folder.vocabulary
        self.eos_token_ids: tuple[int, ...] = folder.eos_token_ids
        self.tokens: Sequence[bytes] = self._tokenizer.table.tokens
        self.control_tokens: Mapping[int, str] = self._tokenizer.control_tokens
        self.answers: AnswerFormat = PlainFormat()

    def encode(self, asked: Input) -> list[int]:
        """See Model."""
        match asked:
            case Prompt(words, special):
                return self._tokenizer.encode(words, special)
            case Chat():
                return self._tokenizer.encode_chat(
                    [_message(self._known(turn)) for turn in asked.turns],
                    [_tool(function) for function in asked.tools],
                    asked.variables,
                    asked.continues,
                )
            case Tokens(token_ids):
                return list(token_ids)

    def _known(self, turn: Turn) -> Turn:
        """Developers are what older templates call the system."""
        if turn.role != "developer" or self._tokenizer.knows_developers:
            return turn
        return replace(turn, role="system")

    def thinks_after(self, prompt: Sequence[int]) -> bool:
        """See Model."""
        tail = self._tokenizer.table.join(prompt[-TAIL_TOKENS:]).decode(errors="replace")
        return self.answers.thinks_after(tail)

    def detokenizer(self, marked: bool = False) -> text.Detokenizer:
        """See Model."""
        return Detokenizer(self._tokenizer)


def _message(turn: Turn) -> dict[str, object]:
    """As Hugging Face's templates take it."""
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.content is None and not turn.calls:
        message["content"] = ""
    if turn.name:
        message["name"] = turn.name
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in turn.calls
        ]
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    if turn.reasoning is not None:
        message["reasoning_content"] = turn.reasoning
    return message


def _tool(function: Function) -> dict[str, object]:
    """As Hugging Face's templates take it."""
    parameters = json.loads(function.parameters) if function.parameters else {"type": "object"}
    described = {
        "name": function.name,
        "description": function.description,
        "parameters": parameters,
    }
    return {"type": "function", "function": described}
