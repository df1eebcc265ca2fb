"""A cluster behind its gateway, before which OpenAI's own clients are put.

Its engine is the scripted one: whatever it is asked comes quickly, and is the same each time. Its
tokenizer has 512 tokens, all of which that engine generates; its template knows functions and
thoughts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import string
from collections.abc import AsyncIterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cli.cluster import LocalCluster
from tests.e2e.world import SCRIPTED, Cluster
from tests.gateway.gateway_rig import program

MODEL = "conformance/words"
"""With a slash, as names of models have."""

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THOUGHT = ["<think>", "</think>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = 512
PAIRS = list(map("".join, itertools.product(string.ascii_lowercase, repeat=2)))
MERGED = PAIRS[: VOCABULARY - len(CONTROL + THOUGHT + ALPHABET)]
TOKENS = {token: i for i, token in enumerate(CONTROL + THOUGHT + ALPHABET + MERGED)}
SPACES = ["Ġ", "Ċ", "ĉ", "č"]
"""White space, in the spelling of byte-level tokens."""


def biases(**more: float) -> dict[str, float]:
    """`logit_bias` by text. Documents end soon: no white space is in them, thoughts are short."""
    told = dict.fromkeys(SPACES, -100.0) | {"</think>": 8.0} | more
    return {str(TOKENS[text]): bias for text, bias in told.items()}


TEMPLATE = """\
{%- if tools %}<|im_start|>system
Answer with <tool_call> and one of: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% else %}<think></think>{% endif %}"""


def model_folder(folder: Path) -> Path:
    """What scripted engines and frontends need of a model."""
    tokenizer = Tokenizer(models.BPE(TOKENS, [(pair[0], pair[1]) for pair in MERGED]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens(THOUGHT)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "max_position_embeddings": 8192,
        "vocab_size": VOCABULARY,
        "eos_token_id": TOKENS["<|im_end|>"],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    texts = {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts), encoding="utf-8")
    return folder


class World(Cluster):
    """`url`: the base that clients are given."""

    def __init__(self, local: LocalCluster) -> None:
        super().__init__(local)
        self.url = f"http://{local.address('gateway')}/v1"


@contextlib.asynccontextmanager
async def serving(folder: Path, **settings: str) -> AsyncIterator[World]:
    """Gateway, frontend, coordinator, a prefill and a decode worker; all must end in good order.

    `settings`: section__key.
    """
    built = await asyncio.to_thread(program)
    chosen = SCRIPTED | {
        "model.name": MODEL,
        "model.path": str(model_folder(folder)),
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    async with LocalCluster(settings=chosen, gateway=Path(built)) as local:
        world = World(local)
        try:
            yield world
        finally:
            await world.close()
