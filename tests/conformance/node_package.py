"""OpenAI's Node package, fetched by npm into a cache folder: nothing of it is in the repository."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "node"
FETCH_SECONDS = 240


def node_folder() -> Path:
    """A folder with node_modules. Skips where there is no Node, or, outside CI, no npm registry."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("OpenAI's Node package is not tested: there is no node and npm on this machine")
    wanted = (HERE / "package.json").read_bytes()
    # XDG's variable, as the caches of models have it.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "node"
    folder = cache / hashlib.sha256(wanted).hexdigest()[:12]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            _fetch(Path(made) / "package")
            try:
                (Path(made) / "package").rename(folder)
            except OSError:  # of two that fetch at once, one comes too late
                assert folder.exists()
    return folder


def _fetch(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(HERE / "package.json", folder)
    flags = ("--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock")
    done = subprocess.run(
        ["npm", "install", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=FETCH_SECONDS,
    )
    if done.returncode and not os.environ.get("CI"):
        pytest.skip(f"OpenAI's Node package can't be fetched: {done.stderr.strip()[-400:]}")
    assert done.returncode == 0, done.stderr
