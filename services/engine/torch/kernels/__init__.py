"""The engine's own kernels, compiled by Numba on the machine they run on.

Compiled code is kept in the user's cache folder, in a folder named by a digest of the sources:
Numba itself looks only at the file of the function it compiles, and would miss a change in
another. NUMBA_CACHE_DIR, Numba's own variable, chooses another folder. Where no folder can be
written the code is compiled anew by each process.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from numba import __version__ as numba_version
from numba.core import config


def _sources() -> str:
    """Digest of every file here and of Numba's version."""
    digest = hashlib.blake2b(numba_version.encode(), digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cache_folder() -> Path:
    base = config.CACHE_DIR or str(Path.home() / ".cache" / "tandem" / "kernels")
    folder = Path(base) / _sources()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="tandem-kernels-"))


# Numba reads this when a function is decorated: so before any kernel module is imported.
config.CACHE_DIR = str(_cache_folder())
