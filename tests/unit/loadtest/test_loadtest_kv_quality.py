"""What rounding KV costs in quality: the figures, on logits that are known and on a small model."""

from __future__ import annotations

import math
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from loadtest import engine_shapes, kv_quality
from loadtest.kv_quality import QualityOptions


def test_figures_of_a_window_are_torchs():
    random = np.random.default_rng(0)
    exact = random.standard_normal((6, 50)).astype(np.float32)
    found = exact + 0.3 * random.standard_normal((6, 50)).astype(np.float32)
    # A constant changes no probability.
    found[2] += 5
    tokens = random.integers(0, 50, 7).astype(np.int32)
    loss, square, variance, divergence, same = kv_quality._compare(exact, found, tokens)
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (exact, found))
    apart = torch.from_numpy(found).double() - torch.from_numpy(exact)
    assert loss == pytest.approx(-q[range(6), tokens[1:]].mean().item())
    assert square == pytest.approx(apart.var(-1, correction=0).mean().item())
    assert variance == pytest.approx(torch.from_numpy(exact).var(-1, correction=0).mean().item())
    assert divergence == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    assert same == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def test_fewer_bytes_cost_more():
    options = QualityOptions(shape="tiny", windows=2, window=40, chunk_tokens=16)
    report = kv_quality.run(options)
    exact, half, small = report.rows
    assert [r.kv_dtype for r in report.rows] == ["float32", "bfloat16", "fp8_e4m3"]
    # 128 latents and 32 rotary values; one scale, and the latter in bfloat16.
    assert [r.token_layer_bytes for r in report.rows] == [640, 320, 128 + 4 + 64]
    assert (exact.logit_error, exact.divergence, exact.same_first) == (0, 0, 1)
    assert 0 < half.logit_error < small.logit_error
    assert 0 < half.divergence < small.divergence
    assert small.perplexity == pytest.approx(exact.perplexity * (1 + small.perplexity_change))
    assert math.isfinite(small.perplexity_error)
    screen = StringIO()
    kv_quality.show(report, Console(file=screen, width=120))
    assert "fp8_e4m3" in screen.getvalue()


def test_refuses_a_text_that_is_too_short(tmp_path):
    folder = engine_shapes.write(engine_shapes.SHAPES["tiny"], tmp_path / "model")
    (tmp_path / "text").write_text("too short")
    options = QualityOptions(path=str(folder), text=str(tmp_path / "text"))
    with pytest.raises(ValueError, match="expected 4096"):
        kv_quality.run(options)
