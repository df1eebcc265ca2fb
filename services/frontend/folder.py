"""A model out of a folder, as services.engine.models finds it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from services.engine.models.folder import resolve
from services.engine.models.template import SECONDS
from services.engine.models.text import Detokenizer, Tokenizer
from services.frontend import text
from services.frontend.answers.format import AUTO, format_of
from services.frontend.answers.told import TOLD
from services.frontend.chat import Chat, Function, Turn
from services.frontend.validate import Input, Prompt, Tokens
from services.runtime.settings import ModelSettings

TAIL_TOKENS = 16
"""Of a prompt, in which the template may open a thought."""


class FolderModel:
    """A model of services.engine.models. Raises ModelNotFoundError with what would bring it.

    answer_format: as in the settings. template_seconds: of CPU, for a conversation.
    """

    def __init__(
        self,
        settings: ModelSettings,
        answer_format: str = AUTO,
        template_seconds: float = SECONDS,
    ) -> None:
        folder = resolve(settings)
        self._tokenizer = tokenizer = Tokenizer(folder, template_seconds=template_seconds)
        self.name: str = settings.name
        self.vocabulary: int = folder.vocabulary
        self.eos_token_ids: tuple[int, ...] = folder.eos_token_ids
        self.tokens: Sequence[bytes] = self._tokenizer.table.tokens
        self.control_tokens: Mapping[int, str] = self._tokenizer.control_tokens
        self.answers = format_of(answer_format, tokenizer.template_source, tokenizer.added)
        self._told = TOLD.get(self.answers.name)
        self._marks = {tokenizer.added[text]: mark for text, mark in self.answers.markers.items()}

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
                    self._told,
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
        tail = Detokenizer(self._tokenizer, self._marks)
        return self.answers.thinks_after(tail.push(prompt[-TAIL_TOKENS:]))

    def detokenizer(self, marked: bool = False) -> text.Detokenizer:
        """See Model."""
        return Detokenizer(self._tokenizer, self._marks if marked else {})


def _message(turn: Turn) -> dict[str, object]:
    """As Hugging Face's templates take it."""
    # Templates tell a turn of calls alone by its having no content.
    content = turn.content or (None if turn.calls else "")
    message: dict[str, object] = {"role": turn.role, "content": content}
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
