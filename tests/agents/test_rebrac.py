"""ReBRAC: both penalties by hand, rows without a next action, the scale of Q, steps, host replay (arXiv 2305.09836)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import ReBRAC, ReBRACConfig
from o2o.config import LoopConfig
from o2o.errors import ConfigError, DatasetError
from o2o.runs import session
from o2o.types import Batch
from tests.helpers.contract import QUICK
from tests.helpers.probes import DISCOUNT, Probe, mode, q_values, two_steps
from tests.helpers.tiny import (
    constant_critic,
    create,
    largest_difference,
    make_batch,
    moved,
    set_config,
    steps,
    tiny,
)

KEY = jax.random.key(4)
update = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)
CONFIG = tiny(ReBRACConfig(), critic_lr=0.01, tau=0.25, critic_penalty=2.0)


@jax.jit
def targets(agent: Any, batch: Batch) -> jax.Array:
    """Return y `[rows]` on leaves `[rows, ...]`."""
    return agent.targets(batch, KEY)[0]


@jax.jit
def actor_gradient(agent: Any, batch: Batch) -> Any:
    """Return the actor's gradient on leaves `[rows, ...]`."""
    return jax.grad(agent.actor_loss, has_aux=True)(agent.actor.params, batch, KEY)[0]


def make_agent(**changes: Any) -> Any:
    """Return the agent of key 0 whose targets differ from what they follow."""
    agent = set_config(create(ReBRAC, CONFIG), **changes)
    scaled = {name: jax.tree.map(lambda leaf: 0.7 * leaf, getattr(agent, name).params) for name in ("actor", "critic")}
    return agent.replace(target_actor=scaled["actor"], target_critic=scaled["critic"])


def following_batch(utd: int | None = None, rows: int = 8) -> Batch:
    """Return random transitions with next actions; row 0 is terminal, row 1 has no next action."""
    batch = make_batch(utd, rows)
    actions = jnp.tanh(jax.random.normal(jax.random.key(9), batch["actions"].shape))
    valid = jnp.ones_like(batch["rewards"]).at[..., :2].set(0.0)
    return {**batch, "next_actions": valid[..., None] * actions, "next_valid": valid}


def with_affine_critic(agent: Any, scale: float, shift: float) -> Any:
    """Return the agent with critics Q -> scale Q + shift."""
    tree = dict(agent.critic.params["params"])
    head = tree["output"]
    tree["output"] = {"kernel": scale * head["kernel"], "bias": scale * head["bias"] + shift}
    return agent.replace(critic=agent.critic.replace(params={"params": tree}))


def test_target_by_hand() -> None:
    """r = -1, m = 1, Q' = (-10, -12), a' - a'_data = (0.1, 0.2), beta_2 = 2: -1 + 0.99 (-12 - 2 * 0.05) = -12.979."""
    agent, batch = make_agent(target_noise=0.0), following_batch()
    for member, value in enumerate((-10.0, -12.0)):
        agent = agent.replace(target_critic=constant_critic(agent.target_critic, value, member))
    actions = agent.actor(batch["next_observations"], params=agent.target_actor)
    ones = jnp.ones_like(batch["rewards"])
    near = actions - jnp.asarray([0.1, 0.2])
    rows = {**batch, "rewards": -ones, "masks": ones, "next_actions": near, "next_valid": ones}
    np.testing.assert_allclose(targets(agent, rows), -12.979, atol=1e-5)
    unknown = {**rows, "next_valid": 0.0 * ones}
    np.testing.assert_allclose(targets(agent, unknown), -1.0 + 0.99 * -12.0, atol=1e-5)


def test_critic_penalty() -> None:
    """The penalty takes the noisy clipped action and belongs to the next state.

    It lowers y by discount m beta_2 |a' - a'_data|^2, and does not depend on the row's own action.
    """
    agent, batch = make_agent(target_noise=0.6), following_batch(rows=64)
    actions = agent.noisy_actions(batch["next_observations"], agent.target_actor, KEY)
    assert float(jnp.abs(actions).max()) <= 1.0
    distance = batch["next_valid"] * jnp.sum((actions - batch["next_actions"]) ** 2, axis=-1)
    y = targets(agent, batch)
    free = targets(set_config(agent, critic_penalty=0.0), batch)
    np.testing.assert_allclose(free - y, 0.99 * batch["masks"] * 2.0 * distance, atol=1e-5)
    np.testing.assert_array_equal(targets(agent, {**batch, "actions": -batch["actions"]}), y)


def test_rows_without_penalty() -> None:
    """Rows without a next action and terminal rows have no penalty.

    Noise in their next actions changes nothing; at a terminal y is the reward, whatever the flag says.
    """
    agent, batch = make_agent(), following_batch()
    y = targets(agent, batch)
    noise = jax.random.normal(KEY, batch["next_actions"].shape)
    elsewhere = jnp.where(batch["next_valid"][:, None] > 0, batch["next_actions"], noise)
    np.testing.assert_array_equal(targets(agent, {**batch, "next_actions": elsewhere}), y)
    flagged = {**batch, "next_valid": jnp.ones_like(batch["next_valid"])}
    changed = np.asarray(targets(agent, flagged) != y)
    assert changed.tolist() == [False, True, False, False, False, False, False, False]
    assert float(y[0]) == float(batch["rewards"][0])


def test_actor_loss_by_hand() -> None:
    agent, batch = make_agent(actor_penalty=0.3), following_batch()
    loss, _ = agent.actor_loss(agent.actor.params, batch, KEY)
    actions = np.asarray(agent.actor(batch["observations"]))
    q = np.asarray(agent.critic(batch["observations"], actions)).min(axis=0)
    distance = np.sum((actions - np.asarray(batch["actions"])) ** 2, axis=1).mean()
    assert float(loss) == pytest.approx(0.3 * distance - q.mean() / np.abs(q).mean(), rel=1e-4)


def test_actor_gradient_q_scale() -> None:
    """The actor's gradient is invariant to the scale of Q but not to its level."""
    agent, batch = make_agent(), following_batch()
    gradient = actor_gradient(agent, batch)
    assert largest_difference(actor_gradient(with_affine_critic(agent, 7.0, 0.0), batch), gradient) < 1e-4
    assert largest_difference(actor_gradient(with_affine_critic(agent, 1.0, 7.0), batch), gradient) > 1e-2
    flat = agent.replace(critic=agent.critic.replace(params=constant_critic(agent.critic.params, 0.0)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actor_gradient(flat, batch)))


def test_large_actor_penalty() -> None:
    """A large actor penalty regresses on the mean of the data.

    Two modes at -0.5 and 0.5: the action is between them, where no data are.
    """
    config = replace(CONFIG, actor_penalty=1e4, actor_lr=3e-3, discount=DISCOUNT)
    agent = ReBRAC.create(KEY, jnp.zeros((1, 1)), jnp.zeros((1, 1)), config)
    table = two_steps()
    table["actions"] = 0.5 * jnp.sign(table["actions"])
    trained = Probe(agent).train(table)
    assert max(abs(mode(trained, state) - float(table["actions"].mean())) for state in (-1.0, 1.0)) < 0.1


def test_probe_with_known_penalty() -> None:
    """The action in state 1 is held at 0.5, the data's next action is -0.3, beta_2 = 0.25: Q(-1) = 0.5 (1 - 0.16)."""
    config = replace(
        CONFIG, actor_penalty=1e4, actor_lr=3e-3, critic_lr=3e-3, tau=0.05, discount=DISCOUNT, critic_penalty=0.25,
        target_noise=0.0, batch_size=64,
    )  # fmt: skip
    agent = ReBRAC.create(KEY, jnp.zeros((1, 1)), jnp.zeros((1, 1)), config)
    table = two_steps()
    ones = jnp.ones_like(table["rewards"])
    table |= {"actions": 0.5 * ones[:, None], "next_actions": -0.3 * ones[:, None], "next_valid": table["masks"]}
    trained = Probe(agent).train(table)
    assert mode(trained, 1.0) == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(q_values(trained, 1.0, np.asarray([0.5])), 1.0, atol=0.05)
    np.testing.assert_allclose(q_values(trained, -1.0, np.asarray([0.5])), 0.5 * (1.0 - 0.25 * 0.64), atol=0.04)
    assert np.abs(q_values(agent, -1.0, np.asarray([0.5])) - 0.42).max() > 0.1


def test_policy_delay() -> None:
    """After 2n calls the critics have 2n steps and the actor n."""
    agent, batch = make_agent(), following_batch(1)
    one, _ = update(agent, batch)
    assert (steps(one.critic), steps(one.actor)) == (1, 0)
    assert not moved(one.target_critic, agent.target_critic) and not moved(one.target_actor, agent.target_actor)
    for _ in range(3):
        one, _ = update(one, batch)
    assert (steps(one.critic), steps(one.actor)) == (4, 2)
    assert moved(one.target_critic, agent.target_critic) and moved(one.target_actor, agent.target_actor)


def test_norm_after_activation() -> None:
    """The critics normalise behind the activation. One layer of 2 units by hand: Dense, ReLU, LayerNorm, Dense."""
    config = replace(CONFIG, critic_hidden_dims=(2,), num_critics=1)
    critic = ReBRAC.create(KEY, jnp.zeros((1, 3)), jnp.zeros((1, 2)), config).critic
    tree = critic.params["params"]
    rows = jax.random.normal(KEY, (5, 5))
    h = np.maximum(np.asarray(rows) @ np.asarray(tree["dense_0"]["kernel"][0]), 0.0)
    h = (h - h.mean(axis=1, keepdims=True)) / np.sqrt(h.var(axis=1, keepdims=True) + 1e-6)
    expected = h @ np.asarray(tree["output"]["kernel"][0])[:, 0]
    np.testing.assert_allclose(critic(rows[:, :3], rows[:, 3:])[0], expected, atol=1e-4)


def test_missing_next_actions_named() -> None:
    """Missing next actions are named, and wrong settings are refused."""
    agent, batch = make_agent(), following_batch(1)
    with pytest.raises(DatasetError, match="no next_actions, next_valid, which ReBRAC needs"):
        agent.update({key: leaf for key, leaf in batch.items() if not key.startswith("next_a") and key != "next_valid"})
    for name in ("actor_penalty", "critic_penalty"):
        with pytest.raises(ConfigError, match=f"ReBRACConfig.{name} is -1"):
            replace(CONFIG, **{name: -1.0})


def test_presets_follow_the_paper() -> None:
    maze = ReBRAC.preset("antmaze")
    config = maze.config
    assert (config.critic_lr, config.actor_lr, config.discount, config.batch_size) == (5e-5, 3e-4, 0.999, 256)
    assert maze.reward == (100.0, 0.0) and not maze.run
    moving = ReBRAC.preset("locomotion").config
    assert (moving.critic_lr, moving.actor_lr, moving.discount, moving.batch_size) == (1e-3, 1e-3, 0.99, 1024)
    assert (config.target_noise, config.noise_clip, config.policy_delay, config.tau) == (0.2, 0.5, 2, 0.005)
    assert config.actor_hidden_dims == config.critic_hidden_dims == (256, 256, 256) and config.critic_layer_norm
    assert ReBRAC.preset("adroit").config.actor_penalty == 0.1


def test_host_replay_matches(tiny_run: Callable[..., Any]) -> None:
    """A run with its replay on the host is the same.

    Two seeds, both phases, a penalty that outweighs the rewards: rounding of two programs is all that differs.
    """
    agents = []
    for device_bytes in (None, 0):
        loop = LoopConfig(eval_every=0, eval_episodes=1, updates_per_dispatch=10, device_bytes=device_bytes)
        trainer = session.build(tiny_run("rebrac", [("critic_penalty", 1e3)], seeds=2, loop=loop))
        assert trainer.offline(20) and trainer.online(40)
        agents.append(trainer.agent)
        trainer.close()
    for name in ("actor", "critic"):
        one, two = (getattr(agent, name) for agent in agents)
        assert largest_difference(one.params, two.params) < 1e-5
    assert agents[0].updates.tolist() == [20 + 39] * 2  # online, the first row comes before the first update
