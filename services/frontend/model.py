"""The model whose text this frontend speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from services.frontend import text
from services.frontend.answers.format import AnswerFormat
from services.frontend.validate import Input


class Model(Protocol):
    """What the frontend needs of a model."""

    @property
    def name(self) -> str:
        """As clients ask for it."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Each ends a generation."""

    @property
    def tokens(self) -> Sequence[bytes]:
        """The bytes of every token by id, none for control tokens."""

    @property
    def control_tokens(self) -> Mapping[int, str]:
        """What control tokens are called."""

    @property
    def answers(self) -> AnswerFormat:
        """How its answers in conversations are written."""

    def encode(self, asked: Input) -> list[int]:
        """Tokens of a prompt. Thread-safe. Raises InvalidRequestError for an impossible chat."""

    def thinks_after(self, prompt: Sequence[int]) -> bool:
        """The template opened a thought that the answer goes on with."""

    def detokenizer(self, marked: bool = False) -> text.Detokenizer:
        """A new one, for one request. `marked`: with the marks that parsers of `answers` want."""
