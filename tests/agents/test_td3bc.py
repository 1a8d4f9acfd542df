"""TD3+BC: target and actor loss by hand, the scale of Q, the delayed steps, the weight online (arXiv 2106.06860)."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import TD3BC, TD3BCConfig
from o2o.errors import ConfigError
from o2o.types import Batch
from tests.helpers.contract import QUICK
from tests.helpers.tiny import (
    ACTION_DIM,
    constant_critic,
    create,
    largest_difference,
    make_batch,
    moved,
    next_values,
    set_config,
    steps,
    tiny,
)

KEY = jax.random.key(4)
update = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)
CONFIG = tiny(TD3BCConfig(), critic_lr=0.01, tau=0.25)


@jax.jit
def actor_gradient(agent: Any, batch: Batch) -> Any:
    """Return the actor's gradient and metrics on leaves `[rows, ...]`."""
    return jax.grad(agent.actor_loss, has_aux=True)(agent.actor.params, batch, KEY)


def make_agent(**changes: Any) -> Any:
    """Return the agent of key 0 whose targets differ from what they follow."""
    agent = set_config(create(TD3BC, CONFIG), **changes)
    scaled = {name: jax.tree.map(lambda leaf: 0.7 * leaf, getattr(agent, name).params) for name in ("actor", "critic")}
    return agent.replace(target_actor=scaled["actor"], target_critic=scaled["critic"])


def scaled_critic(agent: Any, factor: float) -> Any:
    """Return the agent with critics whose values are `factor` times as large."""
    tree = dict(agent.critic.params["params"])
    tree["output"] = jax.tree.map(lambda leaf: factor * leaf, tree["output"])
    return agent.replace(critic=agent.critic.replace(params={"params": tree}))


def test_next_value_by_hand() -> None:
    """The next value is the lowest target critic's at the target actor's noisy action."""
    agent, batch = make_agent(target_noise=0.6, noise_clip=0.5), make_batch(rows=64)
    mean = agent.actor(batch["next_observations"], params=agent.target_actor)
    noise = 0.6 * jax.random.normal(jax.random.split(KEY)[1], mean.shape)
    assert 0.2 < float(jnp.mean(jnp.abs(noise) > 0.5)) < 0.6
    actions = jnp.clip(mean + jnp.clip(noise, -0.5, 0.5), -1.0, 1.0)
    expected = agent.critic(batch["next_observations"], actions, params=agent.target_critic).min(axis=0)
    np.testing.assert_allclose(next_values(agent, batch, KEY), expected, atol=1e-5)
    quiet = next_values(set_config(agent, target_noise=0.0), batch, KEY)
    expected = agent.critic(batch["next_observations"], mean, params=agent.target_critic).min(axis=0)
    np.testing.assert_allclose(quiet, expected, atol=1e-5)


def test_targets_and_critic_loss() -> None:
    """Targets stop at terminals only, and the loss sums over critics.

    Row 0 is terminal; the others, time limits included, carry the bootstrap term of a constant target of 4.
    """
    agent, batch = make_agent(), make_batch(1)
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 4.0))
    _, info = update(agent, batch)
    targets = np.asarray(batch["rewards"] + 0.99 * 4.0 * batch["masks"])[0]
    assert float(info["critic/target"]) == pytest.approx(targets.mean(), rel=1e-5)
    q = np.asarray(agent.critic(batch["observations"][0], batch["actions"][0]))
    expected = np.square(q - targets).mean(axis=1).sum()
    assert float(info["critic/loss"]) == pytest.approx(expected, rel=1e-4)


def test_actor_loss_by_hand() -> None:
    agent, batch = make_agent(), make_batch()
    loss, info = agent.actor_loss(agent.actor.params, batch, KEY)
    actions = agent.actor(batch["observations"])
    q = np.asarray(agent.critic(batch["observations"], actions))[0]
    distance = np.mean((np.asarray(actions) - np.asarray(batch["actions"])) ** 2)
    assert float(loss) == pytest.approx(-2.5 / np.abs(q).mean() * q.mean() + distance, rel=1e-4)
    assert float(info["actor/mse"]) == pytest.approx(distance, rel=1e-5) and float(info["actor/bc_weight"]) == 1.0


def test_actor_gradient_ignores_q_scale() -> None:
    """The actor's gradient does not depend on the scale of Q.

    Neither for a critic 100 times as large nor a 1000 times as small; the size itself gets no gradient.
    """
    agent, batch = make_agent(), make_batch()
    gradient, info = actor_gradient(agent, batch)
    for factor in (100.0, 1e-3):
        other, scaled = actor_gradient(scaled_critic(agent, factor), batch)
        assert largest_difference(gradient, other) < 1e-4
        assert float(scaled["actor/q_size"]) == pytest.approx(factor * float(info["actor/q_size"]), rel=1e-4)

    def expected(params: Any) -> Any:
        actions = agent.actor(batch["observations"], params=params)
        climb = agent.critic(batch["observations"], actions)[0].mean()
        return -2.5 / info["actor/q_size"] * climb + jnp.mean((actions - batch["actions"]) ** 2)

    assert largest_difference(gradient, jax.grad(expected)(agent.actor.params)) < 1e-5


def test_zero_alpha_is_cloning() -> None:
    """Without its Q term the actor's gradient is that of behaviour cloning."""
    agent, batch = make_agent(alpha=0.0), make_batch()
    cloning = jax.grad(lambda p: jnp.mean((agent.actor(batch["observations"], params=p) - batch["actions"]) ** 2))
    gradient, _ = actor_gradient(agent, batch)
    assert largest_difference(gradient, cloning(agent.actor.params)) < 1e-6


def test_policy_delay() -> None:
    """The actor and both targets move at every second critic step."""
    agent, batch = make_agent(), make_batch(1)
    one, rested = update(agent, batch)
    two, info = update(one, batch)
    assert [steps(one.critic), steps(one.actor), steps(two.critic), steps(two.actor)] == [1, 0, 2, 1]
    assert not moved(one.target_critic, agent.target_critic) and not moved(one.target_actor, agent.target_actor)
    for name in ("critic", "actor"):
        new, old = getattr(two, name).params, getattr(agent, f"target_{name}")
        expected = jax.tree.map(lambda one, two: 0.25 * one + 0.75 * two, new, old)
        assert largest_difference(getattr(two, f"target_{name}"), expected) < 1e-6
    assert float(rested["actor/loss"]) == 0.0
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    loss, _ = one.replace(critic=two.critic).actor_loss(one.actor.params, rows, KEY)
    assert float(info["actor/loss"]) == pytest.approx(2.0 * float(loss), rel=1e-4), "counted twice: it rested before"
    together, info = update(agent, make_batch(4))
    assert (steps(together.critic), steps(together.actor), int(together.updates)) == (4, 2, 4)


def test_targets_get_no_gradient() -> None:
    """No gradient reaches the targets."""
    agent, batch = make_agent(delayed_targets=False), make_batch(1)
    q = lambda target: agent.replace(target_critic=target).update(batch)[1]["critic/loss"]  # noqa: E731
    for leaf in jax.tree.leaves(jax.grad(q)(agent.target_critic)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_exploration_noise() -> None:
    """Only sampled actions have exploration noise."""
    agent = make_agent(exploration_noise=0.1)
    observations = jnp.full((2000, 3), 0.1)
    mode, _ = agent.sample_actions(observations, None, KEY, True)
    np.testing.assert_array_equal(mode, agent.actor(observations))
    noise = np.asarray(agent.sample_actions(observations, None, KEY)[0] - mode)
    assert noise.std() == pytest.approx(0.1, abs=0.01) and abs(noise.mean()) < 0.01


def test_bc_weight_decay() -> None:
    """The weight of cloning falls online only, and stays without a decay."""
    agent, batch = make_agent(bc_decay_steps=4, bc_final=0.2), make_batch(1)
    for _ in range(3):
        agent, _ = update(agent, batch)
    assert float(agent.bc_weight()) == 1.0
    agent = agent.online()
    assert agent.online() is agent and int(agent.updates) == 0 and steps(agent.critic) == 3
    weights = []
    for _ in range(6):
        weights.append(float(agent.bc_weight()))
        agent, _ = update(agent, batch)
    np.testing.assert_allclose(weights, [1.0, 0.8, 0.6, 0.4, 0.2, 0.2], atol=1e-6)
    assert float(set_config(agent, bc_decay_steps=None).bc_weight()) == 1.0


def test_wrong_settings_refused() -> None:
    """Wrong settings are refused."""
    wrong = {
        "alpha": -1.0,
        "bc_final": -0.1,
        "bc_decay_steps": 0,
        "policy_delay": 0,
        "num_critics": 0,
        "noise_clip": -1,
    }
    for field, value in {**wrong, "target_noise": float("nan")}.items():
        with pytest.raises(ConfigError, match=f"TD3BCConfig.{field} is"):
            replace(CONFIG, **{field: value})
    with pytest.raises(ConfigError, match="needs flat float32 observations"):
        TD3BC.create(KEY, {"state": jnp.zeros((1, 3))}, jnp.zeros((1, ACTION_DIM)))  # type: ignore[arg-type]


def test_paper_presets() -> None:
    """The presets follow the paper."""
    preset = TD3BC.preset("locomotion")
    config = preset.config
    assert (config.alpha, config.actor_hidden_dims, config.batch_size, config.actor_lr) == (2.5, (256, 256), 256, 3e-4)
    assert (config.target_noise, config.noise_clip, config.policy_delay, config.tau) == (0.2, 0.5, 2, 0.005)
    assert config.delayed_targets and config.num_critics == 2 and not config.critic_layer_norm
    assert config.online.replay == "append" and preset.reward is None and preset.offline_steps == 1_000_000
    assert TD3BC.preset("locomotion").run["normalize"] and TD3BC.preset("antmaze").reward == (1.0, -1.0)
    assert TD3BC.preset("adroit", "small").config.critic_hidden_dims == (128, 128)
