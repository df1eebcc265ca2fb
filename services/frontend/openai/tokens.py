"""Tokens as OpenAI writes them: text, bytes, log-probabilities. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence

from services.engine.api import TokenLogprob
from tandem.openai.v1 import openai_pb2 as pb

LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI says this for what is next to impossible."""


class Spelling:
    """What tokens spell. `names`: of control tokens, which have no bytes."""

    def __init__(self, tokens: Sequence[bytes], names: Mapping[int, str]) -> None:
        self._tokens = tokens
        self._names = names

    def bytes_of(self, token_id: int) -> bytes:
        """What it adds to the answer's bytes."""
        return self._tokens[token_id] if token_id < len(self._tokens) else b""

    def text_of(self, token_id: int) -> str:
        """U+FFFD for bytes that are no character by themselves."""
        spelled = self.bytes_of(token_id)
        return spelled.decode(errors="replace") if spelled else self._names.get(token_id, "")

    def key_of(self, token_id: int) -> str:
        """The same, but "bytes:" and their codes for bytes that are no text by themselves.

        So tokens that differ in their bytes have different keys.
        """
        spelled = self.bytes_of(token_id)
        try:
            return spelled.decode() if spelled else self._names.get(token_id, "")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def chat(self, items: Sequence[TokenLogprob]) -> pb.ChatLogprobs:
        """Log-probabilities of an answer's tokens."""
        return pb.ChatLogprobs(
            content=[
                pb.TokenLogprob(
                    token=self.text_of(item.token_id),
                    logprob=max(item.logprob, LEAST_LOGPROB),
                    bytes=self.bytes_of(item.token_id),
                    top_logprobs=[
                        pb.TopLogprob(
                            token=self.text_of(token_id),
                            logprob=max(logprob, LEAST_LOGPROB),
                            bytes=self.bytes_of(token_id),
                        )
                        for token_id, logprob in item.top
                    ],
                )
                for item in items
            ]
        )


class Offsets:
    """Where tokens begin in a text that goes on, in characters."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def completion(self, items: Sequence[TokenLogprob]) -> pb.CompletionLogprobs:
        """Log-probabilities of the continuation's next tokens."""
        said = pb.CompletionLogprobs()
        for item in items:
            said.tokens.append(self._spelling.key_of(item.token_id))
            said.token_logprobs.append(max(item.logprob, LEAST_LOGPROB))
            said.text_offset.append(self._at)
            top = said.top_logprobs.add()
            for token_id, logprob in item.top:
                top[self._spelling.key_of(token_id)] = max(logprob, LEAST_LOGPROB)
            self._at += len(self._decoder.decode(self._spelling.bytes_of(item.token_id)))
        return said
