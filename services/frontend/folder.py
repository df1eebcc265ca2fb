"""A model out of a folder, as services.engine.models finds it."""

from __future__ import annotations

from collections.abc import Sequence

from services.engine.models.folder import resolve
from services.engine.models.text import Detokenizer, Tokenizer
from services.frontend import text
from services.frontend.validate import Chat, Input, Prompt, Tokens
from services.runtime.settings import ModelSettings


class FolderModel:
    """A model of services.engine.models. Raises ModelNotFoundError with what would bring it."""

    def __init__(self, settings: ModelSettings) -> None:
        folder = resolve(settings)
        self._tokenizer = Tokenizer(folder)
        self.name: str = settings.name
        self.vocabulary: int = folder.vocabulary
        self.eos_token_ids: tuple[int, ...] = folder.eos_token_ids
        self.tokens: Sequence[bytes] = self._tokenizer.table.tokens

    def encode(self, asked: Input) -> list[int]:
        """See Model."""
        match asked:
            case Prompt(words):
                return self._tokenizer.encode(words)
            case Chat(messages):
                turns = [{"role": role, "content": content} for role, content in messages]
                return self._tokenizer.encode_chat(turns)
            case Tokens(token_ids):
                return list(token_ids)

    def detokenizer(self) -> text.Detokenizer:
        """See Model."""
        return Detokenizer(self._tokenizer)
