"""What the shared types promise."""

import dataclasses
from typing import Any

import jax
import pytest

from o2o.agents import AGENTS
from o2o.types import Agent
from tests.helpers.contract import Case


@pytest.mark.parametrize("name", AGENTS)
def test_structure_tells_agent_class(name: str) -> None:
    """An agent's structure tells its class.

    Of equal structures, `jax.jit` may run the program of one class on the other.
    """
    base: Any = AGENTS[name]
    agent = jax.eval_shape(Case(name, "offline").make, jax.random.key(0))
    parts = {field.name: getattr(agent, field.name) for field in dataclasses.fields(agent)}
    same, derived = base(**parts), type("Derived", (base,), {})(**parts)
    assert isinstance(agent, Agent) and jax.tree.leaves(derived) == jax.tree.leaves(agent) != []
    assert jax.tree.structure(same) == jax.tree.structure(agent) != jax.tree.structure(derived)
