"""A cache on disk for arrays that take long to make. Damaged or missing entries are made again."""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from o2o.files import cache_dir, write_atomically

Arrays = dict[str, np.ndarray]


def cached(
    key: Any, make: Callable[[], Arrays], prefix: str = "", fits: Callable[[Arrays], bool] = lambda _: True
) -> Arrays:
    """Return the arrays stored under `key`; if there are none, or `fits` refuses them, store and return `make()`.

    `key` is a JSON-able value of everything that decides the arrays; `prefix` starts the file's name. A cache that
    cannot be written is no error.
    """
    path = cache_dir() / f"{prefix}{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(path) as stored:
            found = {name: stored[name] for name in stored.files}
        if fits(found):
            return found
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        pass
    arrays = make()
    with contextlib.suppress(OSError):  # such as a full disk: the next call makes the arrays again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **arrays))  # pyright: ignore[reportArgumentType]
    return arrays
