"""Import the user's own modules: environments, tasks, controllers, suites."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from o2o.errors import ConfigError


def import_module(name: str) -> ModuleType:
    """Import a module, from the working folder too. Raises `ConfigError` with any exception of its code."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return _run(name, lambda: importlib.import_module(name))


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
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name!r} cannot be imported ({type(error).__name__}: {reason})") from error
