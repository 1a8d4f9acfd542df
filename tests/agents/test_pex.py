"""PEX: what the switch freezes and begins, the soft choice and its limits, regression to fresh actions (2302.00935)."""

import functools
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import IQL, PEX, IQLConfig, PEXConfig
from o2o.errors import ConfigError
from o2o.rl.losses import advantage_weights
from o2o.types import Batch
from tests.helpers.contract import QUICK
from tests.helpers.tiny import (
    ACTION_DIM,
    OBSERVATION_DIM,
    constant_critic,
    create,
    largest_difference,
    make_batch,
    moved,
    set_config,
    steps,
    tiny,
)

KEY = jax.random.key(6)
update = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)
CONFIG = tiny(PEXConfig(), value_hidden_dims=(16, 16), value_lr=0.05, beta=3.0)
MANY = jnp.asarray(np.random.default_rng(0).normal(size=(4000, OBSERVATION_DIM)), jnp.float32)

switch = jax.jit(lambda agent: agent.online())
choose = jax.jit(lambda agent, observations, rng, randomness: agent.choose(observations, rng, randomness))
actor_gradient = jax.jit(
    lambda agent, batch: jax.grad(agent.actor_loss, has_aux=True)(agent.actor.params, batch, agent.value, KEY)
)


@functools.cache
def pretrained() -> Any:
    """Return the agent after two offline calls."""
    agent = create(PEX, CONFIG)
    for seed in range(2):
        agent, _ = update(agent, make_batch(1, seed=seed))
    return agent


@functools.cache
def pair() -> Any:
    """Return the pre-trained agent at the switch, its targets unlike its critics."""
    agent = switch(pretrained())
    return agent.replace(target_critic=jax.tree.map(lambda leaf: 0.7 * leaf, agent.critic.params))


def equal_values(agent: Any) -> Any:
    """Return the agent with critics that are 1 everywhere."""
    return agent.replace(critic=agent.critic.replace(params=constant_critic(agent.critic.params, 1.0)))


def modes(agent: Any, observations: Any) -> list[Any]:
    """Return the modes `[n, A]` of the frozen and of the new policy."""
    return [agent.actor(observations, params=params).mode() for params in (agent.base, agent.actor.params)]


# ---------------------------------------------------------------- the switch


def test_offline_is_iql() -> None:
    """Offline it is IQL."""
    values = {field.name: getattr(CONFIG, field.name) for field in fields(IQLConfig)}
    plain, batch = create(IQL, IQLConfig(**values)), make_batch(2)
    one, two = update(plain, batch)[0], update(create(PEX, CONFIG), batch)[0]
    for name in ("actor", "critic", "value"):
        assert largest_difference(getattr(one, name).params, getattr(two, name).params) < 1e-7
    assert largest_difference(one.target_critic, two.target_critic) < 1e-7


def test_switch_adds_policy() -> None:
    """The switch freezes the policy, begins another and keeps the rest."""
    before, after = pretrained(), switch(pretrained())
    assert not moved(after.base, before.actor.params) and moved(after.actor.params, before.actor.params)
    assert moved(after.actor.params, create(PEX, CONFIG).actor.params), "its first parameters are drawn anew"
    assert (steps(after.actor), steps(after.critic), steps(after.value)) == (0, 2, 2)
    for name in ("critic", "value"):
        assert not moved(getattr(after, name).params, getattr(before, name).params)
        assert not moved(getattr(after, name).opt_state, getattr(before, name).opt_state)
    assert not moved(after.target_critic, before.target_critic)
    assert after.online() is after
    known, _ = before.sample_actions(MANY[:50], None, KEY, True)
    np.testing.assert_allclose(known, modes(after, MANY[:50])[0], atol=1e-6)


def test_frozen_policy_stays() -> None:
    """The frozen policy stays, and all else learns."""
    agent = pair()
    after, info = update(agent, make_batch(2))
    assert not moved(after.base, agent.base)
    for name in ("actor", "critic", "value"):
        assert moved(getattr(after, name).params, getattr(agent, name).params)
    assert 0.0 < float(info["pex/new_share"]) < 1.0


# ---------------------------------------------------------------- the choice


def test_choice_by_hand() -> None:
    """softmax(kappa min Q) over the known policy's mode and a sample of the new one, with the online critics."""
    agent = pair()
    choice = choose(agent, MANY, KEY, 1.0)
    known = np.clip(modes(agent, MANY)[0], -1.0, 1.0)
    assert np.all(np.asarray(choice.actions)[~choice.new] == pytest.approx(known[~choice.new], abs=1e-6))
    sample = jnp.clip(agent.actor(MANY).sample(jax.random.split(KEY, 4)[1]), -1.0, 1.0)
    assert np.all(np.asarray(choice.actions)[choice.new] == pytest.approx(np.asarray(sample)[choice.new], abs=1e-6))
    q = np.stack([np.asarray(agent.critic(MANY, actions)).min(axis=0) for actions in (jnp.asarray(known), sample)])
    weights = np.exp(10.0 * (q - q.max(axis=0)))
    probability = weights[1] / weights.sum(axis=0)
    np.testing.assert_allclose(choice.probability, probability, atol=1e-4)
    assert float(choice.new.mean()) == pytest.approx(float(probability.mean()), abs=0.02)
    assert np.std(probability) > 0.1


def test_choice_limits() -> None:
    """Equal values or kappa = 0: each policy with probability 1/2; a large kappa: always the better one."""
    agent = pair()
    for each in (equal_values(agent), set_config(agent, inverse_temperature=0.0)):
        choice = choose(each, MANY, KEY, 1.0)
        np.testing.assert_allclose(choice.probability, 0.5, atol=1e-6)
        assert float(choice.new.mean()) == pytest.approx(0.5, abs=0.03)
    choice = choose(set_config(agent, inverse_temperature=1e7), MANY, KEY, 1.0)
    pairs = jnp.stack([modes(agent, MANY)[0], agent.actor(MANY).sample(jax.random.split(KEY, 4)[1])])
    q = np.asarray(agent.critic(MANY, jnp.clip(pairs, -1.0, 1.0)).min(axis=0))
    np.testing.assert_array_equal(choice.new, q[1] > q[0])


def test_evaluation_mostly_greedy() -> None:
    """Evaluation is greedy but for its randomness.

    With equal values the greedy choice is the known policy; a tenth is drawn, half of that is the new one.
    """
    agent = pair()
    greedy = set_config(agent, evaluation_randomness=0.0)
    one, two = (greedy.sample_actions(MANY[:50], None, jax.random.key(i), True)[0] for i in (0, 1))
    np.testing.assert_array_equal(one, two)
    best = np.asarray(modes(agent, MANY[:50]))
    q = np.asarray(agent.critic(MANY[:50], jnp.asarray(best)).min(axis=0))
    np.testing.assert_allclose(one, np.where((q[1] > q[0])[:, None], best[1], best[0]), atol=1e-6)
    choice = choose(equal_values(agent), MANY, KEY, 0.1)
    assert float(choice.new.mean()) == pytest.approx(0.05, abs=0.012)
    always_new = set_config(agent.replace(base=agent.actor.params), evaluation_randomness=0.1)
    actions, _ = always_new.sample_actions(MANY, None, KEY, True)
    sampled = np.abs(np.asarray(actions) - np.asarray(modes(always_new, MANY)[1])).max(axis=1) > 1e-6
    assert 0.0 < sampled.mean() < 0.1, "a tenth of the new policy's actions is drawn, some of them chosen"
    even = equal_values(always_new)  # greedy: the frozen policy's mode; the new one's where the choice is drawn
    played = np.asarray(choose(even, MANY, KEY, 0.1).actions)
    sampled = np.abs(played - np.clip(modes(even, MANY)[1], -1.0, 1.0)).max(axis=1) > 1e-6
    assert sampled.mean() == pytest.approx(0.1 * 0.1 / 2, abs=0.004), "policy and choice are drawn apart"


# ---------------------------------------------------------------- the regression


def test_regression_on_fresh_actions() -> None:
    """The regressed actions are fresh ones of the pair, not the batch's."""
    agent, batch = pair(), make_batch(rows=64)
    other = {**batch, "actions": -batch["actions"]}
    gradient, info = actor_gradient(agent, batch)
    assert largest_difference(gradient, actor_gradient(agent, other)[0]) == 0.0
    actions = agent.choose(batch["observations"], jax.random.split(KEY)[1]).actions
    q = agent.critic(batch["observations"], actions, params=agent.target_critic).min(axis=0)
    weights = advantage_weights(q - agent.value(batch["observations"]), CONFIG.beta)

    def expected(params: Any) -> Any:
        return -jnp.mean(weights * agent.actor(batch["observations"], params=params).log_prob(actions))

    loss, by_hand = jax.value_and_grad(expected)(agent.actor.params)
    assert float(info["actor/loss"]) == pytest.approx(float(loss), rel=1e-4)
    assert largest_difference(gradient, by_hand) < 1e-4
    offline, offline_info = actor_gradient(pretrained(), batch)
    assert "pex/new_share" not in offline_info
    assert largest_difference(offline, actor_gradient(pretrained(), other)[0]) > 1e-3


def test_critic_step_uses_old_value() -> None:
    """Critics learn from the batch's actions, with V from before its step."""
    agent, batch = pair(), make_batch(1)
    after, _ = update(agent, batch)
    rows: Batch = jax.tree.map(lambda leaf: leaf[0], batch)

    def stepped(value: Any) -> Any:
        grads = jax.grad(lambda params: agent.q_loss(params, rows, value)[0])(agent.critic.params)
        return agent.critic.apply_gradients(grads).opt_state[0].mu

    seen = after.critic.opt_state[0].mu
    assert largest_difference(seen, stepped(agent.value)) < 1e-5 < 1e-4 < largest_difference(seen, stepped(after.value))


# ---------------------------------------------------------------- settings


def test_wrong_settings_refused() -> None:
    """Wrong settings are refused."""
    for field, value in (("inverse_temperature", -1.0), ("inverse_temperature", float("inf"))):
        with pytest.raises(ConfigError, match="inverse_temperature is"):
            replace(CONFIG, **{field: value})
    with pytest.raises(ConfigError, match=r"evaluation_randomness is 1\.5; expected 0 to 1"):
        replace(CONFIG, evaluation_randomness=1.5)
    with pytest.raises(ConfigError, match="expectile is 0"):
        PEXConfig(expectile=0.0)
    with pytest.raises(ConfigError, match="expected a PEXConfig"):
        PEX.create(KEY, jnp.zeros((1, 3)), jnp.zeros((1, ACTION_DIM)), IQLConfig())


def test_presets_follow_commands() -> None:
    """Presets follow the published commands."""
    maze, locomotion = PEX.preset("antmaze"), PEX.preset("locomotion")
    for preset in (maze, locomotion):
        config = preset.config
        assert (config.expectile, config.beta, config.inverse_temperature) == (0.9, 10.0, 10.0)
        assert (config.batch_size, config.init_scheme, config.log_std_range) == (256, "xavier", (-5.0, 2.0))
        assert (config.online.warmup_steps, config.online.first_update()) == (5000, 5001)
        assert (config.online.replay, config.online.offline_ratio) == ("mixed", 0.5)
        assert (preset.offline_steps, preset.online_steps) == (1_000_000, 1_000_000)
    assert maze.reward == (1.0, -1.0) and locomotion.reward is None and locomotion.normalize_returns is None
    adroit = PEX.preset("adroit")
    assert adroit.reward == (10.0, 5.0) and adroit.config.inverse_temperature == 1.0 and adroit.config.beta == 0.5
    small = PEX.preset("locomotion", "small")
    assert (small.config.online.warmup_steps, small.online_steps, small.normalize_returns) == (1000, 10_000, 1000.0)
