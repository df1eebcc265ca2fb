"""The engine's own kernels, compiled by Numba on the machine they run on.

Compiled code is kept in ~/.cache/tandem/kernels (below $XDG_CACHE_HOME, if set), in a folder named
by a digest of the sources: Numba itself looks only at the file of the function it compiles, and
would miss a change in another. NUMBA_CACHE_DIR, Numba's own variable, chooses another folder. Where
nothing can be written, every process compiles for itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numba
from numba.core import config

log = logging.getLogger(__name__)


def _sources() -> str:
    """Digest of every file here and of Numba's version."""
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where compiled kernels are kept; made now. A temporary folder if it can't be."""
    base = environ.get("NUMBA_CACHE_DIR", "")
    if not base:
        cache = environ.get("XDG_CACHE_HOME", "")
        # The XDG specification: a relative path is invalid and to be ignored.
        root = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
        base = str(root / "tandem" / "kernels")
    folder = Path(base) / _sources()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.warning("compiled kernels can't be kept in %s (%s): compiling anew", folder, error)
        return Path(tempfile.mkdtemp(prefix="tandem-kernels-"))


# Numba reads this when a function is decorated: so it is set before any kernel module is imported.
FOLDER = cache_folder(os.environ)
_numba: Any = config
_numba.CACHE_DIR = str(FOLDER)
