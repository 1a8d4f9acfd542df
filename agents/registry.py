"""The names of the agents."""

from collections.abc import Callable
from typing import TypeVar

from o2o.errors import ConfigError
from o2o.types import Agent

AGENTS: dict[str, type] = {}
"""Agent classes by the name that the command line knows."""

Kind = TypeVar("Kind", bound=type[Agent])


def register_agent(name: str) -> Callable[[Kind], Kind]:
    """Return a decorator that makes an agent class of one's own known by `name`, as the toolkit's own are.

    A run of it keeps `module:Class` in its config.json, so that any process can open it again. Raises `ConfigError` if
    the name is taken by another class.
    """

    def register(kind: Kind) -> Kind:
        known = AGENTS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ConfigError(
                f"agent name {name!r} is taken by {known.__module__}:{known.__qualname__}; choose another"
            )
        if not name.isidentifier():
            raise ConfigError(f"agent name {name!r} is no identifier, such as my_agent")
        AGENTS[name] = kind
        return kind

    return register
