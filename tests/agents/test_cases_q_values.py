"""`Agent.q_value`: every agent's Q of single actions, and None of those that have none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import AGENTS
from o2o.agents.sac import RLPD, SAC, RLPDConfig, SACConfig
from tests.helpers.contract import ACTION_DIM, CONFIGS, OBSERVATION_DIM, ROWS, observed
from tests.helpers.tiny import constant_critic, create, tiny

WITHOUT = {"bc", "flow_bc", "diffusion_bc", "ppo", "qc", "qam"}


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_shape(name: str) -> None:
    """A value for each row, which does not depend on the ensemble's size; imitation, PPO and chunks have none."""
    if name not in CONFIGS:
        pytest.skip("another test's agent")
    states, actions = jnp.zeros((ROWS, OBSERVATION_DIM)), jnp.zeros((ROWS, ACTION_DIM))

    def value(key: jax.Array) -> Any:
        agent = AGENTS[name].create(key, observed(name, states), actions, CONFIGS[name])
        return agent.q_value(observed(name, states), actions)

    found = jax.eval_shape(value, jax.random.key(0))
    assert (None if found is None else found.shape) == (None if name in WITHOUT else (ROWS,))


@pytest.mark.parametrize(("kind", "config", "expected"), [(SAC, SACConfig(), -3.0), (RLPD, RLPDConfig(), 1.5)])
def test_as_the_actor_sees_it(kind: Any, config: Any, expected: float) -> None:
    """SAC's Q is the least critic's, RLPD's the mean."""
    agent = create(kind, tiny(config, num_critics=2))
    params = constant_critic(constant_critic(agent.critic.params, -3.0, 0), 6.0, 1)
    agent = agent.replace(critic=agent.critic.replace(params=params))
    q = agent.q_value(jnp.ones((4, OBSERVATION_DIM)), jnp.ones((4, ACTION_DIM)))
    np.testing.assert_allclose(q, expected, rtol=1e-6)
