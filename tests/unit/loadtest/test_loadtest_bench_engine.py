"""The engine's benchmark on a DeepSeek of a few thousand numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("numba")
pytest.importorskip("transformers")

from loadtest import bench_engine, engine_report, engine_shapes
from loadtest.engine_report import DECODE, LLAMA_CPP, PREFILL, TRANSFORMERS, EngineBenchOptions
from loadtest.peer_llamacpp import HOW

OWN = "tandem bfloat16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shape = replace(engine_shapes.SHAPES["tiny"], layers=2, vocabulary=256)
    return engine_shapes.write(shape, tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def report(folder):
    return bench_engine.run(
        EngineBenchOptions(
            model="deepseek",
            path=str(folder),
            threads=1,
            prompts=(24,),
            contexts=(16,),
            batches=(1, 3),
            kv_dtypes=("bfloat16",),
            int4=True,
            llama_cpp=folder,
            steps=2,
            rounds=1,
        )
    )


@pytest.mark.peer
def test_every_place_is_measured_for_everyone(report):
    assert report.subjects == [TRANSFORMERS, OWN]
    places = {(PREFILL, 24, 1), (DECODE, 16, 1), (DECODE, 16, 3)}
    assert {(p.phase, p.context, p.batch) for p in report.points} == places
    assert len(report.points) == 2 * len(places)
    own = [p for p in report.points if p.subject == OWN]
    assert all(p.rate > 0 and p.cpu_ms > 0 and p.ratios[TRANSFORMERS] > 0 for p in own)


@pytest.mark.peer
def test_both_compute_the_same_model(report):
    # bfloat16 at every layer's end, of random weights.
    assert 0 < report.logit_errors[OWN] < 0.05


@pytest.mark.peer
def test_who_can_not_be_measured_is_named_with_the_reason(report):
    assert "GGUF" in report.skipped[LLAMA_CPP]
    assert "experts" in report.skipped["tandem int4"]


@pytest.mark.peer
def test_it_is_shown_written_and_drawn(report, tmp_path, capsys):
    from rich.console import Console

    engine_report.show(report, Console(width=120))
    shown = capsys.readouterr().out
    assert f"{LLAMA_CPP} skipped" in shown
    assert "decode 16 x 3" in shown
    engine_report.write(report, tmp_path / "a" / "numbers.json")
    assert len(json.loads((tmp_path / "a" / "numbers.json").read_text())["points"]) == 6
    if pytest.importorskip("matplotlib"):
        engine_report.draw(report, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_llama_cpp_says_how_to_get_it(tmp_path):
    from loadtest.peer_llamacpp import LlamaCpp, LlamaCppError

    with pytest.raises(LlamaCppError) as caught:
        LlamaCpp(tmp_path, tmp_path / "m.gguf", threads=1, vocabulary=8, longest=8)
    assert HOW in str(caught.value)


def test_a_random_model_has_the_layers_of_released_ones():
    shape = engine_shapes.SHAPES["tiny"]
    names = dict(engine_shapes.matrices(shape))
    assert names["model.layers.0.mlp.gate_proj.weight"] == (512, 256)
    assert names["model.layers.1.mlp.experts.15.down_proj.weight"] == (256, 128)
    assert names["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (160, 256)
    assert not any(name.startswith("model.layers.4.") for name in names)
