"""The engine on the DeepSeek that comes with Tandem, against the code that trained it."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from services.engine.models.shipped import SHIPPED
from services.engine.torch.model import TorchModel
from tests.unit.engine_torch.test_torch_deepseek import run
from tests.unit.engine_torch.torch_models import sequences
from training.tiny_deepseek import export
from training.tiny_deepseek.tokens import BEGIN

# Of the kind that it was trained on, in words that are nobody's but King James's.
TEXT = (
    "And it came to pass in the days of the king, that the people of the land went up, and said "
    "unto him, Behold, we are thy servants: let my lord the king hear the word of the LORD. And "
    "the king answered and said unto them, Go ye into the city, and bring me the sons of Levi."
)


@pytest.fixture(scope="module")
def folder():
    return SHIPPED["tiny-deepseek"].folder


@pytest.fixture(scope="module")
def trained(folder):
    return export.load(folder)


@pytest.fixture(scope="module")
def ids(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return np.array(tokenizer.encode(BEGIN + TEXT, add_special_tokens=False).ids, np.int32)


def logits(folder, ids, **options):
    model = TorchModel.load(
        folder, block_tokens=16, threads=1, draft=True, batch_invariant=False, **options
    )
    (sequence,) = sequences(model, [len(ids)])
    sequence.tokens = ids
    return run(model, sequence, [40, len(ids)])


def test_the_engine_computes_what_was_trained(folder, trained, ids):
    found = logits(folder, ids, dtype="float32", kv_dtype="float32")
    with torch.inference_mode():
        out = trained(torch.from_numpy(ids.astype(np.int64))[None], draft=True)
    for mine, theirs in zip(found, (out.logits[0].numpy(), out.drafts[0].numpy()), strict=True):
        assert np.abs(mine - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.peer
def test_the_engine_computes_what_transformers_does(folder, trained, ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = trained.shape.config() | {"torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {name: value.contiguous() for name, value in export.released(trained)}
    save_file(weights, tmp_path / export.WEIGHTS, metadata={"format": "pt"})
    peer = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    found, _ = logits(folder, ids, dtype="float32", kv_dtype="float32")
    with torch.inference_mode():
        expected = peer(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))


def test_rounded_numbers_cost_little(folder, trained, ids):
    """bfloat16 and FP8 KV, as served; and the text is likely, as it is to who has learned it."""
    served, drafted = logits(folder, ids, dtype="bfloat16", kv_dtype="fp8_e4m3")
    with torch.inference_mode():
        exact = trained(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    bits = {
        name: nats(found, ids) / math.log(2) / len(TEXT)
        for name, found in (("served", served), ("exact", exact), ("drafted", drafted))
    }
    assert bits["exact"] < 1.8
    assert abs(bits["served"] - bits["exact"]) < 0.03
    assert bits["drafted"] < bits["exact"] + 0.6


def nats(found: np.ndarray, ids: np.ndarray) -> float:
    """Of the whole text."""
    chosen = torch.from_numpy(found).log_softmax(-1)[np.arange(len(ids) - 1), ids[1:]]
    return -float(chosen.sum())
