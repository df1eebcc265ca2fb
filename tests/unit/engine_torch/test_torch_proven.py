"""Rules kept on disk: found again, and never for something else."""

from __future__ import annotations

import json

import pytest
import torch

from services.engine.torch import numerics, proven
from services.engine.torch.kernels.linear import Linear
from services.engine.torch.numerics import RowRule, choose_rules
from services.engine.torch.proven import Proven, identity, machine

CPUINFO = "processor\t: 0\nmodel name\t: A\ncpu MHz\t: {mhz}\nflags\t: fma avx2\n\nprocessor\t: 1\n"


@pytest.fixture
def linear():
    return Linear(torch.randn(48, 64), None, packed=False, most_rows=16)


@pytest.fixture
def probed(monkeypatch):
    """Layers that were probed."""
    found = []
    choose = numerics.choose_rule

    def noted(linear, dtype):
        found.append((linear.inputs, linear.outputs))
        return choose(linear, dtype)

    monkeypatch.setattr(numerics, "choose_rule", noted)
    return found


def test_a_shape_is_probed_once(tmp_path, linear, probed):
    first = choose_rules([linear], torch.float32, Proven(tmp_path, "a"))
    again = choose_rules([linear], torch.float32, Proven(tmp_path, "a"))
    assert probed == [(64, 48)]
    assert str(first) == str(again)
    choose_rules([linear], torch.float32, Proven(tmp_path, "b"))
    choose_rules([linear], torch.float32)
    wider = Linear(torch.randn(48, 64), None, packed=False, most_rows=32)
    choose_rules([wider], torch.float32, Proven(tmp_path, "a"))
    assert probed == 4 * [(64, 48)]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"64x48, 16 rows": [1, 1]}',
        '{"64x48, 16 rows": [3, 1, 0]}',
        '{"64x48, 16 rows": [true, 1, 0]}',
        '{"64x48, 16 rows": "1"}',
    ],
)
def test_a_damaged_file_is_no_proof(tmp_path, linear, probed, content):
    (tmp_path / "rules-a.json").write_text(content)
    choose_rules([linear], torch.float32, Proven(tmp_path, "a"))
    assert len(probed) == 1
    kept = json.loads((tmp_path / "rules-a.json").read_text())
    assert RowRule(*kept["64x48, 16 rows"]) in numerics.RULES


def test_what_another_process_kept_meanwhile_stays(tmp_path):
    one, other = Proven(tmp_path, "a"), Proven(tmp_path, "a")
    one.put({"x": (1, 1, 0)})
    other.put({"y": (2, 1, 0)})
    found = Proven(tmp_path, "a")
    assert (found.get("x", 3), found.get("y", 3)) == ((1, 1, 0), (2, 1, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["rules-a.json"]


def test_a_folder_that_takes_nothing_is_only_slower(tmp_path, linear, probed, caplog):
    choose_rules([linear], torch.float32, Proven(tmp_path / "missing", "a"))
    assert len(probed) == 1
    assert "probes again" in caplog.text


def test_a_file_is_for_one_machine_library_and_way_to_compute(monkeypatch):
    def name(threads=1, dtype=torch.float32, **environ):
        return identity(threads=threads, dtype=dtype, environ=environ)

    names = [
        name(),
        name(threads=2),
        name(dtype=torch.bfloat16),
        name(ONEDNN_MAX_CPU_ISA="AVX2"),
        name(ATEN_CPU_CAPABILITY="default"),
    ]
    monkeypatch.setattr(proven.torch, "__version__", "0")
    names.append(name())
    assert len(set(names)) == len(names)
    assert name(PATH="/bin", HOME="/") == name()
    assert machine(CPUINFO.format(mhz=1)) == machine(CPUINFO.format(mhz=2))
    assert machine(CPUINFO.format(mhz=1)) != machine(CPUINFO.format(mhz=1).replace("fma ", ""))
