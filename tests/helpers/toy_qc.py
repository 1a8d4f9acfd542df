"""QC at toy size: its configs, compiled methods, and windows for it to learn from."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o2o.agents import QCConfig
from o2o.types import Batch
from tests.helpers.contract import QUICK
from tests.helpers.tiny import ACTION_DIM, OBSERVATION_DIM

H, DISCOUNT = 3, 0.99
BASE = QCConfig(
    chunk=H, actor_hidden_dims=(16, 16), critic_hidden_dims=(16, 16), batch_size=8, flow_steps=3, num_samples=4
)
DISTILLED = replace(BASE, policy="distilled")
KEY = jax.random.key(3)
quick = functools.partial(jax.jit, compiler_options=QUICK)
propose = quick(lambda agent, obs, rng, det: agent.propose(obs, rng, det), static_argnums=3)
flow_chunks = quick(lambda agent, obs, noise: agent.flow_chunks(obs, noise))
update = quick(lambda agent, batch: agent.update(batch))
targets = quick(lambda agent, chunks, rng: agent.targets(chunks, rng))
act = quick(lambda agent, obs, carry, rng, det: agent.sample_actions(obs, carry, rng, det), static_argnums=4)


def windows(rewards: Any, ends: Any, masks: Any, seed: int = 0) -> Batch:
    """Return windows `[B, h]` with random observations and actions, `valid` as the buffers cut it."""
    rewards, ends, masks = (jnp.asarray(x, jnp.float32) for x in (rewards, ends, masks))
    draw = np.random.default_rng(seed).normal
    ended = jnp.cumsum(ends, axis=-1) - ends
    return {
        "observations": jnp.asarray(draw(size=(*ends.shape, OBSERVATION_DIM)), jnp.float32),
        "actions": jnp.tanh(jnp.asarray(draw(size=(*ends.shape, ACTION_DIM)), jnp.float32)),
        "next_observations": jnp.asarray(draw(size=(*ends.shape, OBSERVATION_DIM)), jnp.float32),
        "rewards": rewards,
        "masks": masks,
        "ends": ends,
        "valid": (ended == 0).astype(jnp.float32),
    }


def four_windows() -> Batch:
    """Return a whole window, one over a time limit, one that ends at a terminal, one with a terminal inside."""
    ends = [[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]
    masks = [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 1]]
    return windows([[1.0, 2.0, 4.0]] * 4, ends, masks)


def random_windows(seed: int = 0) -> Batch:
    """Return `[1, 8, h]` windows, all whole."""
    batch = windows(np.random.default_rng(seed).normal(size=(8, H)), np.zeros((8, H)), np.ones((8, H)), seed)
    return jax.tree.map(lambda leaf: leaf[None], batch)
