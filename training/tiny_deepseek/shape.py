"""The sizes of the model, and the config.json that says them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A DeepSeek V3 configuration (arXiv:2412.19437). Widths in values, contexts in tokens.

    The prediction head for the token after next (MTP) is one more expert layer; `layers` does not
    count it.
    """

    vocabulary: int = 2048
    width: int = 256
    layers: int = 4
    dense_layers: int = 1
    heads: int = 4
    query_rank: int = 128
    latent_rank: int = 128
    nope: int = 64
    rope: int = 32
    value: int = 64
    dense_width: int = 768
    expert_width: int = 128
    experts: int = 16
    shared_experts: int = 1
    chosen: int = 2
    groups: int = 4
    kept_groups: int = 2
    routed_scale: float = 2.5
    epsilon: float = 1e-6
    theta: float = 10000.0
    trained_context: int = 1024
    context_factor: float = 4.0

    @property
    def context(self) -> int:
        """Tokens that YaRN stretches the trained context to."""
        return int(self.trained_context * self.context_factor)

    @property
    def softmax_scale(self) -> float:
        """Of the attention scores. YaRN sharpens them as the context grows (arXiv:2309.00071)."""
        sharper = 0.1 * math.log(self.context_factor) + 1.0 if self.context_factor > 1 else 1.0
        return float((self.nope + self.rope) ** -0.5 * sharper**2)

    def config(self) -> dict[str, Any]:
        """config.json, with the keys of DeepSeek's release; without quantization."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "ep_size": 1,
            "first_k_dense_replace": self.dense_layers,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initializer_range": 0.02,
            "intermediate_size": self.dense_width,
            "kv_lora_rank": self.latent_rank,
            "max_position_embeddings": self.context,
            "moe_intermediate_size": self.expert_width,
            "moe_layer_freq": 1,
            "n_group": self.groups,
            "n_routed_experts": self.experts,
            "n_shared_experts": self.shared_experts,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.chosen,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": self.query_rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "rms_norm_eps": self.epsilon,
            "rope_scaling": {
                "type": "yarn",
                "factor": self.context_factor,
                "original_max_position_embeddings": self.trained_context,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "rope_theta": self.theta,
            "routed_scaling_factor": self.routed_scale,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": self.kept_groups,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "v_head_dim": self.value,
            "vocab_size": self.vocabulary,
        }

    def as_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `Shape(**...)`."""
        return asdict(self)
