"""Logits and tokens against Hugging Face transformers on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.engine.torch.model import Batch, TorchModel
from tests.unit.engine_torch import torch_models
from tests.unit.engine_torch.torch_models import advance, sequences

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "group 3, head 32": {},
    "group 1, head 80, untied": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 80,
        "tie_word_embeddings": False,
    },
    "group 2, head 64, biases": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "group 7, head 128": {"hidden_size": 112, "num_attention_heads": 7, "head_dim": 128},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


def peer(folder, dtype=torch.float32):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.peer
@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_agree(tmp_path, name):
    folder = torch_models.write(tmp_path, **MODELS[name])
    model = TorchModel.load(folder, dtype="float32", kv_dtype="float32", threads=2)
    (sequence,) = sequences(model, [300])
    found = np.concatenate([advance(model, [(sequence, n)])[0] for n in (100, 1, 199)])
    with torch.inference_mode():
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
        expected = peer(folder)(ids).logits[0].numpy()
    size = np.abs(expected).max()
    assert np.abs(found - expected).max() < 5e-5 * size


@pytest.mark.peer
@pytest.mark.parametrize(("dtype", "kv", "share"), [
    ("bfloat16", "bfloat16", 0.03),
    ("float32", "bfloat16", 0.03),
    ("float32", "fp8_e4m3", 0.25),
])  # fmt: skip
def test_rounded_numbers_stay_close(tmp_path, dtype, kv, share):
    """Root mean square error of logits, as a share of theirs."""
    folder = torch_models.write(tmp_path)
    model = TorchModel.load(folder, dtype=dtype, kv_dtype=kv, threads=2)
    (sequence,) = sequences(model, [200])
    (found,) = advance(model, [(sequence, 200)])
    with torch.inference_mode():
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
        expected = peer(folder)(ids).logits[0].numpy()
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < share


def greedy(model: TorchModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """`count` tokens after each prompt, all of them in one batch."""
    width = max(model.layout.blocks_for(len(p) + count) for p in prompts)
    tables = np.arange(len(prompts) * width, dtype=np.int32).reshape(len(prompts), width)
    model.bind(np.zeros((tables.size, model.layout.block_bytes), np.uint8))
    out: list[list[int]] = [[] for _ in prompts]
    rows, starts = prompts, [0] * len(prompts)
    for _ in range(count):
        ends = np.cumsum([len(r) for r in rows])
        places = [np.arange(s, s + len(r)) for s, r in zip(starts, rows, strict=True)]
        logits = model.forward(
            Batch(
                token_ids=np.concatenate(rows).astype(np.int32),
                positions=np.concatenate(places).astype(np.int32),
                query_starts=np.array([0, *ends], np.int32),
                block_tables=tables,
                logit_rows=(ends - 1).astype(np.int32),
            )
        )
        starts = [s + len(r) for s, r in zip(starts, rows, strict=True)]
        rows = [[int(token)] for token in logits.argmax(-1)]
        for tokens, row in zip(out, rows, strict=True):
            tokens += row
    return out


@pytest.fixture(scope="module")
def smollm():
    from services.engine.models.errors import ModelNotFoundError
    from services.engine.models.folder import resolve
    from services.runtime.settings import ModelSettings

    try:
        return resolve(ModelSettings()).path
    except ModelNotFoundError as error:
        pytest.skip(str(error))


QUESTIONS = (
    "capital of Japan", "sum of two and two", "colour of the sky", "largest planet",
    "author of Hamlet", "speed of light", "boiling point of water", "opposite of hot",
    "first month of the year", "square root of nine", "language of Brazil", "longest river",
    "inventor of the telephone", "chemical symbol of gold", "number of continents",
    "freezing point of water", "smallest prime", "currency of England", "closest star",
    "plural of mouse",
)  # fmt: skip


@pytest.mark.model
@pytest.mark.peer
@pytest.mark.timeout(600)
def test_the_real_model_says_the_same_64_tokens_on_20_prompts(smollm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    prompts = [
        tokenizer(f"Question: what is the {q}?\nAnswer: it is")["input_ids"] for q in QUESTIONS
    ]
    model = TorchModel.load(smollm, dtype="float32", kv_dtype="float32")
    found = greedy(model, prompts, 64)
    theirs = peer(smollm)
    with torch.inference_mode():
        # The peer checks our tokens in one pass each: it must choose every one of them itself.
        for prompt, tokens in zip(prompts, found, strict=True):
            logits = theirs(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
            assert logits.argmax(-1).tolist() == tokens
        whole = theirs(torch.tensor([prompts[0]])).logits[0].numpy()
    blocks = model.layout.blocks_for(len(prompts[0]))
    ours = model.forward(
        Batch(
            token_ids=np.array(prompts[0], np.int32),
            positions=np.arange(len(prompts[0]), dtype=np.int32),
            query_starts=np.array([0, len(prompts[0])], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            logit_rows=np.arange(len(prompts[0]), dtype=np.int32),
        )
    )
    assert np.abs(ours - whole).max() < 2e-3 * np.abs(whole).max()
