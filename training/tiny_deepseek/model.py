"""DeepSeek V3 for training: MLA in its expanded form, experts in runs of rows, the MTP module.

Names of modules are those of the release, so that a checkpoint needs little renaming; only the
routed experts are kept stacked, one tensor for all of a layer's gate, up or down projections.
Matrices run in bfloat16 where the caller autocasts; residuals, norms and routing are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.tiny_deepseek.shape import Shape

EMBEDDING_STD = 0.7
RESIDUAL_GAIN = 0.1
"""The two starting scales: with an embedding of 0.02 and full outputs, the loss sticks at 4.4."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """logits, drafts: [batch, tokens, vocabulary], both of the next token.

    A draft's row knows the model's hidden state only up to the token before it.
    loads: of each expert layer, MTP's last: rows that chose each expert, [experts].
    """

    logits: Tensor
    drafts: Tensor | None
    loads: list[Tensor]


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] -> the same in float32."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon)


def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A layer without bias; gain is what it does to the size of its input."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
    return layer


def rotary(shape: Shape, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotations, [tokens, rope / 2], by YaRN (arXiv:2309.00071).

    Pairs that turn often within the trained context keep their frequency, pairs that turn less
    than once are slowed by the factor, those between are mixed.
    """
    half = shape.rope // 2
    fast = shape.theta ** -(torch.arange(half) / half)
    low, high = (
        half * math.log(shape.trained_context / (turns * 2 * math.pi)) / math.log(shape.theta)
        for turns in (32, 1)
    )
    first, last = max(math.floor(low), 0), min(math.ceil(high), shape.rope - 1)
    slowed = ((torch.arange(half) - first) / max(last - first, 0.001)).clamp(0, 1)
    frequency = fast * (1 - slowed) + fast / shape.context_factor * slowed
    angle = torch.arange(tokens)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., tokens, rope], pairs side by side; the pairs' halves come out apart."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


class Attention(nn.Module):
    """Multi-head latent attention; keys and values are expanded from the latent."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, heads = shape, shape.heads
        self.q_a_proj = linear(shape.width, shape.query_rank)
        self.q_a_layernorm = Norm(shape.query_rank, shape.epsilon)
        self.q_b_proj = linear(shape.query_rank, heads * (shape.nope + shape.rope))
        self.kv_a_proj_with_mqa = linear(shape.width, shape.latent_rank + shape.rope)
        self.kv_a_layernorm = Norm(shape.latent_rank, shape.epsilon)
        self.kv_b_proj = linear(shape.latent_rank, heads * (shape.nope + shape.value))
        self.o_proj = linear(heads * shape.value, shape.width, RESIDUAL_GAIN)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x: [batch, tokens, width]; mask: [tokens, tokens], added to the scores."""
        shape, (batch, tokens, _) = self.shape, x.shape
        per_head = (batch, tokens, shape.heads, -1)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(per_head).transpose(1, 2)
        q_nope, q_rope = q.split([shape.nope, shape.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([shape.latent_rank, shape.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(per_head).transpose(1, 2)
        k_nope, v = kv.split([shape.nope, shape.value], dim=-1)
        q_rope = rotate(q_rope, *turns).to(q.dtype)
        k_rope = rotate(k_rope[:, None], *turns).to(q.dtype).expand(-1, shape.heads, -1, -1)
        q = torch.cat([q_nope, q_rope], dim=-1) * shape.softmax_scale
        k = torch.cat([k_nope, k_rope], dim=-1)
        # In one piece: scaled_dot_product_attention is slower on a CPU, with its backward pass.
        weights = (q @ k.transpose(-1, -2) + mask.to(q.dtype)).softmax(-1)
        out: Tensor = self.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return out


class DenseLayer(nn.Module):
    """A gated linear unit: the dense layers' and the shared expert's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = linear(width, hidden)
        self.up_proj = linear(width, hidden)
        self.down_proj = linear(hidden, width, RESIDUAL_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    """Sigmoid scores; a bias that only the choice sees; the choice within the best groups.

    The bias is no parameter: `balance` moves it after each step towards even load, and no loss
    asks for balance (arXiv:2408.15664).
    """

    e_score_correction_bias: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.randn(shape.experts, shape.width) * shape.width**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [rows, width] -> ids and weights of the chosen experts, each [rows, chosen]."""
        shape = self.shape
        with torch.autocast("cpu", enabled=False):
            scores = functional.linear(x.float(), self.weight).sigmoid()
        with torch.no_grad():
            biased = (scores + self.e_score_correction_bias).view(len(x), shape.groups, -1)
            by_group = biased.topk(2, dim=-1).values.sum(-1)
            kept = by_group.topk(shape.kept_groups, dim=-1).indices
            open_groups = torch.zeros_like(by_group, dtype=torch.bool).scatter_(1, kept, True)
            biased = biased.masked_fill(~open_groups[..., None], -torch.inf)
            ids = biased.flatten(1).topk(shape.chosen, dim=-1).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * shape.routed_scale
        return ids, weights

    @torch.no_grad()
    def balance(self, load: Tensor, rate: float) -> None:
        """load: rows that chose each expert in the last step; rate: how far the bias moves."""
        load = load.float()
        self.e_score_correction_bias += rate * (load.mean() - load).sign()


class Experts(nn.Module):
    """A layer's routed experts and the shared one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        up = (shape.experts, shape.expert_width, shape.width)
        down = (shape.experts, shape.width, shape.expert_width)
        self.gate = Router(shape)
        self.gates = nn.Parameter(torch.randn(up) * shape.width**-0.5)
        self.ups = nn.Parameter(torch.randn(up) * shape.width**-0.5)
        self.downs = nn.Parameter(torch.randn(down) * RESIDUAL_GAIN * shape.expert_width**-0.5)
        self.shared_experts = DenseLayer(shape.width, shape.expert_width * shape.shared_experts)

    def forward(self, x: Tensor, loads: list[Tensor]) -> Tensor:
        """x: [batch, tokens, width]. Appends this layer's load to `loads`."""
        rows = x.flatten(0, 1)
        ids, weights = self.gate(rows)
        experts = len(self.gates)
        load = ids.flatten().bincount(minlength=experts)
        loads.append(load)
        order = ids.flatten().argsort(stable=True)
        source = order // ids.shape[1]
        # Slices of a stack would each cost a gradient of the whole stack: unbind costs one.
        stacks = zip(self.gates.unbind(), self.ups.unbind(), self.downs.unbind(), strict=True)
        runs = torch.split(rows[source], load.tolist())
        out = torch.cat(
            [
                functional.linear(
                    functional.silu(functional.linear(run, gate)) * functional.linear(run, up), down
                )
                for run, (gate, up, down) in zip(runs, stacks, strict=True)
            ]
        )
        out = out.float() * weights.flatten()[order, None]
        routed = torch.zeros_like(rows).index_add(0, source, out)
        shared: Tensor = self.shared_experts(x)
        return routed.view_as(x) + shared


class Decoder(nn.Module):
    """One layer."""

    def __init__(self, shape: Shape, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.width, shape.epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.width, shape.epsilon)
        self.mlp = DenseLayer(shape.width, shape.dense_width) if dense else Experts(shape)

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor, loads: list[Tensor]
    ) -> Tensor:
        """As Attention and Experts take them."""
        x = x + self.self_attn(self.input_layernorm(x), turns, mask)
        y = self.post_attention_layernorm(x)
        added: Tensor = self.mlp(y, loads) if isinstance(self.mlp, Experts) else self.mlp(y)
        return x + added


class Draft(nn.Module):
    """The MTP module: row j takes the hidden state of j-1 and the token at j, and predicts j+1.

    Zeros stand for the hidden state before row 0.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.enorm = Norm(shape.width, shape.epsilon)
        self.hnorm = Norm(shape.width, shape.epsilon)
        self.eh_proj = linear(2 * shape.width, shape.width)
        self.layer = Decoder(shape, dense=False)
        self.norm = Norm(shape.width, shape.epsilon)

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor,
        loads: list[Tensor],
    ) -> Tensor:
        """hidden: after the model's last norm; embedded: of the tokens at the same places."""
        before = functional.pad(self.hnorm(hidden)[:, :-1], (0, 0, 1, 0))
        joined = torch.cat([self.enorm(embedded), before], dim=-1)
        out: Tensor = self.norm(self.layer(self.eh_proj(joined).float(), turns, mask, loads))
        return out


class TinyDeepseek(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        nn.init.normal_(self.embed_tokens.weight, std=EMBEDDING_STD)
        self.layers = nn.ModuleList(
            Decoder(shape, dense=i < shape.dense_layers) for i in range(shape.layers)
        )
        self.norm = Norm(shape.width, shape.epsilon)
        self.lm_head = linear(shape.width, shape.vocabulary, gain=0.1)
        self.draft = Draft(shape)

    def forward(self, ids: Tensor, draft: bool = False) -> Outputs:
        """ids: [batch, tokens]; draft: with drafts."""
        tokens = ids.shape[1]
        turns = rotary(self.shape, tokens)
        mask = torch.full((tokens, tokens), -torch.inf).triu(1)
        loads: list[Tensor] = []
        x = embedded = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, turns, mask, loads)
        hidden = self.norm(x)
        drafts = None
        if draft:
            drafts = self.lm_head(self.draft(hidden, embedded, turns, mask, loads))
        return Outputs(self.lm_head(hidden), drafts, loads)

    def routers(self) -> list[Router]:
        """In the order of `Outputs.loads`."""
        layers = [*self.layers, self.draft.layer]
        return [x.mlp.gate for x in layers if isinstance(x, Decoder) and isinstance(x.mlp, Experts)]
