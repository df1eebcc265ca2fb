"""A model's tokens as llguidance wants them."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLTokenizer, TokenizerWrapper

from services.runtime.errors import InvalidRequestError


class Vocabulary:
    """The bytes of every token: a trie, built once for a model. Thread-safe.

    `tokens`: bytes by id, none for control tokens; `size`: logits that a position has. Ids from
    len(tokens) on stand for nothing and are never allowed. Raises InvalidRequestError for a model
    that could not say that a form is complete.
    """

    def __init__(self, tokens: Sequence[bytes], size: int, eos_token_ids: Sequence[int]) -> None:
        if not eos_token_ids:
            raise InvalidRequestError(
                "sampling.guide", "a guide", "this model has no end-of-sequence token to end with"
            )
        self.size = size
        self.eos_token_ids = frozenset(eos_token_ids)
        padded = [*tokens[:size], *[b""] * (size - len(tokens))]
        for token in eos_token_ids:
            padded[token] = b"<eos-%d>" % token
        wrapped = TokenizerWrapper(_Tokens(padded, list(eos_token_ids)))
        self.tokenizer = LLTokenizer(wrapped, eos_token=list(eos_token_ids))

    @property
    def words(self) -> int:
        """Of 32 bits, in a mask."""
        return -(-self.size // 32)


class _Tokens:
    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = eos[0]
        self.special_token_ids = eos

    def __call__(self, text: bytes) -> list[int]:
        raise AssertionError("nothing is tokenized where no token is forced")
