"""Base policies that are Python code: a callable, a class, an object with `act`, or the name of one."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from o2o.data.datasets import Dataset
from o2o.data.rollout import Controller
from o2o.data.spaces import ObservationSpec
from o2o.errors import ConfigError
from o2o.policies.base import BasePolicy
from o2o.user_code import import_module, run_file


def python_policy(spec: Any) -> "PythonPolicy":
    """Return the base policy of a Python object, or of a name `module:name` or `path/file.py:name`.

    A function maps the environment's own observation (float32, without the entries that o2o leaves out) to an action
    `[*shape]` in the environment's units, or to a chunk `[H, *shape]`. A class, or a function without arguments, makes
    such a function or an object with `act`; every environment gets one of its own. `reset(seed)` or `reset()`, if there
    is one, is called in every episode; `interrupt()`, if there is one, after a step that a human took over.
    Raises `ConfigError` for a name that leads nowhere.
    """
    if isinstance(spec, str):
        return PythonPolicy(spec, None, target=named(spec))
    return PythonPolicy(getattr(spec, "__name__", type(spec).__name__), None, target=spec)


def named(text: str, what: str = "base") -> Any:
    """Return the object of `module:name` or `path/file.py:name`; the working folder is searched for modules too.

    Raises `ConfigError`, which calls it `what`, for a name that leads to nothing that can act.
    """
    where, _, name = text.rpartition(":")
    try:
        module = run_file(Path(where)) if where.endswith(".py") else import_module(where)
    except ConfigError as error:
        raise ConfigError(f"{what} {text!r}: {error}") from error
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found) and not hasattr(found, "act"):
        raise ConfigError(f"{what} {text!r}: {where} has no callable {name!r}")
    return found


@dataclass(frozen=True, eq=False)
class PythonPolicy(BasePolicy):
    """A base policy that is Python code."""

    target: Any

    def controller(self, data: Dataset) -> Controller:
        """Return a function as it is, or an object of its own for an environment.

        Raises `ConfigError` if the object cannot be copied or cannot act.
        """
        controller = self.target
        if inspect.isclass(controller) or (not hasattr(controller, "reset") and _needs_nothing(controller)):
            controller = controller()
        elif hasattr(controller, "reset"):
            try:
                controller = copy.deepcopy(controller)
            except Exception as error:
                raise ConfigError(
                    f"base {self.name} cannot be copied ({type(error).__name__}: {error}), and each environment needs "
                    "one of its own: give a class, or a function that makes it"
                ) from error
        act = getattr(controller, "act", controller)
        if not callable(act):
            raise ConfigError(f"base {self.name} made {controller!r}, which can neither be called nor has `act`")
        begin, interrupt = (getattr(controller, name, None) for name in ("reset", "interrupt"))
        return PythonController(act, begin, interrupt, data.observation_spec)


def _needs_nothing(function: Any) -> bool:
    """Return whether a callable takes no positional argument: then it makes the controller."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return not any(p.kind in (*positional, inspect.Parameter.VAR_POSITIONAL) for p in parameters)


@dataclass
class PythonController:
    """A Python controller at work."""

    function: Callable[[Any], Any]
    on_reset: Callable[..., Any] | None
    on_interrupt: Callable[[], Any] | None
    spec: ObservationSpec

    def reset(self, seed: int) -> None:
        """Call the controller's `reset(seed)`, or its `reset()` if it takes no argument."""
        if self.on_reset is not None:
            self.on_reset(*(() if _needs_nothing(self.on_reset) else (seed,)))

    def interrupt(self) -> None:
        """Call the controller's `interrupt()`."""
        if self.on_interrupt is not None:
            self.on_interrupt()

    def act(self, observation: Any) -> Any:
        """Ask the controller."""
        return self.function(self.spec.unflatten(observation))
