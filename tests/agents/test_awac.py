"""AWAC: target and weights by hand, where its next action comes from, its limits in lambda (arXiv 2006.09359)."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import AWAC, AWACConfig
from o2o.errors import ConfigError
from o2o.types import Batch
from tests.helpers.contract import QUICK
from tests.helpers.tiny import (
    ACTION_DIM,
    OBSERVATION_DIM,
    ROWS,
    constant_critic,
    create,
    largest_difference,
    make_batch,
    moved,
    next_values,
    set_config,
    tiny,
)

KEY = jax.random.key(3)
update = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)
CONFIG = tiny(AWACConfig(), init_scheme="xavier", temperature=0.5, critic_lr=0.01, tau=0.25)


@jax.jit
def actor_gradient(agent: Any, batch: Batch, rng: jax.Array) -> Any:
    """Return the actor's gradient and metrics on leaves `[rows, ...]`."""
    return jax.grad(agent.actor_loss, has_aux=True)(agent.actor.params, batch, agent.critic, rng)


def make_agent(**changes: Any) -> Any:
    """Return the agent of key 0 whose targets differ from its critics."""
    agent = set_config(create(AWAC, CONFIG), **changes)
    return agent.replace(target_critic=jax.tree.map(lambda leaf: 0.7 * leaf, agent.critic.params))


def blind_to_states(params: Any) -> Any:
    """Return critic parameters that see actions only."""
    tree = dict(params["params"])
    kernel = tree["dense_0"]["kernel"].at[:, :OBSERVATION_DIM].set(0.0)
    return {"params": {**tree, "dense_0": {**tree["dense_0"], "kernel": kernel}}}


def test_next_action_from_policy() -> None:
    """The next action is the policy's at the next state.

    A critic that sees actions only: its value changes with s', from whose policy a' must come, and not with s.
    """
    agent, batch = make_agent(), make_batch()
    agent = agent.replace(target_critic=blind_to_states(agent.target_critic))
    values = next_values(agent, batch, KEY)
    elsewhere = next_values(agent, {**batch, "next_observations": batch["next_observations"] + 1.0}, KEY)
    assert float(jnp.abs(values - elsewhere).max()) > 1e-2
    np.testing.assert_array_equal(
        values, next_values(agent, {**batch, "observations": batch["observations"] + 1.0}, KEY)
    )
    actions = jnp.clip(agent.actor(batch["next_observations"]).sample(KEY), -1.0, 1.0)
    expected = agent.critic(batch["next_observations"], actions, params=agent.target_critic).min(axis=0)
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_targets_stop_at_terminals() -> None:
    """Targets stop at terminals only.

    Row 0 is terminal; the others, time limits included, carry the bootstrap term of a constant target of 4.
    """
    agent, batch = make_agent(), make_batch(1)
    _, info = update(agent.replace(target_critic=constant_critic(agent.target_critic, 4.0)), batch)
    targets = np.asarray(batch["rewards"]) + 0.99 * 4.0 * np.asarray(batch["masks"])
    assert float(info["critic/target"]) == pytest.approx(targets.mean(), rel=1e-5)


def test_actor_loss_by_hand() -> None:
    """Weights min(exp(A / lambda), cap) with the online critics and one sample of the policy; some are capped."""
    agent, batch = make_agent(temperature=0.1, weight_cap=2.0), make_batch(rows=64)
    observations, actions = batch["observations"], batch["actions"]
    loss, info = agent.actor_loss(agent.actor.params, batch, agent.critic, KEY)
    policy = agent.actor(observations)
    played = np.clip(np.asarray(policy.mean + policy.std * jax.random.normal(KEY, actions.shape)), -1.0, 1.0)
    q, v = (np.asarray(agent.critic(observations, jnp.asarray(a))).min(axis=0) for a in (actions, played))
    weights = np.minimum(np.exp((q - v) / 0.1), 2.0)
    assert 0.2 < np.mean(weights == 2.0) < 0.9
    assert float(loss) == pytest.approx(-float(np.mean(weights * np.asarray(policy.log_prob(actions)))), rel=1e-4)
    assert float(info["actor/weight"]) == pytest.approx(float(weights.mean()), rel=1e-4)
    assert float(info["actor/advantage"]) == pytest.approx(float((q - v).mean()), rel=1e-3)


def test_lambda_limits() -> None:
    """A large lambda is behaviour cloning, and a small one stays finite."""
    agent, batch = make_agent(), make_batch()
    cloning = jax.grad(lambda p: -jnp.mean(agent.actor(batch["observations"], params=p).log_prob(batch["actions"])))
    expected = cloning(agent.actor.params)
    grads, info = actor_gradient(set_config(agent, temperature=1e6), batch, KEY)
    assert largest_difference(grads, expected) < 1e-4 and float(info["actor/weight"]) == pytest.approx(1.0, abs=1e-4)
    grads, info = actor_gradient(set_config(agent, temperature=1e-6), batch, KEY)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert 0.0 < float(info["actor/weight"]) <= 100.0 and largest_difference(grads, expected) > 1e-2


def test_targets_and_weights_detached() -> None:
    """No gradient reaches the targets or the weights."""
    agent, batch = make_agent(), make_batch(1)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)

    def of_actor(critic_params: Any) -> Any:
        changed = agent.replace(critic=agent.critic.replace(params=critic_params))
        return changed.actor_loss(agent.actor.params, rows, changed.critic, KEY)[0]

    def of_critics(target: Any) -> Any:
        return agent.replace(target_critic=target).update(batch)[1]["critic/loss"]

    for loss, params in ((of_actor, agent.critic.params), (of_critics, agent.target_critic)):
        for leaf in jax.tree.leaves(jax.grad(loss)(params)):
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_update_order() -> None:
    """The critic steps first, then the actor, then the targets."""
    agent, batch = make_agent(), make_batch(1)
    after, _ = update(agent, batch)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    actor_rng = jax.random.split(agent.rng, 3)[2]
    new, _ = actor_gradient(agent.replace(critic=after.critic), rows, actor_rng)
    old, _ = actor_gradient(agent, rows, actor_rng)
    seen = jax.tree.map(lambda moment: moment / 0.1, after.actor.opt_state[0].mu)
    assert largest_difference(seen, new) < 1e-4 < 1e-3 < largest_difference(seen, old)
    expected = jax.tree.map(lambda one, two: 0.25 * one + 0.75 * two, after.critic.params, agent.target_critic)
    assert largest_difference(after.target_critic, expected) < 1e-6
    assert moved(after.critic.params, agent.critic.params)


def test_gaussian_policy_clipping() -> None:
    """The policy is a plain Gaussian with one clipped log-std and clipped samples."""
    agent, observations = make_agent(), make_batch()["observations"]
    params: Any = {"params": {**agent.actor.params["params"], "log_std": jnp.array([-40.0, 5.0])}}
    std = agent.actor(observations, params=params).std
    np.testing.assert_allclose(std, np.exp([[-20.0, 2.0]] * ROWS), rtol=1e-4)
    far = agent.replace(actor=agent.actor.replace(params=jax.tree.map(lambda leaf: 3.0 * leaf, agent.actor.params)))
    mode, _ = far.sample_actions(observations, None, KEY, True)
    assert float(jnp.abs(far.actor(observations).mean).max()) > 1.0 == float(jnp.abs(mode).max())
    sample, _ = far.sample_actions(observations, None, KEY)
    assert float(jnp.abs(far.actor(observations).sample(KEY)).max()) > 1.0 == float(jnp.abs(sample).max())


def test_online_keeps_agent() -> None:
    """The same agent goes on online, with one buffer."""
    agent = make_agent()
    assert agent.online() is agent
    assert agent.config.online.replay == "append" and agent.config.online.utd_ratio == 1


def test_wrong_settings_refused() -> None:
    """Wrong settings are refused."""
    for field, value in (("temperature", 0.0), ("weight_cap", -1.0), ("temperature", float("nan")), ("num_critics", 0)):
        with pytest.raises(ConfigError, match=f"AWACConfig.{field} is"):
            replace(CONFIG, **{field: value})
    with pytest.raises(ConfigError, match="needs flat float32 observations"):
        AWAC.create(KEY, {"state": jnp.zeros((1, 3))}, jnp.zeros((1, ACTION_DIM)))  # type: ignore[arg-type]


def test_presets_follow_corl() -> None:
    lambdas = {family: AWAC.preset(family).config.temperature for family in ("antmaze", "adroit", "locomotion")}
    assert lambdas == {"antmaze": 0.1, "adroit": 0.1, "locomotion": 1.0}
    paper, small = AWAC.preset("antmaze"), AWAC.preset("antmaze", "small")
    assert paper.config.actor_hidden_dims == paper.config.critic_hidden_dims == (256, 256, 256)
    assert (paper.offline_steps, paper.online_steps, paper.reward) == (1_000_000, 1_000_000, (1.0, -1.0))
    assert (paper.config.actor_lr, paper.config.tau, paper.config.weight_cap) == (3e-4, 0.005, 100.0)
    assert small.config.critic_hidden_dims == (128, 128) and small.offline_steps == small.online_steps == 10_000
    assert AWAC.preset("locomotion", "small").config.temperature == 10.0 and AWAC.preset("locomotion").run["normalize"]
