"""Builds the gateway: `make gateway`. Prints the path of the program.

    build.py              build
    build.py --modules    build by go.mod, where a Go module proxy is reached
    build.py --test       the gateway's own tests (go test)
    build.py --generate   write what is generated from the protos: gen/openai, openapi.json
    build.py --check      fail if what is checked in differs from that, or is not gofmt's

Exit status 3: what it takes can't be had on this machine; the reason is on standard error.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.resources
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from openapi import document
from toolchain import Debian, MissingError, cache, debian, go_program, locked

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "out" / "gateway"
PROGRAM = OUT / "tandem-gateway"
MODULE = "tandem/gateway"
PROTO = "tandem/openai/v1/openai.proto"
GENERATED = (
    "gen/openai/openai.pb.go",
    "gen/openai/openai_grpc.pb.go",
    "gen/openai/openai.pb.gw.go",
    "internal/front/openapi.json",
)
CANT = 3


def build(modules: bool) -> Path:
    """Compiles what has changed; the first time takes a minute or two."""
    OUT.mkdir(parents=True, exist_ok=True)
    fresh = OUT / f"tandem-gateway.{os.getpid()}"
    flags = ["-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", str(fresh)]
    try:
        if modules:
            go(["build", "-mod=mod", *flags, "."], cwd=HERE, environment={"GOWORK": "off"})
        else:
            go(["build", *flags, MODULE], cwd=OUT, environment=gopath(debian()))
        # A gateway that runs keeps the file it was started from.
        fresh.replace(PROGRAM)
    finally:
        fresh.unlink(missing_ok=True)
    return PROGRAM


def test(modules: bool) -> None:
    """Runs the tests that stand beside the code."""
    packages = sorted({p.parent.relative_to(HERE).as_posix() for p in HERE.rglob("*_test.go")})
    if modules:
        go(["test", "-mod=mod", *(f"./{p}" for p in packages)], cwd=HERE, environment={})
    else:
        names = [f"{MODULE}/{package}" for package in packages]
        go(["test", "-trimpath", *names], cwd=OUT, environment=gopath(debian()))


def go(arguments: list[str], *, cwd: Path, environment: dict[str, str]) -> None:
    """Runs the Go command. Raises MissingError, CalledProcessError."""
    settings = {
        "CGO_ENABLED": "0",
        "GOCACHE": str(cache() / "go-build"),
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "",
    }
    subprocess.run(
        [go_program(), *arguments],
        cwd=cwd,
        env={**os.environ, **settings, **environment},
        stdout=sys.stderr,  # ours has the program's path alone
        check=True,
    )


def gopath(packages: Debian) -> dict[str, str]:
    """Settings for Go as it was before modules: packages are found below folders."""
    own = OUT / "gopath"
    link = own / "src" / MODULE
    with locked(OUT / "lock"):
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(HERE)
    return {"GO111MODULE": "off", "GOPATH": f"{own}:{packages.libraries}"}


def generate(into: Path) -> None:
    """Writes GENERATED below `into`."""
    programs = debian().programs
    annotations = importlib.util.find_spec("google.api.annotations_pb2")
    if annotations is None or annotations.origin is None:
        raise MissingError("googleapis-common-protos is missing: make install-dev")
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    ours = f"M{PROTO}={MODULE}/gen/openai"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "grpc_tools.protoc"]
        command += [
            f"-I{ROOT / 'protos'}",
            f"-I{well_known}",
            f"-I{Path(annotations.origin).parents[2]}",
        ]
        for plugin in ("go", "go-grpc", "grpc-gateway"):
            command += [f"--{plugin}_out={folder}", f"--{plugin}_opt={ours},module={MODULE}"]
        naming = (
            "json_names_for_fields=false,openapi_naming_strategy=simple,disable_default_errors=true"
        )
        command += [f"--openapiv2_out={folder}", f"--openapiv2_opt={ours},{naming}"]
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        subprocess.run([*command, PROTO], env={**os.environ, "PATH": path}, check=True)
        described = json.loads((Path(folder) / PROTO).with_suffix(".swagger.json").read_text())
        for name in GENERATED[:-1]:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder) / name, into / name)
    page = into / GENERATED[-1]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(json.dumps(document(described), indent=1, ensure_ascii=False) + "\n")


def check() -> int:
    """Compares with what is checked in; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = [
            name
            for name in GENERATED
            if not (HERE / name).exists()
            or not filecmp.cmp(Path(folder) / name, HERE / name, shallow=False)
        ]
    for name in stale:
        print(f"stale generated file: deploy/gateway/{name}", file=sys.stderr)
    if stale:
        print("run: make gateway-protos", file=sys.stderr)
    sources = [str(p) for p in HERE.rglob("*.go")]
    gofmt = [str(go_program().parent / "gofmt"), "-l", *sources]
    untidy = subprocess.run(gofmt, capture_output=True, text=True, check=True).stdout.split()
    for name in untidy:
        print(f"not as gofmt writes it: {name}", file=sys.stderr)
    return 1 if stale or untidy else 0


def main() -> int:
    """Does what it is asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for flag in ("modules", "test", "generate", "check"):
        parser.add_argument(f"--{flag}", action="store_true")
    asked = parser.parse_args()
    try:
        if asked.check:
            return check()
        if asked.generate:
            generate(HERE)
        elif asked.test:
            test(asked.modules)
        else:
            print(build(asked.modules))
    except MissingError as error:
        print(f"the gateway can't be built here: {error}", file=sys.stderr)
        return CANT
    except subprocess.CalledProcessError as error:
        return int(error.returncode) or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
