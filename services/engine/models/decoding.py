"""The bytes each token stands for. Text is their concatenation, whatever stands beside whatever."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers

from services.engine.models.errors import ModelFileError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, as GPT-2 defined it.

    Printable bytes stand for themselves; the others are the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class ByteTable:
    """The bytes of every token id; control tokens have none.

    strip_spaces: how many spaces at the beginning of a text are not part of it.
    """

    def __init__(self, tokens: list[bytes], strip_spaces: int) -> None:
        self.tokens = tokens
        self.strip_spaces = strip_spaces

    def __len__(self) -> int:
        return len(self.tokens)

    def join(self, token_ids: Iterable[int]) -> bytes:
        """The bytes of some tokens. Ids beyond the table have none."""
        table, size = self.tokens, len(self.tokens)
        return b"".join([table[i] for i in token_ids if 0 <= i < size])

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, file: Path) -> ByteTable:
        """The table of a tokenizer whose decoder is byte-level, or SentencePiece's byte fallback.

        Raises ModelFileError for another decoder. With byte fallback, invalid UTF-8 is decoded as
        everywhere else (one U+FFFD for each maximal invalid part), where Hugging Face gives up
        the whole run of bytes.
        """
        decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": "none"}
        steps = {s["type"]: s for s in decoder.get("decoders", [decoder])}
        if set(steps) == {"ByteLevel"}:
            return cls(_table(tokenizer, _byte_level), 0)
        if set(steps) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and _replaces(steps, "▁"):
            strip = steps.get("Strip", {"content": " ", "start": 0, "stop": 0})
            if strip["content"] == " " and strip["stop"] == 0:
                return cls(_table(tokenizer, _sentence_piece), strip["start"])
        raise ModelFileError(
            file, f"decoder {'+'.join(steps)}: only byte-level BPE and SentencePiece can be served"
        )


def _replaces(steps: dict[str, Any], mark: str) -> bool:
    replace = steps.get("Replace", {})
    return (replace.get("pattern"), replace.get("content")) == ({"String": mark}, " ")


def _table(tokenizer: tokenizers.Tokenizer, to_bytes: Callable[[str], bytes]) -> list[bytes]:
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id not in added or not added[token_id].special:
            table[token_id] = to_bytes(token)
    return table


_ALPHABET = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[c] for c in token])
    except KeyError:
        return token.encode()  # an added token is written as it is


def _sentence_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
