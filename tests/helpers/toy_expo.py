"""EXPO at toy size: its config, agents, and compiled methods that its tests share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from o2o.agents import EXPO, EXPOConfig
from o2o.nn.generative import Diffusion, Flow
from tests.helpers.contract import QUICK
from tests.helpers.tiny import ACTION_DIM, OBSERVATION_DIM, ROWS, moved, set_config

KEY = jax.random.key(4)
N, EDITS, MEMBERS = 4, 3, 4
TINY = EXPOConfig(
    base_width=16,
    base_blocks=1,
    edit_hidden_dims=(16, 16),
    critic_hidden_dims=(16, 16),
    num_critics=MEMBERS,
    batch_size=ROWS,
    n_samples=N,
    n_edits=EDITS,
    diffusion=Diffusion(steps=3),
    flow=Flow(steps=3),
    edit_scale=0.3,
)

quick = functools.partial(jax.jit, compiler_options=QUICK)
update = quick(lambda agent, batch: agent.update(batch))
act = quick(lambda agent, observations, rng: agent.sample_actions(observations, None, rng)[0])
choose = quick(lambda agent, observations, params, rng: agent.choose(observations, params, rng))
next_values = quick(lambda agent, observations, rng: agent.next_values(observations, rng))
base_step = quick(lambda agent, batch, rng: agent.base_step(batch, rng))
edit_step = quick(lambda agent, batch, rng: agent.edit_step(batch, rng))
critic_step = quick(lambda agent, batch, rng: agent.critic_step(batch, rng))
members = quick(lambda agent, observations, actions: agent.critic(observations, actions, params=agent.target_critic))


@functools.cache
def fresh(config: EXPOConfig = TINY, observation_dim: int = OBSERVATION_DIM, action_dim: int = ACTION_DIM) -> Any:
    """Return the agent of key 0 before its online phase."""
    shapes = jnp.zeros((1, observation_dim)), jnp.zeros((1, action_dim))
    return quick(lambda key: EXPO.create(key, *shapes, config))(jax.random.key(0))


def expo(**changes: Any) -> Any:
    """Return the agent of key 0 in its online phase, with settings changed that its networks do not depend on."""
    return set_config(fresh(), **changes).online()


def distort(params: Any) -> Any:
    """Return other parameters of the same shapes."""
    return jax.tree.map(lambda leaf: leaf * 1.5 + 0.1, params)


def changed(before: Any, after: Any) -> set[str]:
    """Return what differs between two agents, by name."""
    names = ("base", "target_base", "edit", "critic", "target_critic", "temperature")
    return {name for name in names if moved(getattr(before, name), getattr(after, name))}
