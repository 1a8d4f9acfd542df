"""Import the user's own modules: environments, tasks, controllers, suites."""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from o2o.errors import ConfigError


def import_module(name: str) -> ModuleType:
    """Import a module, from the working folder too. Raises `ConfigError` with any exception of its code."""
    _search_here()
    return _run(name, lambda: importlib.import_module(name))


def _search_here() -> None:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def origin(code: str) -> str | None:
    """Return the file that `module:name`, `path/file.py:name` or the path of a file leads to; None if there is none.

    Nothing is imported: of a module in a package it is the file of the package.
    """
    where = code.rpartition(":")[0] or code
    if ":" not in code or (where.endswith(".py") and os.path.isfile(where)):
        return os.path.realpath(where) if os.path.isfile(where) else None
    _search_here()
    try:
        found = importlib.util.find_spec(where.partition(".")[0])
    except (ImportError, ValueError):  # no name of a module, or one that was not loaded from a file
        return ""
    if found is None:
        return None
    place = found.origin or next(iter(found.submodule_search_locations or ()), "")
    return os.path.realpath(place) if os.path.exists(place) else place


def source_digest(code: str) -> str | None:
    """Return the sha256 of the file that `origin` finds; None if there is none. What that file imports is not seen."""
    path = Path(origin(code) or "")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a module. Raises `ConfigError` with any exception of its code."""

    def load() -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return _run(str(path), load)


def _run(name: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name!r} cannot be imported ({type(error).__name__}: {reason})") from error
