"""The tokenizer: byte-level BPE, with DeepSeek's special tokens and its form of a chat."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training.tiny_deepseek.corpus import SOURCES, Document, Domain

# The release writes them with a full-width bar and a low block, so that no text holds them.
BEGIN, END, PAD, USER, ASSISTANT = SPECIAL = tuple(
    f"<\uff5c{name}\uff5c>"
    for name in (
        "begin\u2581of\u2581sentence",
        "end\u2581of\u2581sentence",
        "\u2581pad\u2581",
        "User",
        "Assistant",
    )
)
BEGIN_ID, END_ID, PAD_ID, USER_ID, ASSISTANT_ID = range(len(SPECIAL))

CHAT_TEMPLATE = f"""\
{{%- set add_generation_prompt = add_generation_prompt | default(false) -%}}
{{{{- bos_token -}}}}
{{%- for message in messages -%}}
{{%- if message['role'] == 'user' -%}}
{{{{- '{USER}' + message['content'] -}}}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- '{ASSISTANT}' + message['content'] + eos_token -}}}}
{{%- else -%}}
{{{{- message['content'] -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '{ASSISTANT}' -}}}}{{%- endif -%}}
"""
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SAMPLE_CHARACTERS = 12_000_000


def train(domains: Mapping[str, Domain], size: int, seed: int) -> Tokenizer:
    """Of `size` tokens, from each domain as much as its share of the training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(domains, random.Random(seed)), trainer)
    # As the release does: every text begins with BOS, and a chat's template writes its own.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


def _sample(domains: Mapping[str, Domain], chance: random.Random) -> Iterator[str]:
    for source in SOURCES:
        left = _SAMPLE_CHARACTERS * source.share // 100
        documents = list(domains[source.domain].train)
        chance.shuffle(documents)
        for document in documents:
            for text in document.turns or (document.text,):
                yield text
                left -= len(text)
            if left <= 0:
                break


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> np.ndarray:
    """The documents' tokens one after another, uint16; each begins with BOS and ends with EOS."""
    return np.concatenate([np.array(ids, np.uint16) for ids in _encoded(tokenizer, documents)])


def _encoded(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[list[int]]:
    for document in documents:
        if not document.turns:
            yield [BEGIN_ID, *_ids(tokenizer, document.text), END_ID]
            continue
        ids = [BEGIN_ID]
        for question, answer in zip(document.turns[0::2], document.turns[1::2], strict=True):
            ids += [USER_ID, *_ids(tokenizer, question)]
            ids += [ASSISTANT_ID, *_ids(tokenizer, answer), END_ID]
        yield ids


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token stands for, int64; none for special ones."""
    lengths = [len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.get_vocab_size())]
    lengths[: len(SPECIAL)] = [0] * len(SPECIAL)
    return np.array(lengths, np.int64)  # byte-level: a character of a token's name is a byte


def save(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
