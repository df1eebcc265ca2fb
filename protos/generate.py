"""Regenerates protos/gen from protos/tandem. `--check` only compares and fails on a difference.

What the HTTP gateway (deploy/gateway) has of them is regenerated, too, where that can be done.

The generator is grpcio-tools, pinned in constraints.txt to a version whose output loads under
protobuf 6.33 and 7, so that a worker can live beside TensorRT-LLM, which needs protobuf 6.
"""

from __future__ import annotations

import filecmp
import importlib.resources
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
GEN = ROOT / "gen"
CANT = 3
"""Exit status of the gateway's build where what it takes can't be had; it says why."""


def run(*arguments: str) -> None:
    """Runs protoc over all our files; google/api is taken from the package that has its Python."""
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tandem").rglob("*.proto"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    annotations = importlib.util.find_spec("google.api.annotations_pb2")
    if annotations is None or annotations.origin is None:
        raise SystemExit("googleapis-common-protos is missing: make install-dev")
    google = Path(annotations.origin).parents[2]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", f"-I{google}", *arguments, *files]):
        raise SystemExit("protoc failed")


def generate(out: Path) -> None:
    """Writes *_pb2.py, *_pb2_grpc.py and their type stubs below `out`."""
    run(
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet,only_async:{out}",
    )


def describe(image: Path) -> None:
    """Writes all messages and services, with their comments and imports: what buf reads."""
    image.parent.mkdir(parents=True, exist_ok=True)
    run("--include_imports", "--include_source_info", f"--descriptor_set_out={image}")


def differences(a: Path, b: Path) -> list[str]:
    """Relative paths that are missing on one side or differ."""
    names = {
        str(p.relative_to(side))
        for side in (a, b)
        for p in side.rglob("*")
        if p.suffix in {".py", ".pyi"}
    }
    return sorted(
        n
        for n in names
        if not (a / n).exists()
        or not (b / n).exists()
        or not filecmp.cmp(a / n, b / n, shallow=False)
    )


def main() -> int:
    """Regenerates, or with --check compares what is checked in with what would be generated.

    With --describe FILE writes a descriptor set instead.
    """
    if "--describe" in sys.argv[1:]:
        describe(Path(sys.argv[sys.argv.index("--describe") + 1]).absolute())
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        if "--check" in sys.argv[1:]:
            stale = differences(fresh, GEN)
            for name in stale:
                print(f"stale generated file: protos/gen/{name}", file=sys.stderr)
            if stale:
                print("run: make protos", file=sys.stderr)
            return 1 if stale else 0
        shutil.rmtree(GEN, ignore_errors=True)
        shutil.copytree(fresh, GEN)
    return for_gateway()


def for_gateway() -> int:
    """Has the gateway's build do its part; the exit status. Without generators for Go: as it is."""
    build = ROOT.parent / "deploy" / "gateway" / "build.py"
    status = subprocess.run([sys.executable, build, "--generate"], check=False).returncode
    return 0 if status == CANT else status


if __name__ == "__main__":
    sys.exit(main())
