"""Arrays that take long to make, kept in the user's cache folder; what is damaged or cannot be written is made anew."""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def cache_dir() -> Path:
    """Return O2O_CACHE, or `o2o` in the user's cache folder."""
    if os.environ.get("O2O_CACHE"):
        return Path(os.environ["O2O_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "o2o"


def cached(
    key: Any, make: Callable[[], Arrays], prefix: str = "", fits: Callable[[Arrays], bool] = lambda _: True
) -> Arrays:
    """Return the arrays kept under `key` (JSON-able: all that decides them) if they are there and fit, else `make()`.

    An entry appears whole or not at all.
    """
    path = cache_dir() / f"{prefix}{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(path) as stored:
            found = {name: stored[name] for name in stored.files}
        if fits(found):
            return found
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        pass
    arrays, scratch = make(), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            scratch = Path(file.name)
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(scratch, path)
    except OSError:
        pass
    finally:
        if scratch is not None:
            with contextlib.suppress(OSError):
                scratch.unlink()
    return arrays
