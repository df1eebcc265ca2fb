"""One layer of latent attention over a pool, rows that are always the same, and its reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvtransfer import codecs
from kvtransfer.layout import mla_layout
from services.engine.torch.kernels import latent_steps
from services.engine.torch.kernels.batch import Batch, Limits, plan
from services.engine.torch.kernels.latent_steps import LatentShape, LatentSteps

POSITIONS = 2048
# What the pool holds before anything is written: not a number, in every kind.
FILL = 0xFF


def shape(heads=4, latent=64, rope=16, nope=32, value=32, interleaved=True):
    scale = 1.3 / (nope + rope) ** 0.5
    return LatentShape(heads, latent, rope, nope, value, scale, 1e-6, interleaved)


def layout_of(given, kv_dtype, block_tokens, layers=2):
    return mla_layout(
        "m",
        layers=layers,
        dtype=kv_dtype,
        block_tokens=block_tokens,
        latent=given.latent,
        rope=given.rope,
        scale_values=min(128, given.latent),
    )


def tables(rope):
    angles = np.arange(POSITIONS)[:, None] / 100 ** (np.arange(0, rope, 2) / rope)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass
class Sequence:
    """Rows of kv and q for its positions, where its blocks are, and how many rows are done."""

    kv: torch.Tensor
    q: torch.Tensor
    table: np.ndarray
    done: int = 0


class Layer:
    """The second of two layers."""

    LAYER = 1

    def __init__(self, given, kv_dtype="fp8_e4m3", dtype=torch.bfloat16, *, block_tokens=8,
                 lengths=(40,), threads=1, seed=0):  # fmt: skip
        random = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=random)

        self.shape, self.dtype = given, dtype
        self.layout = layout_of(given, kv_dtype, block_tokens)
        self.cosines, self.sines = tables(given.rope)
        self.steps = LatentSteps(given, self.layout, dtype, threads, self.cosines, self.sines)
        self.kv_b = (
            normal(given.heads * (given.nope + given.value), given.latent) / given.latent**0.5
        ).to(dtype)
        self.norm = torch.rand(given.latent, generator=random) + 0.5
        self.weights = latent_steps.pack(given, self.kv_b, self.norm)
        needed = [self.layout.blocks_for(length) for length in lengths]
        self.pool = np.full((sum(needed) + 1, self.layout.block_bytes), FILL, np.uint8)
        blocks = np.random.default_rng(seed).permutation(len(self.pool)).astype(np.int32)
        self.sequences = []
        for length, count in zip(lengths, needed, strict=True):
            size = normal(length, 1).exp()
            self.sequences.append(
                Sequence(
                    kv=(size * normal(length, given.latent + given.rope)).to(dtype),
                    q=normal(length, given.heads * (given.nope + given.rope)).to(dtype),
                    table=blocks[:count],
                )
            )
            blocks = blocks[count:]

    def restart(self):
        self.pool[:] = FILL
        for sequence in self.sequences:
            sequence.done = 0

    def step(self, counts, unwritten=0):
        """The next counts[i] rows of sequence i, 0 for none; their outputs, float64, one by one.

        unwritten: the first rows of each are not written.
        """
        chosen = [(s, n) for s, n in zip(self.sequences, counts, strict=True) if n]
        positions = [np.arange(s.done, s.done + n) for s, n in chosen]
        width = max(len(s.table) for s, _ in chosen)
        block_tables = np.full((len(chosen), width), -1, np.int32)
        for row, (sequence, _) in zip(block_tables, chosen, strict=True):
            row[: len(sequence.table)] = sequence.table
        starts = np.cumsum([0, *(n for _, n in chosen)])
        batch = Batch(
            token_ids=np.zeros(starts[-1], np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            query_starts=starts.astype(np.int32),
            block_tables=block_tables,
            logit_rows=np.zeros(0, np.int32),
            fresh=np.array([s.done + unwritten for s, _ in chosen], np.int32),
        )
        limits = Limits(1, POSITIONS, len(self.pool), self.layout.block_tokens)
        kv = torch.cat([s.kv[p] for (s, _), p in zip(chosen, positions, strict=True)])
        q = torch.cat([s.q[p] for (s, _), p in zip(chosen, positions, strict=True)])
        # Parts of a wider product: rows are apart.
        joined = torch.cat([q, kv], dim=1)
        self.steps.begin(plan(batch, limits, 1), self.pool, len(kv))
        self.steps.write(self.LAYER, joined[:, q.shape[1] :], self.weights)
        part = joined[:, : q.shape[1]]
        out = self.steps.attend(self.LAYER, part, self.weights)
        found = out[: len(kv)].double().numpy()
        for sequence, count in chosen:
            sequence.done += count
        return np.split(found, starts[1:-1])

    def stored(self, sequence):
        """Its rows up to `done` as they lie in the pool: component to [rows, width]."""
        found = {}
        for part in self.layout.components:
            start = self.LAYER * self.layout.layer_bytes + self.layout.component_offset(part.name)
            raw = self.pool[sequence.table, start : start + part.nbytes(self.layout.block_tokens)]
            values = np.ascontiguousarray(raw).view(codecs.NUMPY_DTYPES[part.dtype])
            found[part.name] = values.reshape(-1, part.width)[: sequence.done]
        return found

    def keys(self, sequence):
        """Latents and rotary keys float64 as the pool holds them."""
        stored = self.stored(sequence)
        latent, rope = stored["latent"], stored["rope"]
        if "latent_scale" in stored:
            scales = stored["latent_scale"]
            codes = latent.reshape(*scales.shape, -1)
            latent = codecs.fp8_dequantize(codes, scales[..., None]).reshape(latent.shape)
        elif latent.dtype == np.uint16:
            latent = codecs.bf16_decode(latent)
        if rope.dtype == np.uint16:
            rope = codecs.bf16_decode(rope)
        return latent.astype(np.float64), rope.astype(np.float64)

    def exact_keys(self, sequence):
        """What the pool would hold if nothing were rounded."""
        kv = sequence.kv[: sequence.done].double().numpy()
        latent, rope = kv[:, : self.shape.latent], kv[:, self.shape.latent :]
        rms = np.sqrt((latent**2).mean(-1, keepdims=True) + self.shape.epsilon)
        return latent / rms * self.norm.double().numpy(), self.rotated(rope, np.arange(len(rope)))

    def rotated(self, x, positions):
        """x [rows, rope] at these positions."""
        cosines, sines = (t[positions].astype(np.float64) for t in (self.cosines, self.sines))
        half = self.shape.rope // 2
        interleaved = self.shape.interleaved
        first = slice(0, None, 2) if interleaved else slice(0, half)
        second = slice(1, None, 2) if interleaved else slice(half, None)
        found = np.empty_like(x)
        found[..., first] = x[..., first] * cosines - x[..., second] * sines
        found[..., second] = x[..., second] * cosines + x[..., first] * sines
        return found

    def reference(self, sequence):
        """Outputs of all its rows up to `done`, over the pool, in the expanded form, float64."""
        latent, rope = self.keys(sequence)
        given, rows = self.shape, np.arange(sequence.done)
        weights = self.kv_b.double().numpy().reshape(given.heads, -1, given.latent)
        visible = rows[None] <= rows[:, None]
        queries = sequence.q[rows].double().numpy().reshape(len(rows), given.heads, -1)
        outputs = []
        for head in range(given.heads):
            keys = latent @ weights[head, : given.nope].T
            values = latent @ weights[head, given.nope :].T
            turned = self.rotated(queries[:, head, given.nope :], rows)
            scores = queries[:, head, : given.nope] @ keys.T + turned @ rope.T
            scores = np.where(visible, scores * given.softmax_scale, -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(shares / shares.sum(-1, keepdims=True) @ values)
        return np.concatenate(outputs, axis=1)
