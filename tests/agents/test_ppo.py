"""PPO: advantages and returns by hand, the first minibatch's ratio, clipping, padding, decay, what the switch keeps."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import PPO, PPOConfig
from o2o.errors import ConfigError
from o2o.rl.losses import clipped_surrogate, generalised_advantages
from o2o.types import Batch, OnlineConfig
from tests.helpers.tiny import create, make_batch, set_config

STEPS, ENVS = 6, 2
CONFIG = PPOConfig(
    actor_hidden_dims=(16,),
    value_hidden_dims=(16,),
    batch_size=4,
    epochs=2,
    actor_lr=1e-2,
    value_lr=1e-2,
    decay_steps=None,
    online=OnlineConfig(replay="rollout", num_envs=ENVS, rollout_steps=STEPS * ENVS),
)
update = jax.jit(lambda agent, rows: agent.update(rows))


def make_agent(**changes: Any) -> Any:
    return set_config(create(PPO, CONFIG).online(), **changes)


def rollout(seed: int = 0) -> Batch:
    """Return a rollout, leaves `[STEPS, ENVS, ...]`: a terminal at (1, 0), a time limit at (3, 1)."""
    rows = {key: leaf.reshape(STEPS, ENVS, *leaf.shape[1:]) for key, leaf in make_batch(rows=12, seed=seed).items()}
    masks, ends = np.ones((STEPS, ENVS), np.float32), np.zeros((STEPS, ENVS), np.float32)
    masks[1, 0], ends[1, 0], ends[3, 1] = 0.0, 1.0, 1.0
    following = jnp.concatenate([rows["observations"][1:], rows["next_observations"][-1:]])
    following = jnp.where(ends[..., None] > 0, rows["next_observations"], following)
    return {**rows, "next_observations": following, "masks": jnp.asarray(masks), "ends": jnp.asarray(ends)}


def test_lambda_zero_advantage() -> None:
    """With lambda 0 the advantage is the TD error, and a time limit bootstraps."""
    agent, rows = make_agent(gae_lambda=0.0, reward_scale=0.5), rollout()
    advantages, returns = agent.advantages(rows)
    v, following = agent.value(rows["observations"]), agent.value(rows["next_observations"])
    expected = 0.5 * rows["rewards"] + 0.99 * rows["masks"] * following - v
    np.testing.assert_allclose(advantages, expected, atol=1e-6)
    np.testing.assert_allclose(returns, expected + v, atol=1e-6)
    assert abs(float(returns[3, 1] - 0.5 * rows["rewards"][3, 1])) > 1e-3  # the time limit's next value counts
    assert float(returns[1, 0]) == pytest.approx(0.5 * float(rows["rewards"][1, 0]), abs=1e-6)  # the terminal's not


def test_lambda_one_return() -> None:
    """With lambda 1 the return is the discounted sum up to each end."""
    agent, rows = make_agent(gae_lambda=1.0), rollout()
    _, returns = agent.advantages(rows)
    rewards = np.asarray(rows["rewards"], np.float64)
    following = np.asarray(agent.value(rows["next_observations"]), np.float64)
    for env in range(ENVS):
        total = 0.0
        for t in reversed(range(STEPS)):
            if rows["ends"][t, env] or t == STEPS - 1:
                total = float(rows["masks"][t, env]) * following[t, env]
            total = rewards[t, env] + 0.99 * total
            assert float(returns[t, env]) == pytest.approx(total, abs=1e-4)


def test_advantages_stop_at_ends() -> None:
    """Nothing crosses an episode's end."""
    deltas, ends = jnp.asarray([1.0, 2.0, 4.0]), jnp.asarray([0.0, 1.0, 0.0])
    np.testing.assert_allclose(generalised_advantages(deltas, ends, 0.5, 0.5), [1.5, 2.0, 4.0])


def test_clipped_surrogate() -> None:
    """The surrogate takes the worse of clipped and unclipped."""
    ratio, advantages = jnp.asarray([1.5, 1.5, 0.5, 0.5]), jnp.asarray([1.0, -1.0, 1.0, -1.0])
    np.testing.assert_allclose(clipped_surrogate(ratio, advantages, 0.2), [1.2, -1.5, 0.5, -0.8])


def test_minibatch_ratios() -> None:
    """The first minibatch has ratio 1, and later ones do not."""
    _, info = update(make_agent(), rollout())
    assert float(info["ppo/first_ratio"]) == pytest.approx(1.0, abs=1e-6)
    assert abs(float(info["ppo/ratio"]) - 1.0) > 1e-6


def test_rows_count_once_per_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every row counts once per epoch, also where the last minibatch is short."""
    agent, rows = make_agent(batch_size=5, epochs=1), rollout()
    seen = []

    def record(self: Any, table: Batch, weight: jax.Array, rate: Any) -> Any:
        seen.append((np.asarray(table["returns"]), np.asarray(weight)))
        return self, {"ppo/ratio": jnp.ones(())}

    monkeypatch.setattr(PPO, "minibatch_step", record)
    with jax.disable_jit():
        agent.update(rows)
    assert len(seen) == 3 and all(len(weight) == 5 for _, weight in seen)
    values = np.concatenate([returns[weight > 0] for returns, weight in seen])
    np.testing.assert_allclose(np.sort(values), np.sort(np.ravel(agent.advantages(rows)[1])), atol=1e-6)


def test_linear_rate_decay() -> None:
    """Rates fall linearly with environment steps."""
    agent = make_agent(decay_steps=24)
    first, info = update(agent, rollout())
    assert float(info["ppo/rate"]) == 1.0 and int(first.seen) == 12
    second, info = update(first, rollout(1))
    assert float(info["ppo/rate"]) == 0.5
    last, info = update(second, rollout(2))
    assert float(info["ppo/rate"]) == 0.0
    for one, two in zip(jax.tree.leaves(last.actor.params), jax.tree.leaves(second.actor.params), strict=True):
        np.testing.assert_array_equal(one, two)


def test_zero_rate_keeps_policy() -> None:
    """The policy stays without a rate."""
    agent = PPO.create(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 2)), replace(CONFIG, actor_lr=0.0)).online()
    moved, _ = update(agent, rollout())
    for one, two in zip(jax.tree.leaves(moved.actor.params), jax.tree.leaves(agent.actor.params), strict=True):
        np.testing.assert_array_equal(one, two)


def test_value_clip() -> None:
    """V is not rewarded for moving further than its clip."""
    agent = make_agent(value_clip=0.1)
    rows = {"observations": jnp.zeros((2, 3)), "returns": jnp.asarray([5.0, -5.0])}
    v = agent.value(rows["observations"])
    rows["old_values"] = v - jnp.asarray([0.5, 0.5])  # V is already 0.5 above: too far towards 5, wrong way for -5
    for weight, moves in (([1.0, 0.0], False), ([0.0, 1.0], True)):
        grads = jax.grad(agent.value_loss)(agent.value.params, rows, jnp.asarray(weight))
        assert any(leaf.any() for leaf in jax.tree.leaves(grads)) == moves
    loss = agent.value_loss(agent.value.params, rows, jnp.ones(2))
    expected = np.mean([(float(rows["old_values"][0]) + 0.1 - 5.0) ** 2, (float(v[1]) + 5.0) ** 2])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_pretraining_losses() -> None:
    """Pre-training clones and fits V to scaled returns."""
    agent, batch = set_config(create(PPO, CONFIG), reward_scale=0.1), make_batch(utd=200)
    batch = {key: jnp.broadcast_to(leaf[:1], leaf.shape) for key, leaf in batch.items()}
    trained, _ = update(agent.replace(actor=agent.actor, value=agent.value), batch)
    rows = {key: leaf[0] for key, leaf in batch.items()}
    gain = trained.actor(rows["observations"]).log_prob(rows["actions"]).mean()
    assert float(gain) > float(agent.actor(rows["observations"]).log_prob(rows["actions"]).mean()) + 0.1
    error = lambda a: float(jnp.square(a.value(rows["observations"]) - 0.1 * rows["mc_returns"]).mean())  # noqa: E731
    assert error(trained) < 0.8 * error(agent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"gae_lambda": 1.5}, "gae_lambda is 1.5"),
        ({"online": OnlineConfig()}, "needs 'rollout'"),
        ({"online": replace(CONFIG.online, num_envs=5)}, "rollout_steps is 12 with num_envs 5; expected a multiple"),
        ({"online": replace(CONFIG.online, utd_ratio=4)}, "utd_ratio is 4, which an on-policy agent does not read"),
        ({"online": replace(CONFIG.online, warmup_steps=10)}, "warmup_steps is 10, .* leave it at 0"),
        ({"online": replace(CONFIG.online, random_steps=10)}, "random_steps is 10"),
        ({"online": replace(CONFIG.online, min_rows=10)}, "min_rows is 10"),
        ({"online": replace(CONFIG.online, initial_updates=10)}, "initial_updates is 10"),
        ({"online": replace(CONFIG.online, offline_ratio=0.0)}, r"offline_ratio is 0.0, .* leave it at 0.5"),
    ],
)
def test_wrong_settings_refused(change: dict[str, Any], message: str) -> None:
    """Settings that cannot work are refused."""
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)
