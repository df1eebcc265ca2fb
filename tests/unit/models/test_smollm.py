"""The newcomer's model, as `make model` fetched it."""

import copy
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from services.engine.models import cache, catalog
from services.engine.models.folder import ModelFolder, check_weights, resolve
from services.engine.models.text import Detokenizer, Tokenizer
from services.runtime.settings import ModelSettings

pytestmark = pytest.mark.model

SAMPLES = [
    "",
    " ",
    "What is the capital of Japan?",
    "In 2024, 12345.678 people paid $1,000,000 (3%) at 10:30.",
    "def f(x):\n\treturn  x ** 2  # 8192\n\n\n    pass\r\n",
    "I'm you're they'll WE'VE don't O'Neill",
    "日本の首都は東京です。\uff11\uff12 ②",
    "Привет, мир! مرحبا بالعالم שלום हिन्दी ไทย 한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 é é ﬁ ﷺ",
    "\u00a0\u2003\ufeff\u200b\x00\x1f\x7f\u2028",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name><jupyter_code>",
    "https://example.org/a?b=c&d=%20#e <a href='x'>y</a> {\"k\": [1, 2]}",
    "a" * 300 + " " * 70 + "\n" * 40,
    "½ ² ⅷ ௰ \U0001d7d8 ٣",
]


def corpus() -> list[str]:
    """Samples, this project's own text, and random characters of every plane."""
    root = Path(__file__).parents[3]
    files = [*root.glob("docs/*.md"), *root.glob("*.md"), *root.glob("services/engine/*.py")]
    draw = random.Random(7)
    planes = [
        "".join(
            chr(draw.choice((draw.randrange(0x20, 0x3000), draw.randrange(0xE000, 0x20000))))
            for _ in range(200)
        )
        for _ in range(100)
    ]
    mixed = ["".join(draw.choices(" \n\t'0123456789aéZ.,!?-", k=200)) for _ in range(100)]
    return [*SAMPLES, *(f.read_text(encoding="utf-8") for f in files), *planes, *mixed]


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return resolve(ModelSettings(name="smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def tokenizer(folder: ModelFolder) -> Tokenizer:
    return Tokenizer(folder)


def test_the_folder(folder: ModelFolder) -> None:
    assert (folder.context_tokens, folder.vocabulary) == (8192, 49152)
    assert (folder.bos_token_id, folder.eos_token_ids) == (1, (2,))
    check_weights(folder.path)


def test_tokens_come_back_as_the_text(tokenizer: Tokenizer) -> None:
    for text in corpus():
        ids = tokenizer.encode(text)
        if any(i < 17 for i in ids):
            continue  # control tokens have no text
        detokenizer = Detokenizer(tokenizer)
        assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == text


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' own reading of the GGUF file."""
    from transformers import AutoTokenizer

    known = catalog.find("smollm2-135m-instruct")
    home = cache.cache_folder(os.environ) / known.name
    return AutoTokenizer.from_pretrained(home, gguf_file=known.gguf)


@pytest.mark.peer
def test_tokens_of_text_without_numerals_are_those_of_transformers(
    tokenizer: Tokenizer, theirs: Any
) -> None:
    for text in corpus():
        words = "".join(c for c in text if not unicodedata.category(c).startswith("N"))
        assert tokenizer.encode(words) == theirs(words)["input_ids"], words[:60]


@pytest.mark.peer
def test_numerals_are_single_as_the_file_says(tokenizer: Tokenizer, theirs: Any) -> None:
    """transformers does not read tokenizer.ggml.pre: "smollm" is GPT-2's, each of \\p{N} apart."""
    backend = copy.deepcopy(theirs.backend_tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in corpus():
        assert tokenizer.encode(text) == backend.encode(text).ids, text[:60]


@pytest.mark.peer
def test_text_is_that_of_transformers(tokenizer: Tokenizer, theirs: Any) -> None:
    draw = random.Random(11)
    for _ in range(300):
        ids = [draw.randrange(49152) for _ in range(40)]
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.peer
@pytest.mark.parametrize(
    "messages",
    [
        [("user", "What is the capital of Japan?")],
        [("system", "Be brief."), ("user", "hi\n"), ("assistant", "Hello!"), ("user", " 12 ")],
        [("user", "")],
    ],
)
def test_conversations_are_those_of_transformers(
    tokenizer: Tokenizer, folder: ModelFolder, messages: list[tuple[str, str]]
) -> None:
    from transformers import AutoTokenizer

    chat = [{"role": role, "content": content} for role, content in messages]
    expected = AutoTokenizer.from_pretrained(folder.path).apply_chat_template(
        chat, add_generation_prompt=True
    )
    assert tokenizer.encode_chat(chat) == expected["input_ids"]


@pytest.mark.peer
def test_it_knows_the_capital_of_japan(tokenizer: Tokenizer, folder: ModelFolder) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    ids = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of Japan?"}])
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(answer.tolist()) == "The capital of Japan is Tokyo."
