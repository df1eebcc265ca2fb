"""The prefix index beside Dynamo's, in the same run: `python -m loadtest.bench_index`.

Dynamo's RadixTree comes in a wheel of its own, which wants a virtual environment of its own:

    python -m venv /tmp/dynamo && /tmp/dynamo/bin/pip install ai-dynamo-runtime==1.6.1
    python -m loadtest.bench_index --peer-python /tmp/dynamo/bin/python

Each is measured in processes that hold nothing else, in turn; figures are medians of some rounds.
Both are given the same, as it comes over their wires: protobuf messages of 16-byte keys here, JSON
with two 64-bit hashes a block there. Dynamo's tree has a thread of its own that its callers wait
for: so throughput is told for each second of the clock, and for each second of CPU time of all
threads, which says more on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.index_subject import LENGTHS, SMALL_MESSAGE

PEER = "dynamo"
HOW = "how to install it: python -m loadtest.bench_index --help"

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, and whether more of it is better."""

    name: str
    key: str
    unit: str
    more: bool = False

    def ratio(self, ours: Figures, peers: Figures) -> float:
        """How many times better ours is."""
        a, b = ours[self.key], peers[self.key]
        return a / b if self.more else b / a


def rows(block_tokens: int) -> Iterator[Row]:
    """What is reported for one size of blocks."""
    whole = 4096 // block_tokens
    yield Row("memory a block", "bytes_per_block", "B")
    for key, name in (
        ("store", f"stored, {whole} blocks a message"),
        ("store_small", f"stored, {SMALL_MESSAGE} blocks a message"),
        ("remove", f"removed, {whole // 2} blocks a message"),
    ):
        yield Row(name, f"{key}.per_wall_s", "/s", more=True)
        yield Row(f"{name}, CPU time", f"{key}.per_cpu_s", "/s", more=True)
    for kind, what in (
        ("whole", "held whole"),
        ("half", "held by half"),
        ("shared", "held whole, its start by many"),
    ):
        for tokens in LENGTHS:
            name = f"find {tokens // 1024}k tokens, {what}"
            yield Row(f"{name}: p50", f"find.{kind}_{tokens}.p50_us", "us")
            yield Row(f"{name}: p99", f"find.{kind}_{tokens}.p99_us", "us")
            yield Row(f"{name}: CPU", f"find.{kind}_{tokens}.cpu_us", "us")
    yield Row("a worker of 64 dropped", "drop_worker_ms", "ms")


def flatten(result: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Nested figures under dotted names."""
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)):
            yield prefix + key, float(value)


def middle(results: Sequence[Figures]) -> dict[str, float]:
    """The median of each figure."""
    return {key: statistics.median(each[key] for each in results) for key in results[0]}


def measure(python: str, subject: str, blocks: int, block_tokens: int) -> dict[str, float]:
    """Runs one subject once, in a process of its own."""
    command = [python, "-m", "loadtest.index_subject", subject]
    command += ["--blocks", str(blocks), "--block-tokens", str(block_tokens)]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)} if subject == PEER else None
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{subject} failed in {python}:\n{done.stderr.strip()}\n{HOW}")
    return dict(flatten(json.loads(done.stdout.splitlines()[-1])))


def table(block_tokens: int, ours: Figures, peers: Figures | None) -> Iterator[str]:
    """Lines of a table."""
    yield f"{block_tokens}-token blocks; {ours['blocks']:,.0f} of them"
    yield f"  {'':52} {'tandem':>12} {'dynamo':>12} {'better by':>10}"
    for row in rows(block_tokens):
        line = f"  {row.name:52} {_show(ours[row.key], row.unit):>12}"
        if peers is not None:
            line += f" {_show(peers[row.key], row.unit):>12} {row.ratio(ours, peers):>9.2f}x"
        yield line


def _show(value: float, unit: str) -> str:
    if unit == "/s":
        return f"{value / 1e6:.2f} M/s"
    return f"{value:.1f} {unit}"


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--block-tokens", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default="", help="Python that has Dynamo's wheel")
    parser.add_argument("--json", type=Path, help="also writes all figures there")
    options = parser.parse_args()
    pythons = {"tandem": sys.executable}
    if options.peer_python:
        pythons[PEER] = options.peer_python
    else:
        print(f"no --peer-python: only tandem is measured; {HOW}", file=sys.stderr)
    report = {}
    for tokens in options.block_tokens:
        results: dict[str, list[dict[str, float]]] = {subject: [] for subject in pythons}
        for _ in range(options.rounds):
            for subject, python in pythons.items():
                results[subject].append(measure(python, subject, options.blocks, tokens))
        found = {subject: middle(each) for subject, each in results.items()}
        report[tokens] = found
        print("\n".join(table(tokens, found["tandem"], found.get(PEER))), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
