"""Typed errors. Each message is one line: what was wrong, where, what was expected, what to do.

The command line prints the message and exits with code 2; Python callers catch `O2OError` or a subclass.
"""

import difflib
from collections.abc import Iterable


class O2OError(Exception):
    """Base of every error that o2o raises on bad input."""


class ConfigError(O2OError, ValueError):
    """A setting that does not exist, or whose value cannot be used."""


class DatasetError(O2OError, ValueError):
    """A dataset that is missing, unreadable, empty or inconsistent."""


class EnvironmentMismatchError(O2OError, ValueError):
    """The spaces of dataset, environment and agent do not match."""


class EnvironmentFaultError(O2OError, RuntimeError):
    """The environment raised, or returned a value that is not finite, or a takeover of the wrong shape."""


class BaseFaultError(EnvironmentFaultError):
    """A base policy raised, took too long, or returned a value that is not finite."""


class RunError(O2OError, RuntimeError):
    """A run folder that exists already, is missing, is of another format, or cannot be written."""


class BusyError(RunError):
    """A run that another process trains now."""


class CheckpointError(O2OError, RuntimeError):
    """A checkpoint that is missing or unreadable, or belongs to an agent of another class or shape."""


class TrustError(O2OError, RuntimeError):
    """A file names code to run that the user neither named nor said to trust."""


class DivergenceError(O2OError, ArithmeticError):
    """The learner diverged: its numbers are no longer finite."""


def suggest(name: str, known: Iterable[str], otherwise: str | None = None, count: int = 1) -> str:
    """Return a hint for an unknown name: "did you mean 'wsrl'?" with up to `count` close names.

    If no known name is close, return `otherwise`; by default that lists the known names: "there are bc, iql".
    """
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, names, n=count)
    if close:
        return f"did you mean {', '.join(map(repr, close))}?"
    return f"there are {', '.join(names)}" if otherwise is None else otherwise
