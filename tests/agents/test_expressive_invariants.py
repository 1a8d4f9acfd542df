"""What the papers of the expressive agents let one expect of their limits: EXPO, residual RL, Q-chunking."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnasium import spaces

from o2o.agents import QC
from o2o.agents.residual import Seen
from o2o.data.spaces import ActionMap
from o2o.rl.windows import chunk_rows
from tests.agents import test_residual
from tests.helpers import toy_expo, toy_qc
from tests.helpers.tiny import OBSERVATION_DIM, create, largest_difference, make_batch

KEY = jax.random.key(5)


def test_expo_tiny_edits() -> None:
    """EXPO with edits of no size is the best of N of its base.

    The scale itself must be positive: ln(scale) is part of the edits' log-density.
    """
    observations = make_batch(rows=32)["observations"]
    best, edited = (
        toy_expo.choose(agent, observations, agent.target_base, KEY)
        for agent in (toy_expo.expo(n_edits=0), toy_expo.expo(edit_scale=1e-12))
    )
    count = toy_expo.N
    np.testing.assert_allclose(edited.candidates[count:], edited.candidates[: toy_expo.EDITS], atol=1e-9)
    np.testing.assert_allclose(edited.scores[:count], best.scores, atol=1e-5)
    np.testing.assert_allclose(edited.actions, best.actions, atol=1e-6)
    assert len(set(np.asarray(best.place).tolist())) > 1


@pytest.mark.parametrize("scale", [0.1, 0.2])
def test_residual_reaches_widened_edge(scale: float) -> None:
    """An extreme base action with a full residual is the edge of the widened range."""
    agent = test_residual.set_config(test_residual.make(), residual_scale=scale)
    bounds = ActionMap.from_space(spaces.Box(-10.0, 10.0, (2,), np.float32))
    actions = np.asarray([[-2.0, 1.0], [4.0, 3.0], [1.0, 2.0]], np.float32)
    fitted = bounds.fitted(actions, agent.config.needs.action_margin)
    base = jnp.asarray(fitted.from_env(actions))
    observed = Seen(jnp.zeros((3, 3)), base, None)
    np.testing.assert_array_equal(agent.combine(observed, scale * jnp.sign(base))[:2], jnp.sign(base[:2]))
    np.testing.assert_array_equal(agent.combine(observed, jnp.zeros_like(base)), base)
    edge = fitted.to_env(agent.combine(observed, scale * jnp.sign(base)))[:2]
    centre, half = np.asarray([1.0, 2.0]), np.asarray([3.0, 1.0])
    np.testing.assert_allclose(edge, np.stack([centre - half * (1 + scale), centre + half * (1 + scale)]), atol=1e-5)


def test_residual_steps_isolated() -> None:
    """The residual's critic step leaves both actors as they are, and its actor step all critics."""
    agent, batch = test_residual.restless(), test_residual.windows()
    stepped, _ = test_residual.critic_step(agent, batch, KEY)
    assert largest_difference(stepped.actor, agent.actor) == 0.0
    assert largest_difference(stepped.target_actor, agent.target_actor) == 0.0
    after, _ = test_residual.actor_step(stepped, batch, KEY)
    assert largest_difference(after.critic, stepped.critic) == 0.0
    assert largest_difference(after.target_critic, stepped.target_critic) == 0.0
    assert largest_difference(after.actor.params, agent.actor.params) > 0.0


class Peak(struct.PyTreeNode):
    """A critic that knows the best chunk."""

    params: jax.Array

    def __call__(self, observations: Any, actions: Any, params: Any = None) -> Any:
        """Return `[1, ...]` values, highest at `params`."""
        best = self.params if params is None else params
        return -jnp.sum(jnp.square(actions - best), axis=-1)[None]


def test_untied_policy_plays_best_chunk() -> None:
    """The one-step policy without a tie to the flow plays the best chunk."""
    best = jnp.asarray([0.5, -0.5, 0.2, -0.7])
    config = replace(toy_qc.DISTILLED, chunk=2, actor_hidden_dims=(32, 32), alpha=0.0, actor_lr=3e-3, flow_steps=1)
    agent = create(QC, config)
    agent = agent.replace(critic=Peak(best))
    batch = toy_qc.windows(np.zeros((64, 2)), np.zeros((64, 2)), np.ones((64, 2)))
    chunks = chunk_rows({**batch, "observations": jnp.zeros_like(batch["observations"])}, 0.99, True)

    def step(agent: Any, key: Any) -> tuple[Any, None]:
        grads = jax.grad(lambda params: agent.policy_loss(params, chunks, key)[0])(agent.one_step.params)
        return agent.replace(one_step=agent.one_step.apply_gradients(grads)), None

    agent = toy_qc.quick(lambda a: jax.lax.scan(step, a, jax.random.split(KEY, 400))[0])(agent)
    noise = jax.random.normal(jax.random.key(1), (200, 4))
    played = np.clip(np.asarray(agent.one_step(jnp.zeros((200, OBSERVATION_DIM)), noise)), -1.0, 1.0)
    assert np.abs(played - np.asarray(best)).mean() < 0.05
