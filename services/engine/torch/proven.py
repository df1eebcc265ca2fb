"""Rules found by probing, kept on disk: a probe takes seconds at every start, and finds the same.

What a probe finds depends on the machine, on torch and its libraries, on the threads and on what is
probed. All of it is in the name of the file, so a file never speaks for something else; it lies
beside the compiled kernels, whose folder is named by the sources. Anything wrong with a file means
that there is none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from services.engine.torch import kernels

log = logging.getLogger(__name__)

# Of /proc/cpuinfo: what decides on code, and on the sizes that it works in.
_CPU_KEYS = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags")
# Variables by which oneDNN, MKL, OpenMP and torch are told which code to use.
_PREFIXES = ("ONEDNN_", "DNNL_", "MKL_", "OMP_", "KMP_", "GOMP_", "ATEN_", "TORCH_")


def machine(cpuinfo: str) -> str:
    """The first processor of /proc/cpuinfo, without what changes from minute to minute."""
    first = cpuinfo.partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    known = {key.strip(): value.strip() for key, _, value in pairs}
    return json.dumps({key: known[key] for key in _CPU_KEYS if key in known})


def identity(*, threads: int, dtype: torch.dtype, environ: Mapping[str, str]) -> str:
    """Digest of all that a probe's result depends on, beside shapes and kernels."""
    try:
        cpu = machine(Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        cpu = platform.processor()
    told = sorted((k, v) for k, v in environ.items() if k.startswith(_PREFIXES))
    facts = (
        hashlib.blake2b(Path(__file__).with_name("numerics.py").read_bytes()).hexdigest(),
        cpu,
        platform.machine(),
        torch.__version__,
        torch.__config__.show(),
        torch.backends.cpu.get_cpu_capability(),
        threads,
        str(dtype),
        told,
    )
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


class Proven:
    """What was found for each shape, by its name; numbers only. Other processes may write too."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"rules-{name}.json"
        self._known = self._read()

    @classmethod
    def here(cls, threads: int, dtype: torch.dtype) -> Proven:
        """Of this machine, this process' variables and the folder of compiled kernels."""
        return cls(kernels.FOLDER, identity(threads=threads, dtype=dtype, environ=os.environ))

    def get(self, shape: str, count: int) -> tuple[int, ...] | None:
        """The `count` numbers kept for a shape."""
        found = self._known.get(shape)
        if not isinstance(found, list) or len(found) != count:
            return None
        return tuple(found) if all(type(x) is int and x >= 0 for x in found) else None

    def put(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Keeps what was found, with what others have kept since. A disk may refuse: no harm."""
        if not found:
            return
        self._known = {**self._read(), **{shape: list(rule) for shape, rule in found.items()}}
        try:
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, prefix=".rules-", delete=False
            ) as file:
                json.dump(self._known, file)
            os.replace(file.name, self._path)
        except OSError as error:
            log.warning("%s can't be kept (%s): the next start probes again", self._path, error)

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
