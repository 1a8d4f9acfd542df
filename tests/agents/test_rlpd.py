"""RLPD: the invariants of its ensemble, random-subset target, mean-of-members actor and update schedule."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents.sac import RLPD, RLPDConfig
from o2o.nn.modules import Adam, CriticEnsemble
from tests.helpers.tiny import (
    ACTION_DIM,
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

KEY = jax.random.key(5)
MEMBERS = 4


def rlpd(**changes: Any) -> Any:
    return set_config(create(RLPD, tiny(RLPDConfig())), **changes)


def silent(subset: int | None) -> Any:
    """Return an agent without entropy in the target whose policy has no noise."""
    return constant_policy(rlpd(target_subset=subset, backup_entropy=False), std=1e-8, mean=None)


draws = jax.jit(jax.vmap(lambda agent, batch, key: next_values(agent, batch, key), in_axes=(None, None, 0)))


def member_targets(agent: Any, batch: Any) -> np.ndarray:
    """Return every target member's value `[E, B]` at the mode of a policy without noise."""
    actions = agent.actor(batch["next_observations"]).mode()
    return np.asarray(agent.critic(batch["next_observations"], actions, params=agent.target_critic))


def frozen_critic() -> Any:
    return rlpd().replace(critic=rlpd().critic.replace(optimizer=Adam(0.0)))


def test_full_subset_minimum() -> None:
    """The full subset is the minimum over all members."""
    batch = make_batch()
    expected = member_targets(silent(MEMBERS), batch).min(axis=0)
    for agent in (silent(MEMBERS), silent(None)):
        np.testing.assert_allclose(next_values(agent, batch, KEY), expected, atol=1e-5)


def test_subset_of_one() -> None:
    """A subset of one is one member, and all are drawn."""
    batch, agent = make_batch(), silent(1)
    members = member_targets(agent, batch)
    drawn = np.asarray(draws(agent, batch, jax.random.split(KEY, 64)))
    distance = np.abs(drawn[:, None] - members).max(axis=-1)
    assert distance.min(axis=1).max() < 1e-5
    assert set(distance.argmin(axis=1)) == set(range(MEMBERS))


def test_subset_of_two() -> None:
    """A subset of two is the minimum of two different members.

    One draw serves the whole minibatch; an index never repeats: a single member's row never comes out as it is.
    """
    batch, agent = make_batch(rows=32), silent(2)
    members = member_targets(agent, batch)
    pairs = [(i, j) for i in range(MEMBERS) for j in range(i + 1, MEMBERS)]
    minima = np.stack([np.minimum(members[i], members[j]) for i, j in pairs])
    drawn = np.asarray(draws(agent, batch, jax.random.split(KEY, 128)))
    assert np.abs(drawn[:, None] - minima).max(axis=-1).min(axis=1).max() < 1e-5
    assert np.abs(drawn[:, None] - members).max(axis=-1).min() > 1e-3
    assert len(set(np.abs(drawn[:, None] - minima).max(axis=-1).argmin(axis=1))) == len(pairs)


def test_low_member_target() -> None:
    """A low member moves the target only when drawn."""
    batch, agent = make_batch(), silent(1)
    low = agent.replace(target_critic=constant_critic(agent.target_critic, -1e6, member=0))
    keys = jax.random.split(KEY, 64)
    before, after = np.asarray(draws(agent, batch, keys)), np.asarray(draws(low, batch, keys))
    hit = np.all(np.isclose(after, -1e6, rtol=1e-6), axis=1)
    assert 0 < hit.sum() < 64
    np.testing.assert_array_equal(after[~hit], before[~hit])


def test_backup_entropy_in_target() -> None:
    """The target depends on alpha only with entropy in the backup.

    From alpha 1 to 2 v changes by -ln pi(a'|s') with e = 1, by 0 with e = 0: v is linear in alpha.
    """
    batch = make_batch()
    for agent, factor in ((rlpd(), -1.0), (rlpd(backup_entropy=False), 0.0)):

        def value(free: Any, agent: Any = agent) -> Any:
            temperature = agent.temperature.replace(params={"params": {"value": free}})
            return next_values(agent.replace(temperature=temperature), batch, KEY)

        slope = value(jnp.log(2.0)) - value(jnp.zeros(()))  # alpha = exp(p)
        policy, (_, action_rng) = agent.actor(batch["next_observations"]), jax.random.split(KEY)
        log_prob = policy.sample_and_log_prob(action_rng)[1]
        assert float(jnp.abs(log_prob).min()) > 1e-3
        np.testing.assert_allclose(slope, factor * log_prob, atol=1e-4)


def test_terminal_targets() -> None:
    """The target is the reward at terminals and bootstraps elsewhere."""
    batch = {**make_batch(), "rewards": jnp.zeros(8)}
    agent = silent(2).replace(target_critic=constant_critic(silent(2).target_critic, 3.0))
    _, info = critic_step(agent, batch, KEY)
    assert float(info["critic/target"]) == pytest.approx(0.99 * 3.0 * 7 / 8, rel=1e-5)
    over = {**batch, "masks": jnp.zeros(8)}
    assert float(critic_step(agent, over, KEY)[1]["critic/target"]) == 0.0


def test_member_share_in_gradient() -> None:
    """Replacing a member by -1e6 everywhere takes exactly its share 1/E out of the gradient."""
    agent, batch = rlpd(), make_batch()
    flat = agent.critic.replace(params=constant_critic(agent.critic.params, -1e6, member=1))
    full, without = policy_gradient(agent, batch, KEY), policy_gradient(agent, batch, KEY, flat)
    removed = jax.tree.map(jnp.subtract, full, without)
    actor_rng, _ = jax.random.split(KEY)

    def share(params: Any) -> Any:
        actions = agent.actor(batch["observations"], params=params).sample(actor_rng)
        return -jnp.mean(agent.critic(batch["observations"], actions)[1]) / MEMBERS

    expected = jax.jit(jax.grad(share))(agent.actor.params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-3
    assert largest_difference(removed, expected) < 1e-5


def test_steps_per_call() -> None:
    """A call takes G critic steps and one policy step, on the last block."""
    agent, batch = frozen_critic(), make_batch(5)
    after, _ = update(agent, batch)
    assert (steps(after.critic), steps(after.actor), steps(after.temperature)) == (5, 1, 1)
    blocks = (jax.tree.map(lambda leaf: leaf.at[:4].multiply(2.0), batch), jax.tree.map(lambda leaf: leaf * 2.0, batch))
    earlier, last = (update(agent, block)[0] for block in blocks)
    assert not moved(after.actor.params, earlier.actor.params)
    assert not moved(after.temperature.params, earlier.temperature.params)
    assert moved(after.actor.params, last.actor.params)


def test_target_moves_per_call() -> None:
    """The target moves G times per call.

    With frozen critics and targets at distance 1, G averages leave a distance of (1 - tau)^G.
    """
    agent = frozen_critic()
    agent = agent.replace(target_critic=jax.tree.map(lambda leaf: leaf + 1.0, agent.critic.params))
    after, _ = update(agent, make_batch(5))
    distance = jax.tree.map(lambda target, online: target - online, after.target_critic, after.critic.params)
    for leaf in jax.tree.leaves(distance):
        np.testing.assert_allclose(leaf, 0.995**5, atol=1e-5)


def test_members_stay_different() -> None:
    """Members differ at birth and after a hundred steps."""
    agent, batch = rlpd(), make_batch(20, rows=16)
    observations, actions = batch["observations"][0], batch["actions"][0]

    def spread(agent: Any) -> float:
        q = np.asarray(agent.critic(observations, actions))
        return min(float(np.std(q[i] - q[j])) for i in range(MEMBERS) for j in range(i))

    assert spread(agent) > 1e-2
    for _ in range(5):
        agent, info = update(agent, batch)
        assert all(np.isfinite(value) for value in info.values())
    assert steps(agent.critic) == 100
    assert spread(agent) > 1e-2


def test_layer_norm_bounds_values() -> None:
    """LayerNorm bounds values far from the data.

    After LayerNorm the last hidden vector has norm at most sqrt(width), whatever the input.
    """
    observations, actions = make_batch(rows=32)["observations"], make_batch(rows=32)["actions"]
    growth = {}
    for layer_norm in (True, False):
        critic = CriticEnsemble((16, 16), MEMBERS, layer_norm, init_scheme="xavier")
        params: Any = critic.init(jax.random.key(0), observations, actions)
        apply: Any = critic.apply
        near, far = (np.abs(apply(params, s * observations, s * actions)) for s in (1.0, 1000.0))
        growth[layer_norm] = far.max() / near.max()
        if layer_norm:
            head = params["params"]["output"]
            bound = np.linalg.norm(head["kernel"][..., 0], axis=-1) * np.sqrt(16) + np.abs(head["bias"][..., 0])
            assert np.all(far <= bound[:, None] + 1e-4)
    assert growth[True] < 10 < 500 < growth[False]


@pytest.mark.parametrize(("std", "falls"), [(0.08, False), (0.5, True)])
def test_temperature_direction(std: float, falls: bool) -> None:
    """The temperature falls if and only if the entropy exceeds minus half the dimension."""
    agent, batch = constant_policy(rlpd(), std), make_batch()
    stepped, info = policy_step(agent, batch, KEY, agent.critic)
    assert (float(info["actor/entropy"]) > -ACTION_DIM / 2) == falls
    assert (float(stepped.alpha()) < float(agent.alpha())) == falls
    expected = float(agent.alpha()) * (float(info["actor/entropy"]) + ACTION_DIM / 2)
    assert float(info["temperature/loss"]) == pytest.approx(expected, rel=1e-5)


def test_paper_presets() -> None:
    locomotion = RLPD.preset("locomotion").config
    assert (locomotion.num_critics, locomotion.target_subset, locomotion.subset_replace) == (10, 2, False)
    assert locomotion.actor_reduce == "mean" and locomotion.target_entropy == 0.5 and locomotion.backup_entropy
    assert locomotion.critic_layer_norm and not locomotion.actor_layer_norm and locomotion.init_scheme == "xavier"
    assert locomotion.online.utd_ratio == 20 and locomotion.online.random_steps == 5000
    assert locomotion.online.replay == "mixed" and locomotion.online.offline_ratio == 0.5
    assert locomotion.online.first_update() == 5000
    maze, adroit = RLPD.preset("antmaze"), RLPD.preset("adroit")
    assert (maze.config.target_subset, maze.config.backup_entropy, maze.reward) == (1, False, (1.0, -1.0))
    assert maze.config.critic_hidden_dims == (256, 256, 256) == adroit.config.actor_hidden_dims
    assert (maze.online_steps, adroit.online_steps, adroit.config.target_subset) == (300_000, 1_000_000, 2)
    small = RLPD.preset("adroit", "small").config
    assert (small.num_critics, small.target_subset, small.online.utd_ratio, small.batch_size) == (4, 2, 4, 128)
    assert replace(small.online, utd_ratio=20, random_steps=5000) == locomotion.online
