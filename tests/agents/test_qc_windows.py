"""QC: what it makes of windows (chunk returns, ends, targets), and how fast values travel back."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from o2o.agents import QC
from o2o.replay.buffer import OfflineData
from o2o.rl.windows import Chunks, chunk_rows
from tests.helpers.tiny import ACTION_DIM, OBSERVATION_DIM, constant_critic, create, largest_difference, set_config
from tests.helpers.toy_qc import BASE, DISCOUNT, KEY, H, four_windows, quick, random_windows, targets, update, windows


def test_chunk_return_and_bootstrap() -> None:
    """A constant reward gives the geometric chunk return; the bootstrap factor is the discount to the h."""
    agent = create(QC, BASE)
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 10.0))
    whole = windows(np.full((8, H), 0.5), np.zeros((8, H)), np.ones((8, H)))
    chunks = chunk_rows(whole, DISCOUNT, True)
    expected = 0.5 * (1 - DISCOUNT**H) / (1 - DISCOUNT)
    np.testing.assert_allclose(chunks.returns, expected, rtol=1e-6)
    np.testing.assert_allclose(targets(agent, chunks, KEY), expected + DISCOUNT**H * 10.0, rtol=1e-6)
    np.testing.assert_array_equal(chunks.actions[0], whole["actions"][0].ravel())
    np.testing.assert_array_equal(chunks.observations, whole["observations"][:, 0])
    np.testing.assert_array_equal(chunks.next_observations, whole["next_observations"][:, -1])


def test_windows_over_ends_dropped() -> None:
    """Windows over an end are dropped, and one that ends at a terminal counts without bootstrap."""
    chunks = chunk_rows(four_windows(), DISCOUNT, False)
    np.testing.assert_array_equal(chunks.valid, [1, 0, 1, 0])
    np.testing.assert_array_equal(chunks.masks[jnp.asarray([0, 2])], [1, 0])
    np.testing.assert_array_equal(chunks.entries[:, ::ACTION_DIM], [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    full = 1.0 + DISCOUNT * 2.0 + DISCOUNT**2 * 4.0
    np.testing.assert_allclose(chunks.returns[jnp.asarray([0, 2])], full, rtol=1e-6)
    at_limit = chunk_rows(windows([[1.0] * 3], [[0, 0, 1]], [[1, 1, 1]]), DISCOUNT, False)
    assert float(at_limit.valid[0]) == 1.0 and float(at_limit.masks[0]) == 1.0


def test_terminal_windows_padded() -> None:
    """A window that a true terminal cuts short is padded, and one over a time limit is not."""
    batch = four_windows()
    chunks = chunk_rows(batch, DISCOUNT, True)
    np.testing.assert_array_equal(chunks.valid, [1, 0, 1, 1])
    np.testing.assert_array_equal(chunks.masks, [1, 1, 0, 0])
    np.testing.assert_allclose(chunks.returns[3], 1.0 + DISCOUNT * 2.0, rtol=1e-6)
    first, second = batch["actions"][3, 0], batch["actions"][3, 1]
    np.testing.assert_array_equal(chunks.actions[3], jnp.concatenate([first, second, second]))
    np.testing.assert_array_equal(chunks.entries[3], np.ones(H * ACTION_DIM))
    np.testing.assert_array_equal(chunks.entries[1, ::ACTION_DIM], [1, 1, 0])


def test_invalid_windows_ignored() -> None:
    """An invalid window contributes exactly nothing to the critic."""
    agent = create(QC, BASE)
    batch = four_windows()
    grads = quick(lambda chunks, y: jax.value_and_grad(agent.critic_loss, has_aux=True)(agent.critic.params, chunks, y))
    chunks = chunk_rows(batch, DISCOUNT, True)
    y = targets(agent, chunks, KEY)
    poisoned = chunks._replace(actions=chunks.actions.at[1].set(0.9), observations=chunks.observations.at[1].add(5.0))
    (loss, _), one = grads(chunks, y)
    (again, _), two = grads(poisoned, y.at[1].set(1e6))
    assert float(loss) == float(again) and largest_difference(one, two) == 0.0
    q = agent.critic(chunks.observations, chunks.actions)
    by_hand = np.square(np.asarray(q - y))[:, [0, 2, 3]].sum() / (2 * 4)
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)


def test_invalid_entries_are_zeros() -> None:
    """Invalid entries are zeros in the flow's mean."""
    agent = create(QC, BASE)
    chunks = chunk_rows(four_windows(), DISCOUNT, False)
    loss = quick(lambda chunks: agent.flow_loss(agent.actor.params, chunks, KEY)[0])
    behind = chunks._replace(actions=jnp.where(chunks.entries > 0, chunks.actions, 0.3))
    ones = chunks._replace(entries=jnp.ones_like(chunks.entries))
    time_rng, noise_rng = jax.random.split(KEY)
    t, noise = jax.random.uniform(time_rng, (4,)), jax.random.normal(noise_rng, chunks.actions.shape)
    x = (1 - t[:, None]) * noise + t[:, None] * chunks.actions
    errors = jnp.square(agent.actor(chunks.observations, x, t) - (chunks.actions - noise))
    np.testing.assert_allclose(loss(chunks), np.mean(chunks.entries * errors), rtol=1e-5)
    np.testing.assert_allclose(loss(ones), np.mean(errors), rtol=1e-5)
    assert behind.actions.shape == chunks.actions.shape and float(loss(chunks)) < float(loss(ones))


@pytest.mark.parametrize("aggregate", ["mean", "min"])
def test_target_uses_target_critics(aggregate: Any) -> None:
    """The target judges the next chunk by the target critics."""
    agent = set_config(create(QC, BASE), aggregate=aggregate)
    first = constant_critic(constant_critic(agent.target_critic, 2.0, member=0), 6.0, member=1)
    agent = agent.replace(target_critic=first)
    chunks = chunk_rows(jax.tree.map(lambda leaf: leaf[0], random_windows()), DISCOUNT, True)
    expected = {"mean": 4.0, "min": 2.0}[aggregate]
    np.testing.assert_allclose(targets(agent, chunks, KEY) - chunks.returns, DISCOUNT**H * expected, rtol=1e-5)


# ---------------------------------------------------------------- a whole dataset


def test_dataset_windows_feed_update() -> None:
    """Windows of a dataset feed the update."""
    rng = np.random.default_rng(0)
    rows = {
        "observations": rng.normal(size=(12, OBSERVATION_DIM)).astype(np.float32),
        "actions": np.tanh(rng.normal(size=(12, ACTION_DIM))).astype(np.float32),
        "rewards": np.arange(12, dtype=np.float32),
        "masks": np.ones(12, np.float32),
        "next_observations": rng.normal(size=(12, OBSERVATION_DIM)).astype(np.float32),
        "ends": np.isin(np.arange(12), (4, 11)),
    }
    data = OfflineData.create(rows, ("ends",))
    chunks: Chunks = chunk_rows(data.sample_sequences(KEY, (200,), H), DISCOUNT, True)
    starts = np.asarray(chunks.returns)
    crossing = {float(s + DISCOUNT * (s + 1)) for s in (3,)} | {4.0}
    dropped = {round(float(r), 4) for r in starts[np.asarray(chunks.valid) == 0]}
    assert dropped == {round(value, 4) for value in crossing}
    agent, info = update(create(QC, BASE), data.draw(KEY, (2, 8), H))
    assert 0.0 < float(info["critic/valid"]) <= 1.0 and int(agent.critic.opt_state[0].count) == 2


class Table(struct.PyTreeNode):
    """A critic that looks up the value of a one-hot state."""

    params: jax.Array

    def __call__(self, observations: Any, actions: Any, params: Any = None) -> Any:
        """Return `[1, ...]` values, whatever the actions."""
        table = self.params if params is None else params
        lead = jnp.broadcast_shapes(actions.shape[:-1], observations.shape[:-1])
        return jnp.broadcast_to(observations @ table, (1, *lead))


def backups(horizon: int, length: int) -> tuple[int, np.ndarray]:
    """Return how many sweeps of exact backups a chain needs until nothing moves, and its values `[length]`.

    The last of `length` steps pays 1 and terminates.
    """
    states = jnp.eye(length + 1)
    position = jnp.arange(length)
    rows = {
        "observations": states[:-1],
        "actions": jnp.zeros((length, ACTION_DIM)),
        "rewards": (position == length - 1).astype(jnp.float32),
        "masks": (position < length - 1).astype(jnp.float32),
        "next_observations": states[1:],
        "ends": (position == length - 1).astype(jnp.float32),
    }
    index = jnp.minimum(position[:, None] + jnp.arange(horizon), length - 1)
    inside = position[:, None] + jnp.arange(horizon) < length
    batch = {**jax.tree.map(lambda leaf: leaf[index], rows), "valid": inside.astype(jnp.float32)}
    chunks = chunk_rows(batch, 0.9, True)
    config = replace(BASE, chunk=horizon, num_samples=1, discount=0.9)
    example = jnp.zeros((1, length + 1)), jnp.zeros((1, ACTION_DIM))
    agent = quick(lambda key: QC.create(key, *example, config))(KEY)
    table, sweeps = jnp.zeros(length + 1), 0
    sweep = quick(lambda a, t: a.replace(critic=Table(t), target_critic=t).targets(chunks, KEY))
    while True:
        after = table.at[:-1].set(sweep(agent, table))
        if np.allclose(after, table, atol=1e-6):
            return sweeps, np.asarray(table[:-1])
        table, sweeps = after, sweeps + 1


def test_chunks_speed_up_backups() -> None:
    """A delayed reward needs one h-th of the backups and ends at the same values."""
    one, values = backups(1, 20)
    chunked, again = backups(4, 20)
    assert (one, chunked) == (20, 5)
    np.testing.assert_allclose(values, 0.9 ** np.arange(19, -1, -1), rtol=1e-5)
    np.testing.assert_allclose(again, values, rtol=1e-5)
