"""The engine against Hugging Face transformers on the same weights, family by family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.engine.torch.model import Batch, TorchModel
from tests.unit.engine_torch.torch_models import advance, sequences

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 640,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 32}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}
DEEPSEEK = {
    **COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
FAMILIES = {
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "deepseek, queries at once, biases": (
        "DeepseekV3",
        {**DEEPSEEK, "q_lora_rank": None, "attention_bias": True},
    ),
    "deepseek, one group, no shared sum": (
        "DeepseekV3",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "deepseek, yarn": (
        "DeepseekV3",
        {**DEEPSEEK, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "deepseek, halves are rotated": ("DeepseekV3", {**DEEPSEEK, "rope_interleave": False}),
    "qwen2": ("Qwen2", {**GROUPED, "hidden_size": 128, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", GROUPED),
    "qwen3, yarn": ("Qwen3", {**GROUPED, "rope_parameters": YARN}),
    "qwen3 moe": (
        "Qwen3Moe",
        {**GROUPED, **EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "qwen2 moe": (
        "Qwen2Moe",
        {
            **GROUPED,
            **EXPERTS,
            "hidden_size": 128,
            "shared_expert_intermediate_size": 80,
            "decoder_sparse_step": 2,
        },
    ),
}


def peer(name):
    """A random model, large enough for attention and router to have opinions."""
    family, shape = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1 if "embed" in key else 1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.normal_("norm" in key, 0.2)
        for key, bias in model.named_buffers():
            if "correction" in key:
                bias.normal_(0, 0.1)
    return model


@pytest.mark.peer
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, name):
    theirs = peer(name)
    theirs.save_pretrained(tmp_path)
    model = TorchModel.load(tmp_path, dtype="float32", kv_dtype="float32", threads=1)
    (sequence,) = sequences(model, [200])
    found = np.concatenate([advance(model, [(sequence, n)])[0] for n in (70, 1, 129)])
    with torch.inference_mode():
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
        expected = theirs(ids).logits[0].numpy()
    assert np.abs(found - expected).max() < 3e-5 * np.abs(expected).max()
    tokens = greedy(model, sequence.tokens[:20], 24)
    with torch.inference_mode():
        # The peer checks our tokens in one pass: it must choose every one of them itself.
        ids = torch.tensor([[*sequence.tokens[:20].tolist(), *tokens[:-1]]])
        assert theirs(ids).logits[0, 19:].argmax(-1).tolist() == tokens


def greedy(model, prompt, count):
    """`count` tokens after a prompt, token by token."""
    blocks = model.layout.blocks_for(len(prompt) + count)
    model.bind(np.zeros((blocks, model.layout.block_bytes), np.uint8))
    row, start, out = prompt, 0, []
    for _ in range(count):
        end = start + len(row)
        logits = model.forward(
            Batch(
                token_ids=np.asarray(row, np.int32),
                positions=np.arange(start, end, dtype=np.int32),
                query_starts=np.array([0, len(row)], np.int32),
                block_tables=np.arange(blocks, dtype=np.int32)[None],
                logit_rows=np.array([len(row) - 1], np.int32),
            )
        )
        out.append(int(logits[0].argmax()))
        row, start = [out[-1]], end
    return out
