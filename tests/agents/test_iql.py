"""IQL: each loss by hand, order of the steps, limits of expectile and temperature (arXiv 2110.06169)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import BC, IQL, BCConfig, IQLConfig
from o2o.errors import ConfigError
from o2o.rl.losses import advantage_weights
from o2o.types import Batch

TINY = IQLConfig(actor_hidden_dims=(16, 16), critic_hidden_dims=(16, 16), value_hidden_dims=(16, 16), batch_size=64)
UPDATE: Any = jax.jit(lambda agent, batch: agent.update(batch))


def make_rows(rows: int = 64, seed: int = 0) -> Batch:
    """Return random transitions, leaves `[rows, ...]`."""
    keys = jax.random.split(jax.random.key(seed), 5)
    return {
        "observations": jax.random.normal(keys[0], (rows, 3)),
        "actions": jnp.tanh(jax.random.normal(keys[1], (rows, 2))),
        "rewards": jax.random.normal(keys[2], (rows,)),
        "masks": (jax.random.uniform(keys[4], (rows,)) > 0.3).astype(jnp.float32),
        "next_observations": jax.random.normal(keys[3], (rows, 3)),
    }


@functools.cache
def fresh(config: IQLConfig, seed: int) -> IQL:
    """Return a new agent for `make_rows`."""
    create: Any = jax.jit(lambda key: IQL.create(key, jnp.zeros((1, 3)), jnp.zeros((1, 2)), config))
    return create(jax.random.key(seed))


def make_agent(seed: int = 0, **fields: Any) -> IQL:
    """Return a tiny agent for `make_rows` whose targets differ from its critics."""
    agent = fresh(dataclasses.replace(TINY, **fields), seed)
    return agent.replace(target_critic=jax.tree.map(lambda leaf: 0.7 * leaf, agent.critic.params))


def stack(rows: Batch, utd: int = 1) -> Batch:
    """Repeat rows into leaves `[utd, ...]`."""
    return {name: jnp.stack([leaf] * utd) for name, leaf in rows.items()}


def assert_close(left: Any, right: Any, **tolerance: Any) -> None:
    """Compare two pytrees leaf by leaf."""
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, two, **tolerance)


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_value_loss_by_hand(expectile: float) -> None:
    agent, rows = make_agent(expectile=expectile), make_rows()
    loss, _ = agent.value_loss(agent.value.params, rows)
    q = np.asarray(agent.critic(rows["observations"], rows["actions"], params=agent.target_critic)).min(axis=0)
    difference = q - np.asarray(agent.value(rows["observations"]))
    expected = np.mean(np.abs(expectile - (difference < 0)) * difference**2)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    if expectile == 0.5:
        assert float(loss) == pytest.approx(0.5 * float(np.mean(difference**2)), rel=1e-5)


def test_q_loss_by_hand() -> None:
    """The Q loss is that computed by hand, and terminal rows regress to the reward."""
    agent, rows = make_agent(discount=0.9), make_rows()
    loss, info = agent.q_loss(agent.critic.params, rows, agent.value)
    next_v = np.asarray(agent.value(rows["next_observations"]))
    targets = np.asarray(rows["rewards"]) + 0.9 * np.asarray(rows["masks"]) * next_v
    q = np.asarray(agent.critic(rows["observations"], rows["actions"]))
    assert float(loss) == pytest.approx(float(np.mean((q - targets) ** 2)), rel=1e-5)
    terminal = {**rows, "masks": jnp.zeros(64)}
    _, info = agent.q_loss(agent.critic.params, terminal, agent.value)
    assert float(info["critic/target"]) == pytest.approx(float(rows["rewards"].mean()), abs=1e-6)
    elsewhere = {**terminal, "next_observations": 100.0 * rows["next_observations"]}
    assert_close(
        jax.grad(lambda p: agent.q_loss(p, terminal, agent.value)[0])(agent.critic.params),
        jax.grad(lambda p: agent.q_loss(p, elsewhere, agent.value)[0])(agent.critic.params),
        rtol=0,
    )


def test_actor_loss_by_hand() -> None:
    agent, rows = make_agent(beta=3.0), make_rows()
    loss, info = agent.actor_loss(agent.actor.params, rows, agent.value, agent.rng)
    q = np.asarray(agent.critic(rows["observations"], rows["actions"], params=agent.target_critic)).min(axis=0)
    weights = np.minimum(np.exp(3.0 * (q - np.asarray(agent.value(rows["observations"])))), 100.0)
    log_prob = np.asarray(agent.actor(rows["observations"]).log_prob(rows["actions"]))
    assert float(loss) == pytest.approx(-float(np.mean(weights * log_prob)), rel=1e-5)
    assert float(info["actor/weight"]) == pytest.approx(float(weights.mean()), rel=1e-5)


def test_beta_zero_is_behaviour_cloning() -> None:
    agent, rows = make_agent(beta=0.0, squash=True, std_mode="exp"), make_rows()
    cloning = BCConfig(actor_hidden_dims=(16, 16), batch_size=64)
    clone = BC.create(jax.random.key(1), jnp.zeros((1, 3)), jnp.zeros((1, 2)), cloning)
    clone = clone.replace(actor=clone.actor.replace(params=agent.actor.params))
    loss, _ = agent.actor_loss(agent.actor.params, rows, agent.value, agent.rng)
    reference, _ = clone.actor_loss(clone.actor.params, rows, clone.rng)
    assert float(loss) == pytest.approx(float(reference), rel=1e-6)
    assert_close(UPDATE(agent, stack(rows))[0].actor.params, UPDATE(clone, stack(rows))[0].actor.params, atol=1e-6)


def test_weights_capped_and_positive() -> None:
    """Weights never exceed the cap and are positive."""
    agent, rows = make_agent(beta=1e4), make_rows()
    _, info = agent.actor_loss(agent.actor.params, rows, agent.value, agent.rng)
    assert float(info["actor/weight"]) <= 100.0 * (1 + 1e-5)
    assert 0.0 < float(info["actor/capped"]) < 1.0
    weights = np.asarray(advantage_weights(jnp.linspace(-5, 50, 100), 2.0))
    assert np.all(weights > 0) and weights.max() <= 100.0 * (1 + 1e-5)


def test_actor_gradient_at_data_actions() -> None:
    """The actor gradient does not depend on Q at other actions."""
    # Two critics that agree on the batch's actions (all zero) and differ everywhere else.
    agent, rows = make_agent(), make_rows()
    rows["actions"] = jnp.zeros_like(rows["actions"])
    twin = jax.tree.map(jnp.copy, agent.target_critic)
    twin["params"]["dense_0"]["kernel"] = twin["params"]["dense_0"]["kernel"].at[:, 3:].mul(-5.0)
    other = agent.replace(target_critic=twin)
    probe = jnp.full_like(rows["actions"], 0.5)
    q = [np.asarray(agent.critic(rows["observations"], probe, params=p)) for p in (agent.target_critic, twin)]
    assert not np.allclose(q[0], q[1])
    grads = [
        jax.grad(lambda p, a=a: a.actor_loss(p, rows, a.value, a.rng)[0])(agent.actor.params) for a in (agent, other)
    ]
    assert_close(*grads, rtol=0)


def test_losses_detach_other_networks() -> None:
    """Losses pass no gradient to other networks."""
    agent, rows = make_agent(), make_rows()

    def total(target: Any, value: Any) -> jax.Array:
        changed = agent.replace(target_critic=target, value=agent.value.replace(params=value))
        actor, _ = changed.actor_loss(agent.actor.params, rows, changed.value, agent.rng)
        q, _ = changed.q_loss(agent.critic.params, rows, changed.value)
        v, _ = changed.value_loss(agent.value.params, rows)
        return actor + q + v

    for leaf in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(agent.target_critic, agent.value.params)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_update_order(order: str) -> None:
    agent, rows = make_agent(update_order=order, value_lr=0.05), make_rows()
    after, _ = UPDATE(agent, stack(rows))
    value = agent.value.apply_gradients(jax.grad(lambda p: agent.value_loss(p, rows)[0])(agent.value.params))
    seen, unseen = (value, agent.value) if order == "sequential" else (agent.value, value)

    def expected(seen: Any) -> tuple[Any, Any]:
        actor_grads = jax.grad(lambda p: agent.actor_loss(p, rows, seen, agent.rng)[0])(agent.actor.params)
        critic_grads = jax.grad(lambda p: agent.q_loss(p, rows, seen)[0])(agent.critic.params)
        return agent.actor.apply_gradients(actor_grads).params, agent.critic.apply_gradients(critic_grads).params

    assert_close(after.value.params, value.params, atol=1e-6)
    actor, critic = expected(seen)
    assert_close(after.actor.params, actor, atol=2e-6)
    assert_close(after.critic.params, critic, atol=2e-6)
    with pytest.raises(AssertionError):
        assert_close((after.actor.params, after.critic.params), expected(unseen), atol=2e-6)


def test_target_moves_by_tau() -> None:
    """The target moves by tau towards the new critic."""
    agent, rows = make_agent(tau=0.25), make_rows()
    after, _ = UPDATE(agent, stack(rows))
    expected = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, after.critic.params, agent.target_critic)
    assert_close(after.target_critic, expected, atol=1e-6)


def test_utd_three_equals_three_calls() -> None:
    """One call with a UTD ratio of three equals three calls."""
    agent = make_agent(dropout=0.1)
    blocks = [make_rows(seed=seed) for seed in range(3)]
    together, _ = UPDATE(agent, {name: jnp.stack([b[name] for b in blocks]) for name in blocks[0]})
    apart = agent
    for block in blocks:
        apart, _ = UPDATE(apart, stack(block))
    assert_close(
        (together.actor, together.critic, together.value, together.target_critic),
        (apart.actor, apart.critic, apart.value, apart.target_critic),
        atol=2e-6,
    )


@pytest.mark.parametrize(("expectile", "expected"), [(0.5, 0.5), (0.9, 0.9)])
def test_v_is_expectile(expectile: float, expected: float) -> None:
    """V is the expectile of the targets."""
    # One state, Q(s, a) is 0 or 1 with equal odds: the expectile of a fair coin is tau itself; 0.5 is the mean.
    agent = make_agent(expectile=expectile, value_lr=3e-3)
    rows = make_rows()
    rows["observations"] = jnp.ones((64, 3))
    coin = jnp.arange(64) % 2
    target = jax.tree.map(jnp.zeros_like, agent.target_critic)
    # Q = relu(relu(a_0)): weight 1 along one path, so the action (1, 0) has value 1 and (0, 0) has value 0.
    for name, row in (("dense_0", 3), ("dense_1", 0), ("output", 0)):
        target["params"][name]["kernel"] = target["params"][name]["kernel"].at[:, row, 0].set(1.0)
    rows["actions"] = jnp.stack([coin.astype(jnp.float32), jnp.zeros(64)], axis=-1)
    agent = agent.replace(target_critic=target)
    value = agent.value

    def step(value: Any, _: None) -> tuple[Any, None]:
        return value.apply_gradients(jax.grad(lambda p: agent.value_loss(p, rows)[0])(value.params)), None

    value, _ = jax.jit(lambda v: jax.lax.scan(step, v, None, length=1500))(value)
    assert float(value(jnp.ones((1, 3)))[0]) == pytest.approx(expected, abs=0.02)


def test_actor_cosine_decay() -> None:
    """Cosine decay stops the actor offline and is off online."""
    rows = make_rows()
    agent = make_agent(actor_decay_steps=3)
    for _ in range(3):
        agent, _ = UPDATE(agent, stack(rows))
    stopped, _ = UPDATE(agent, stack(rows))
    assert_close(stopped.actor.params, agent.actor.params, rtol=0)
    online = agent.online()
    assert_close(online.actor.params, agent.actor.params, rtol=0)
    assert_close(online.actor.opt_state[0], agent.actor.opt_state[0], rtol=0)
    moved, _ = UPDATE(online, stack(rows))
    shift = [
        float(jnp.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (moved.actor.params, agent.actor.params)), strict=True)
    ]
    assert max(shift) > 1e-4
    reference = make_agent()
    assert jax.tree.structure(online.actor.opt_state) == jax.tree.structure(reference.actor.opt_state)


def test_dropout_in_actor_loss_only() -> None:
    """Dropout acts in the actor loss only."""
    agent, rows = make_agent(dropout=0.5), make_rows()
    losses = [float(agent.actor_loss(agent.actor.params, rows, agent.value, jax.random.key(i))[0]) for i in (1, 2)]
    assert losses[0] != losses[1]
    actions = [agent.sample_actions(rows["observations"], None, jax.random.key(i), True)[0] for i in (1, 2)]
    np.testing.assert_array_equal(actions[0], actions[1])


def test_acting_distribution() -> None:
    """The acting policy is a plain Gaussian around a tanh mean."""
    agent, rows = make_agent(), make_rows()
    mode, _ = agent.sample_actions(rows["observations"], None, jax.random.key(0), True)
    np.testing.assert_array_equal(mode, agent.actor(rows["observations"]).mean)
    assert float(jnp.abs(mode).max()) < 1.0
    sampled, _ = agent.sample_actions(jnp.ones((500, 3)), None, jax.random.key(0))
    assert float(sampled.max()) == 1.0 and float(sampled.min()) == -1.0
    assert 0.1 < float(jnp.mean(jnp.abs(sampled) == 1.0)) < 0.6


def test_critics_match_wsrl_ensemble() -> None:
    """Critics can match the ensemble that WSRL loads."""
    agent = make_agent(num_critics=10, shared_output=True, critic_layer_norm=True, last_gain=0.01, squash=True)
    params = agent.critic.params["params"]
    assert params["shared_output"]["kernel"].shape == (16, 1) and params["dense_0"]["kernel"].shape == (10, 5, 16)
    after, info = UPDATE(agent, stack(make_rows()))
    assert all(np.isfinite(float(value)) for value in info.values())
    assert after.critic.params["params"]["norm_0"]["scale"].shape == (10, 16)


def test_wrong_settings_refused() -> None:
    """Wrong settings are refused."""
    with pytest.raises(ConfigError, match="expectile is 1.0"):
        IQLConfig(expectile=1.0)
    with pytest.raises(ConfigError, match="update_order is 'random'"):
        IQLConfig(update_order="random")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs flat float32 observations"):
        IQL.create(jax.random.key(0), {"state": jnp.zeros((1, 3))}, jnp.zeros((1, 2)))  # type: ignore[arg-type]


def test_presets_follow_the_tables() -> None:
    maze, adroit = IQL.preset("antmaze", "paper"), IQL.preset("adroit", "paper")
    assert (maze.config.expectile, maze.config.beta, maze.reward) == (0.9, 10.0, (1.0, -1.0))
    assert (adroit.config.expectile, adroit.config.beta, adroit.config.dropout) == (0.7, 0.5, 0.1)
    assert adroit.reward == (10.0, 5.0) and (maze.offline_steps, adroit.offline_steps) == (1_000_000, 20_000)
    assert IQL.preset("kitchen", "paper").reward == (1.0, -4.0)
    assert [IQL.preset(family).normalize_returns for family in ("locomotion", "antmaze", "adroit")] == [
        1000,
        None,
        None,
    ]
    assert IQL.preset("locomotion", "paper").config.beta == 3.0 and IQL.preset("locomotion", "small").config.beta == 0.5
    small = IQL.preset("locomotion", "small")
    assert small.config.critic_hidden_dims == (128, 128) and small.offline_steps == small.online_steps == 10_000
    assert small.config.online.replay == "append" and small.config.online.utd_ratio == 1
