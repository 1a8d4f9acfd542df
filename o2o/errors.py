"""Typed errors. Each message is one line: what was wrong, where, what was expected, what to do.

The command line prints the message and exits with code 2; Python callers catch `O2OError` or a subclass.
"""


class O2OError(Exception):
    """Base of every error that o2o raises on bad input."""


class ConfigError(O2OError, ValueError):
    """A setting that does not exist, or whose value cannot be used."""


class DatasetError(O2OError, ValueError):
    """A dataset that is missing, unreadable, empty or inconsistent."""


class EnvironmentMismatchError(O2OError, ValueError):
    """Spaces of the dataset, environment or agent do not fit each other."""


class EnvironmentFaultError(O2OError, RuntimeError):
    """The environment raised, or returned a value that is not finite or a takeover of another shape."""


class BaseFaultError(EnvironmentFaultError):
    """A base policy raised, took too long, or returned a value that is not finite."""


class RunError(O2OError, RuntimeError):
    """A run folder that exists already, is missing, or cannot be written."""


class CheckpointError(O2OError, RuntimeError):
    """A checkpoint that is missing, unreadable, or belongs to another agent or shape."""


class DivergenceError(O2OError, ArithmeticError):
    """The learner's numbers are not finite any more."""
