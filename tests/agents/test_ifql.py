"""IFQL: losses by hand, the expectile's limits, whole and cut windows, selection, what moves what, settings."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import IFQL, IFQLConfig
from o2o.rl.losses import lower_bound
from o2o.rl.windows import Chunks, chunk_rows
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
)
from tests.helpers.toy_qc import DISCOUNT, KEY, H, four_windows, quick, random_windows, update

TINY = IFQLConfig(
    chunk=H,
    num_samples=4,
    flow_steps=3,
    batch_size=8,
    actor_hidden_dims=(16, 16),
    critic_hidden_dims=(16, 16),
    value_hidden_dims=(16, 16),
)
propose = quick(lambda agent, obs, rng: agent.propose(obs, rng))
flow_chunks = quick(lambda agent, obs, noise: agent.flow_chunks(obs, noise))
losses = quick(
    lambda agent, chunks: (
        agent.value_loss(agent.value.params, chunks)[0],
        agent.critic_loss(agent.critic.params, chunks)[0],
        agent.targets(chunks),
    )
)


def chunks_of(batch: Any, pad: bool = True) -> Chunks:
    return chunk_rows(batch, DISCOUNT, pad)


@pytest.mark.parametrize("aggregate", ["min", "lower_bound"])
@pytest.mark.parametrize("pad", [True, False])
def test_losses_by_hand(aggregate: Any, pad: bool) -> None:
    """L_V, y and L_Q of windows at time limits and terminals are those of the equations."""
    agent = set_config(create(IFQL, TINY), aggregate=aggregate, expectile=0.8)
    agent = agent.replace(target_critic=jax.tree.map(lambda leaf: 1.5 * leaf, agent.target_critic))
    chunks = chunks_of(four_windows(), pad)
    valid = np.asarray([1, 0, 1, 1] if pad else [1, 0, 1, 0], np.float32)
    np.testing.assert_array_equal(chunks.valid, valid)
    q = np.asarray(agent.critic(chunks.observations, chunks.actions))
    old = np.asarray(agent.critic(chunks.observations, chunks.actions, params=agent.target_critic))
    v, after = (np.asarray(agent.value(seen)) for seen in (chunks.observations, chunks.next_observations))
    judged = old.min(axis=0) if aggregate == "min" else old.mean(axis=0) - 0.5 * old.std(axis=0)
    u = judged - v
    value_loss, critic_loss, y = losses(agent, chunks)
    np.testing.assert_allclose(value_loss, np.mean(valid * np.abs(0.8 - (u < 0)) * u**2), rtol=1e-4)
    whole, part = 1 + 2 * 0.99 + 4 * 0.99**2, 1 + 2 * 0.99
    returns = np.asarray([whole, part, whole, part])
    expected = returns + 0.99**3 * np.asarray([1, 1, 0, 0]) * after
    np.testing.assert_allclose(y, expected, rtol=1e-4)
    np.testing.assert_allclose(critic_loss, np.mean(valid * (q - expected) ** 2), rtol=1e-4)


def test_transitions() -> None:
    """With h = 1 the update is IQL's on plain rows."""
    agent = create(IFQL, replace(TINY, chunk=1))
    assert agent.needs.window == 1 and agent.initial_carry((4,)) is None
    batch = make_batch(utd=1, seed=4)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    y = rows["rewards"] + 0.99 * rows["masks"] * agent.value(rows["next_observations"])
    q = agent.critic(rows["observations"], rows["actions"])
    u = q.min(axis=0) - agent.value(rows["observations"])
    _, info = update(agent, batch)
    np.testing.assert_allclose(info["critic/loss"], np.mean(np.square(q - y)), rtol=1e-4)
    np.testing.assert_allclose(info["value/loss"], np.mean(np.where(u < 0, 0.1, 0.9) * u**2), rtol=1e-4)


@pytest.mark.parametrize(("expectile", "wanted"), [(0.5, 0.5), (0.9, 0.9)])
def test_expectile_of_coin(expectile: float, wanted: float) -> None:
    """On Q of 0 and 1 in equal shares V is the expectile itself: at 0.5 the mean."""
    linear = replace(TINY, chunk=1, critic_hidden_dims=(), value_hidden_dims=(), expectile=expectile)
    agent = create(IFQL, linear)
    kernel = jnp.zeros((2, OBSERVATION_DIM + ACTION_DIM, 1)).at[:, OBSERVATION_DIM].set(1.0)  # Q is the first number
    agent = agent.replace(target_critic={"params": {"output": {"kernel": kernel, "bias": jnp.zeros((2, 1))}}})
    actions = jnp.tile(jnp.asarray([[0.0, 0.3], [1.0, -0.2]]), (4, 1))
    rows = {**jax.tree.map(lambda x: x[:, None], make_batch()), "actions": actions[:, None], "valid": jnp.ones((8, 1))}
    chunks = chunks_of(rows)._replace(observations=jnp.zeros((8, OBSERVATION_DIM)))

    def step(params: Any, _: None) -> tuple[Any, None]:
        grads = jax.grad(lambda p: agent.value_loss(p, chunks)[0])(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), None

    params = quick(lambda p: jax.lax.scan(step, p, None, length=200)[0])(agent.value.params)
    np.testing.assert_allclose(agent.value(jnp.zeros((1, OBSERVATION_DIM)), params=params), wanted, atol=1e-3)


def test_lower_bound() -> None:
    """It takes the deviation of all members: of 1 and 3 it is 1.5, and of equal ones their value."""
    np.testing.assert_allclose(lower_bound(jnp.asarray([[1.0], [3.0]]), 0.5), [1.5])
    np.testing.assert_allclose(lower_bound(jnp.full((10, 2), 4.0), 7.0), [4.0, 4.0])


def test_selection() -> None:
    """Each observation gets the sample with the highest min Q; a constant critic leaves the first one."""
    agent = create(IFQL, TINY)
    observations = jax.random.normal(KEY, (6, OBSERVATION_DIM))
    candidates = flow_chunks(agent, observations, jax.random.normal(jax.random.key(9), (4, 6, H * ACTION_DIM)))
    scores = np.asarray(agent.critic(observations, candidates).min(axis=0))
    chosen = np.asarray(propose(agent, observations, jax.random.key(9)))
    for row, best in enumerate(scores.argmax(axis=0)):
        np.testing.assert_allclose(chosen[row], candidates[best, row], atol=1e-6)
    assert len(set(scores.argmax(axis=0))) > 1, "rows differ"
    flat = agent.replace(critic=agent.critic.replace(params=constant_critic(agent.critic.params, 1.0)))
    np.testing.assert_allclose(propose(flat, observations, jax.random.key(9)), candidates[0], atol=1e-6)
    other = agent.replace(target_critic=constant_critic(agent.target_critic, 0.0))
    np.testing.assert_array_equal(propose(other, observations, jax.random.key(9)), chosen)


def test_single_sample_is_cloning() -> None:
    """Of one sample nothing is chosen: the critics have no say."""
    agent = set_config(create(IFQL, TINY), num_samples=1)
    observations = jax.random.normal(KEY, (6, OBSERVATION_DIM))
    noise = jax.random.normal(jax.random.key(9), (1, 6, H * ACTION_DIM))
    expected = flow_chunks(agent, observations, noise[0])
    np.testing.assert_allclose(propose(agent, observations, jax.random.key(9)), expected, atol=1e-6)


def test_queue() -> None:
    """A chunk is played in order, then another one is chosen."""
    agent = create(IFQL, TINY)
    observations = jax.random.normal(KEY, (2, OBSERVATION_DIM))
    act = quick(lambda carry, key: agent.sample_actions(observations, carry, key))
    carry, played = agent.initial_carry((2,)), []
    for key in range(H + 1):
        action, carry = act(carry, jax.random.key(key))
        played.append(np.asarray(action))
    chunk = np.asarray(propose(agent, observations, jax.random.key(0))).reshape(2, H, ACTION_DIM)
    np.testing.assert_allclose(np.stack(played[:H], axis=1), chunk, atol=1e-6)
    again = np.asarray(propose(agent, observations, jax.random.key(H))).reshape(2, H, ACTION_DIM)
    np.testing.assert_allclose(played[H], again[:, 0], atol=1e-6)


def test_critics_know_no_policy() -> None:
    """Another flow changes neither L_V nor L_Q, and other critics do not change the flow's step."""
    agent = create(IFQL, TINY)
    other = agent.replace(actor=agent.actor.replace(params=jax.tree.map(lambda x: 2.0 * x, agent.actor.params)))
    (one, _), (two, _) = (update(each, random_windows()) for each in (agent, other))
    assert not moved(one.critic.params, two.critic.params) and not moved(one.value.params, two.value.params)
    flat = agent.replace(critic=agent.critic.replace(params=constant_critic(agent.critic.params, 1.0)))
    assert not moved(update(flat, random_windows())[0].actor.params, one.actor.params)


def test_lag_of_target() -> None:
    """The target takes the critics of before the step: still after one update, then tau of the first step."""
    agent = create(IFQL, TINY)
    one, _ = update(agent, random_windows())
    assert largest_difference(one.target_critic, agent.target_critic) < 1e-7 and steps(one.critic) == 1
    two, _ = update(one, random_windows(1))
    mixed = jax.tree.map(lambda new, old: 0.005 * new + 0.995 * old, one.critic.params, one.target_critic)
    assert largest_difference(two.target_critic, mixed) < 1e-7


def test_cut_windows_do_not_count() -> None:
    """What stands in a window that a time limit cuts changes neither V nor the critics."""
    agent, batch = create(IFQL, TINY), four_windows()
    noisy = {**batch, "rewards": batch["rewards"].at[1].set(99.0), "actions": batch["actions"].at[1].add(0.3)}
    results = [losses(agent, chunks_of(each))[:2] for each in (batch, noisy)]
    np.testing.assert_array_equal(results[0], results[1])


def test_published_settings() -> None:
    """OGBench's tasks have the settings of QAM's table by the dataset's name; other data have FQL's."""
    preset = IFQL.preset("other")
    puzzle = preset.of_task("ogbench/puzzle-3x3-play-singletask-task4-v0")
    assert (puzzle.config.expectile, puzzle.config.chunk, puzzle.config.num_critics) == (0.95, 5, 10)
    assert (puzzle.offline_steps, puzzle.online_steps, puzzle.config.online.warmup_steps) == (1_000_000, 500_000, 5000)
    giant = preset.of_task("ogbench/antmaze-giant-navigate-v0").config
    assert (giant.discount, giant.expectile, giant.chunk, giant.rho) == (0.995, 0.8, 1, 0.5)
    maze = IFQL.preset("antmaze").of_task("D4RL/antmaze/large-play-v1")
    assert (maze.config.num_critics, maze.config.aggregate, maze.config.chunk) == (2, "min", 1)
    assert (maze.offline_steps, maze.reward) == (1_000_000, (1.0, -1.0))
