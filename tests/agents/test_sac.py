"""SAC: target, actor and temperature against numbers worked out independently, and the order of steps in one call."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from o2o.agents.iql import IQLConfig
from o2o.agents.sac import SAC, SACConfig, positive, positive_model, zero_step
from o2o.errors import ConfigError
from o2o.nn.modules import Adam, Model, Scalar
from o2o.types import OnlineConfig
from tests.helpers.tiny import (
    ACTION_DIM,
    ROWS,
    constant_critic,
    constant_policy,
    create,
    critic_step,
    largest_difference,
    make_batch,
    moved,
    next_values,
    policy_gradient,
    policy_step,
    set_config,
    steps,
    tiny,
    update,
)

KEY = jax.random.key(3)


def sac() -> Any:
    return create(SAC, tiny(SACConfig()))


def with_alpha(agent: Any, alpha: float) -> Any:
    params = {"params": {"value": jnp.asarray(math.log(alpha), jnp.float32)}}
    return agent.replace(temperature=agent.temperature.replace(params=params))


def test_target_subtracts_entropy() -> None:
    """The target is the minimum minus the entropy term."""
    agent, batch = with_alpha(sac(), 0.3), make_batch()
    next_observations = batch["next_observations"]
    values = next_values(agent, batch, KEY)
    _, action_rng = jax.random.split(KEY)
    policy = agent.actor(next_observations)
    actions = policy.sample(action_rng)
    q = agent.critic(next_observations, actions, params=agent.target_critic)
    np.testing.assert_allclose(values, np.min(q, axis=0) - 0.3 * policy.log_prob(actions), atol=1e-4)


def test_target_reads_target_critic() -> None:
    """The target reads the target critic and not the critic."""
    agent, batch = set_config(sac(), backup_entropy=False), make_batch()
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 7.0))
    np.testing.assert_allclose(next_values(agent, batch, KEY), np.full(ROWS, 7.0), rtol=1e-6)


def test_critic_regression_targets() -> None:
    """With a constant target of 7 the critics regress to r at a terminal and to r + 0.99 * 7 elsewhere."""
    agent, batch = set_config(sac(), backup_entropy=False), make_batch()
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 7.0))
    _, info = critic_step(agent, batch, KEY)
    targets = np.asarray(batch["rewards"]) + 0.99 * 7.0 * np.asarray(batch["masks"])
    q = np.asarray(agent.critic(batch["observations"], batch["actions"]))
    assert batch["masks"][0] == 0 and targets[0] == pytest.approx(float(batch["rewards"][0]))
    assert float(info["critic/target"]) == pytest.approx(targets.mean(), rel=1e-5)
    assert float(info["critic/loss"]) == pytest.approx(np.square(q - targets).mean(), rel=1e-5)


def test_critic_loss_gradients() -> None:
    """The critic loss passes no gradient to targets, actor and temperature."""
    batch = make_batch()

    def loss(target: Any, actor: Any, temperature: Any) -> Any:
        agent = sac()
        agent = agent.replace(
            target_critic=target,
            actor=agent.actor.replace(params=actor),
            temperature=agent.temperature.replace(params=temperature),
        )
        return agent.update_critic(batch, KEY)[1]["critic/loss"]

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(
        sac().target_critic, sac().actor.params, sac().temperature.params
    )
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(grads))


def test_noiseless_gradient_is_ddpg() -> None:
    """Without entropy and noise, the actor gradient is DDPG's."""
    agent, batch = with_alpha(constant_policy(sac(), std=1e-8, mean=None), 1e-12), make_batch()

    def ddpg(params: Any) -> Any:
        actions = agent.actor(batch["observations"], params=params).mode()
        return -jnp.mean(jnp.min(agent.critic(batch["observations"], actions), axis=0))

    expected = jax.jit(jax.grad(ddpg))(agent.actor.params)
    assert largest_difference(policy_gradient(agent, batch, KEY), expected) < 1e-5
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-2


def test_actor_loss_and_entropy() -> None:
    """The actor loss and entropy are those of its sample."""
    agent, batch = with_alpha(sac(), 0.5), make_batch()
    actor_rng, _ = jax.random.split(KEY)
    actions, log_prob = agent.actor(batch["observations"]).sample_and_log_prob(actor_rng)
    q = jnp.min(agent.critic(batch["observations"], actions), axis=0)
    _, info = policy_step(agent, batch, KEY, agent.critic)
    assert float(info["actor/loss"]) == pytest.approx(float(jnp.mean(0.5 * log_prob - q)), rel=1e-5)
    assert float(info["actor/entropy"]) == pytest.approx(-float(log_prob.mean()), rel=1e-5)
    assert float(info["temperature/alpha"]) == pytest.approx(0.5, rel=1e-5)


def test_full_bc_weight_is_cloning() -> None:
    """The full BC weight is behaviour cloning."""
    agent, batch = set_config(sac(), bc_weight=1.0), make_batch()

    def cloning(params: Any) -> Any:
        return -jnp.mean(agent.actor(batch["observations"], params=params).log_prob(batch["actions"]))

    expected = jax.jit(jax.grad(cloning))(agent.actor.params)
    assert largest_difference(policy_gradient(agent, batch, KEY), expected) < 1e-5


@pytest.mark.parametrize("objective", ["alpha", "log_alpha"])
@pytest.mark.parametrize("std", [0.02, 0.7])
def test_alpha_rises_iff_entropy_low(objective: str, std: float) -> None:
    """Alpha rises iff the entropy is below minus the action dimension.

    Near 0 tanh is the identity, so that the entropy is about dim * ln(std * sqrt(2 pi e)): -4.99 at std 0.02.
    """
    agent, batch = constant_policy(set_config(sac(), temperature_objective=objective), std), make_batch()
    stepped, info = policy_step(agent, batch, KEY, agent.critic)
    entropy = float(info["actor/entropy"])
    if std == 0.02:
        assert entropy == pytest.approx(ACTION_DIM * math.log(std * math.sqrt(2 * math.pi * math.e)), abs=1.2)
    assert (entropy < -ACTION_DIM) == (std == 0.02)
    assert (float(stepped.alpha()) > float(agent.alpha())) == (std == 0.02)
    expected = {"alpha": 1.0, "log_alpha": 0.0}[objective] * (entropy + ACTION_DIM)
    assert float(info["temperature/loss"]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_next_state_entropy() -> None:
    """The entropy that is asked for on next states is measured there."""
    agent, batch = set_config(sac(), next_entropy_samples=512), make_batch()
    _, info = policy_step(agent, batch, KEY, agent.critic)
    policy = agent.actor(batch["next_observations"])
    samples = policy.sample_and_log_prob(jax.random.key(9), (512,))[1]
    spread = float(jnp.std(samples)) / math.sqrt(samples.size)
    assert float(info["actor/entropy"]) == pytest.approx(-float(samples.mean()), abs=6 * spread)
    elsewhere = {**batch, "next_observations": 10.0 * batch["next_observations"]}
    assert float(policy_step(agent, elsewhere, KEY, agent.critic)[1]["actor/entropy"]) != float(info["actor/entropy"])


def test_update_step_order() -> None:
    """One call is critic steps, each with a target average, then one policy step."""
    agent, batch = sac(), make_batch(3)
    after, info = update(agent, batch)
    _, critic_rng, policy_rng = jax.random.split(agent.rng, 3)
    loop, target, loss = agent, agent.target_critic, []
    for i, key in enumerate(jax.random.split(critic_rng, 3)):
        loop, step_info = critic_step(loop, jax.tree.map(lambda leaf, i=i: leaf[i], batch), key)
        target = jax.tree.map(lambda old, new: 0.995 * old + 0.005 * new, target, loop.critic.params)
        loss.append(float(step_info["critic/loss"]))
    assert largest_difference(after.critic.params, loop.critic.params) < 1e-5
    assert largest_difference(after.target_critic, target) < 1e-5
    loop, _ = policy_step(loop, jax.tree.map(lambda leaf: leaf[-1], batch), policy_rng, loop.critic)
    assert largest_difference(after.actor.params, loop.actor.params) < 1e-4
    assert largest_difference(after.temperature.params, loop.temperature.params) < 1e-6
    assert (steps(after.critic), steps(after.actor), steps(after.temperature)) == (3, 1, 1)
    assert float(info["critic/loss"]) == pytest.approx(np.mean(loss), rel=1e-4)


def test_target_average_matches_optax() -> None:
    """The target average is optax's incremental update with the new critic."""
    agent = set_config(sac(), tau=0.25)
    after, _ = critic_step(agent, make_batch(), KEY)
    expected = optax.incremental_update(after.critic.params, agent.target_critic, 0.25)
    assert largest_difference(after.target_critic, expected) < 1e-7
    assert moved(after.target_critic, agent.target_critic)


@pytest.mark.parametrize("joint", [False, True])
def test_actor_uses_configured_critic(joint: bool) -> None:
    """A single step judges the actor by the configured critic.

    SAC judges by the critic just stepped, Cal-QL and WSRL by the one from before (`joint_policy_step`).
    """
    agent, batch = set_config(sac(), joint_policy_step=joint), make_batch(1)
    agent = agent.replace(critic=agent.critic.replace(optimizer=Adam(0.05)))
    after, _ = update(agent, batch)
    rows, policy_rng = jax.tree.map(lambda leaf: leaf[0], batch), jax.random.split(agent.rng, 3)[2]
    expected, _ = policy_step(agent, rows, policy_rng, agent.critic if joint else after.critic)
    other, _ = policy_step(agent, rows, policy_rng, after.critic if joint else agent.critic)
    assert largest_difference(after.actor.opt_state[0].mu, expected.actor.opt_state[0].mu) < 1e-5
    assert largest_difference(after.actor.opt_state[0].mu, other.actor.opt_state[0].mu) > 1e-3


def test_zero_gradient_momentum() -> None:
    """Zero gradients move a network that has momentum.

    One real and four zero gradients per cycle move it sqrt(5) learning rates per cycle (WSRL's code).
    """
    model = Model.create(jax.random.key(0), Scalar(0.0), Adam(1e-3))

    def cycle(model: Model, _: None) -> tuple[Model, Any]:
        model = model.apply_gradients(jax.tree.map(jnp.ones_like, model.params))
        for _i in range(4):
            model = zero_step(model)
        return model, model()

    _, path = jax.lax.scan(cycle, model, None, length=2000)
    assert float(path[-501] - path[-1]) / 500 == pytest.approx(math.sqrt(5) * 1e-3, rel=0.02)


def test_rng_advances() -> None:
    """The key advances, and every call draws anew."""
    agent, batch = sac(), make_batch(3)
    once, _ = update(agent, batch)
    same_networks = agent.replace(rng=once.rng)
    assert np.any(jax.random.key_data(once.rng) != jax.random.key_data(agent.rng))
    assert moved(update(same_networks, batch)[0].actor.params, once.actor.params)


def test_positive_parametrisations() -> None:
    assert float(positive(jnp.asarray(math.log(2.0)), "exp")) == pytest.approx(2.0)
    assert float(positive(jnp.asarray(math.log(math.e - 1)), "softplus")) == pytest.approx(1.0)
    assert float(positive(jnp.asarray(50.0), "exp")) == pytest.approx(1e6)
    for param in ("exp", "softplus"):
        model = positive_model(jax.random.key(0), 0.3, param, 3e-4)
        assert float(positive(model(), param)) == pytest.approx(0.3, rel=1e-5)


def test_contradicting_settings_refused() -> None:
    """Contradicting settings are refused."""
    with pytest.raises(ConfigError, match="target_subset is 3"):
        SACConfig(target_subset=3, num_critics=2)
    with pytest.raises(ConfigError, match="log_alpha"):
        SACConfig(temperature_param="softplus")
    with pytest.raises(ConfigError, match="temperature_init"):
        SACConfig(temperature_init=0.0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (SACConfig, "num_critics"),
        (SACConfig, "next_entropy_samples"),
        (SACConfig, "max_target_actions"),
        (IQLConfig, "num_critics"),
        (OnlineConfig, "utd_ratio"),
    ],
)
def test_counts_at_least_one(make: Any, name: str) -> None:
    """Counts below one are refused."""
    for value in (0, -1):
        with pytest.raises(ConfigError, match=f"{name} is {value}; expected at least 1"):
            make(**{name: value})


def test_standard_defaults() -> None:
    config = SAC.preset("locomotion", "paper").config
    assert (config.batch_size, config.actor_hidden_dims, config.tau, config.num_critics) == (256, (256, 256), 0.005, 2)
    assert (config.actor_lr, config.critic_lr, config.temperature_lr) == (3e-4, 3e-4, 3e-4)
    assert config.backup_entropy and config.target_entropy == 1.0 and config.online.random_steps == 100
    assert config.online.replay == "online" and config.online.utd_ratio == 1
