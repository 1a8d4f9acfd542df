"""Residual RL: zero start, bounds, n-step targets worked by hand, who learns when, settings that are refused."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import Residual, ResidualConfig
from o2o.agents.residual import critic_loss, seen
from o2o.errors import ConfigError
from o2o.nn.encoders import EncoderConfig
from o2o.nn.modules import Adam
from o2o.replay.buffer import OfflineData, ReplayBuffer, sample_minibatches
from o2o.rl.windows import n_step_rows
from o2o.types import Batch, OnlineConfig
from tests.helpers.contract import QUICK
from tests.helpers.tiny import constant_critic, largest_difference, moved, set_config, steps

ROWS, STATE, ACTION, SCALE, GAMMA = 6, 3, 2, 0.1, 0.9
ONLINE = OnlineConfig(utd_ratio=4, random_steps=10, replay="mixed", initial_updates=0)
CONFIG = ResidualConfig(
    actor_hidden_dims=(16, 16),
    critic_hidden_dims=(16, 16),
    num_critics=4,
    batch_size=ROWS,
    online=ONLINE,
    residual_scale=SCALE,
    discount=GAMMA,
    actor_lr=1e-2,
    critic_lr=1e-2,
)


def observe(shape: tuple[int, ...], seed: int = 0) -> dict[str, jax.Array]:
    """Return random observations `[*shape, ...]`."""
    draw = np.random.default_rng(seed)
    state = draw.normal(size=(*shape, STATE)) * 3.0
    return {
        "state": jnp.asarray(state, jnp.float32),
        "base_action": jnp.asarray(draw.uniform(-1, 1, (*shape, ACTION)), jnp.float32),
    }


def windows(width: int = 3, lead: tuple[int, ...] = (ROWS,), seed: int = 0, **changes: Any) -> Batch:
    """Return random windows in the middle of an episode, leaves `[*lead, width, ...]`; `changes` replace leaves."""
    draw, shape = np.random.default_rng(seed), (*lead, width)
    batch: Batch = {
        "observations": observe(shape, seed + 1),
        "actions": jnp.asarray(draw.uniform(-1, 1, (*shape, ACTION)), jnp.float32),
        "rewards": jnp.asarray(draw.normal(size=shape), jnp.float32),
        "masks": jnp.ones(shape),
        "next_observations": observe(shape, seed + 2),
        "ends": jnp.zeros(shape),
        "valid": jnp.ones(shape),
    }
    return {**batch, **{key: jnp.broadcast_to(jnp.asarray(value), shape) for key, value in changes.items()}}


@functools.cache
def make(config: ResidualConfig = CONFIG) -> Residual:
    """Return the agent of key 0."""
    create = lambda key: Residual.create(key, observe((1,)), jnp.zeros((1, ACTION)), config)  # noqa: E731
    return jax.jit(create, compiler_options=QUICK)(jax.random.key(0))


@functools.cache
def restless() -> Residual:
    """Return an agent whose actor's parameters are far from their start."""
    agent = make()
    keys = iter(jax.random.split(jax.random.key(7), 99))
    params = jax.tree.map(lambda leaf: 3.0 * jax.random.normal(next(keys), leaf.shape), agent.actor.params)
    return agent.replace(actor=agent.actor.replace(params=params), target_actor=params)


def rows_of(batch: Batch, config: ResidualConfig) -> Batch:
    """Return the n-step rows of windows `[ROWS, width, ...]`."""
    return n_step_rows(batch, config.n_step, config.discount, config.timeouts)


jit = functools.partial(jax.jit, compiler_options=QUICK)
update = jit(lambda agent, batch: agent.update(batch))
critic_step = jit(lambda agent, batch, rng: agent.critic_step(batch, rng))
actor_step = jit(lambda agent, batch, rng: agent.actor_step(batch, rng))
targets = jit(lambda agent, batch, rng: agent.targets(rows_of(batch, agent.config), rng))
act = jit(lambda agent, obs, rng, det: agent.sample_actions(obs, None, rng, det)[0], static_argnums=3)
explore = jit(lambda agent, obs, rng: agent.random_actions(obs, rng, ACTION))
means = jit(lambda agent, obs: agent.actor(agent.see(obs)))


def test_residual_starts_at_zero() -> None:
    """The residual is exactly zero at the start."""
    observations = observe((50,))
    np.testing.assert_array_equal(means(make(), observations), np.zeros((50, ACTION)))
    actions = act(make(), observations, jax.random.key(0), True)
    np.testing.assert_array_equal(actions, observations["base_action"])


def test_residual_bounds() -> None:
    """The mean residual never exceeds its scale, and combined actions stay in bounds."""
    observations = observe((200,))
    residuals = np.asarray(means(restless(), observations))
    assert np.abs(residuals).max() <= SCALE and np.abs(residuals).max() > 0.9 * SCALE
    edge = {**observations, "base_action": jnp.sign(observations["base_action"])}
    actions = np.asarray(act(restless(), edge, jax.random.key(0), True))
    assert np.abs(actions).max() == 1.0 and np.abs(actions).min() >= 1.0 - SCALE - 1e-6


def test_sampled_noise() -> None:
    """Samples add noise that may exceed the scale."""
    observations = jax.tree.map(lambda leaf: 0.0 * leaf, observe((4000,)))
    sampled = np.asarray(act(make(), observations, jax.random.key(1), False))
    assert abs(sampled.std() - CONFIG.noise_std) < 0.003 and abs(sampled.mean()) < 0.003
    assert np.abs(sampled).max() > SCALE


def test_warm_up_actions() -> None:
    """Warm-up actions are the base with uniform noise, or uniform."""
    observations = {**observe((4000,)), "base_action": jnp.full((4000, ACTION), 0.3)}
    noise = np.asarray(explore(make(), observations, jax.random.key(0))) - 0.3
    assert -0.2 <= noise.min() < -0.19 and 0.19 < noise.max() <= 0.2 and abs(noise.mean()) < 0.005
    edge = {**observations, "base_action": jnp.full((4000, ACTION), 0.95)}
    assert np.asarray(explore(make(), edge, jax.random.key(0))).max() == 1.0
    uniform = np.asarray(explore(set_config(make(), warmup_actions="uniform"), edge, jax.random.key(0)))
    assert uniform.min() < -0.99 and abs(uniform.mean()) < 0.03


def test_one_step_target() -> None:
    """The one-step target is the reward plus the discounted minimum of the drawn heads."""
    agent = set_config(restless(), n_step=1, noise_std=0.0, target_subset=4)
    batch = windows(2)
    behind = seen(None, jax.tree.map(lambda leaf: leaf[:, 0], batch["next_observations"]), ACTION)
    residual = agent.actor(behind, params=agent.target_actor)
    q = agent.values(behind, jnp.clip(behind.base + residual, -1, 1), agent.target_critic, None)
    expected = np.asarray(batch["rewards"][:, 0] + GAMMA * q.min(axis=0))
    np.testing.assert_allclose(targets(agent, batch, jax.random.key(0)), expected, rtol=1e-5)
    ended = {**batch, "ends": batch["ends"].at[:, 0].set(1.0), "valid": batch["valid"].at[:, 1].set(0.0)}
    np.testing.assert_allclose(targets(agent, ended, jax.random.key(0)), batch["rewards"][:, 0], rtol=1e-6)


def value_everywhere(agent: Residual, value: float) -> Residual:
    """Return `agent` with target critics that are `value` everywhere."""
    return agent.replace(target_critic=constant_critic(agent.target_critic, value))


def test_three_step_targets_by_hand() -> None:
    agent, rewards = value_everywhere(make(), 7.0), jnp.asarray([1.0, 2.0, 4.0])
    ends = {"whole": [0, 0, 0], "second": [0, 1, 0], "last": [0, 0, 1], "first": [1, 0, 0]}
    valid = {"whole": [1, 1, 1], "second": [1, 1, 0], "last": [1, 1, 1], "first": [1, 0, 0]}
    total = {"whole": 1 + 2 * GAMMA + 4 * GAMMA**2, "second": 1 + 2 * GAMMA, "first": 1.0}
    total["last"] = total["whole"]
    for name in ends:
        flags = {"ends": jnp.asarray(ends[name], jnp.float32), "valid": jnp.asarray(valid[name], jnp.float32)}
        behind = 7.0 * GAMMA**3 if name == "whole" else 0.0
        batch = windows(rewards=rewards, **flags)
        np.testing.assert_allclose(targets(agent, batch, jax.random.key(0)), total[name] + behind, rtol=1e-5)
        # The alternative reading: a time limit bootstraps from the last state, a termination does not.
        lenient, taken = set_config(agent, timeouts="bootstrap"), int(sum(valid[name]))
        found = targets(lenient, batch, jax.random.key(0))
        np.testing.assert_allclose(found, total[name] + 7.0 * GAMMA**taken, rtol=1e-5)
        over = windows(rewards=rewards, masks=1.0 - flags["ends"], **flags)
        found = targets(lenient, over, jax.random.key(0))
        np.testing.assert_allclose(found, total[name] + behind, rtol=1e-5)


def test_next_observation_in_episode() -> None:
    """The next observation is the last one inside the episode."""
    flags = {"ends": jnp.asarray([0.0, 1.0, 0.0]), "valid": jnp.asarray([1.0, 1.0, 0.0])}
    rows = rows_of(windows(**flags), CONFIG)
    batch = windows(**flags)
    np.testing.assert_array_equal(rows["next_observations"]["state"], batch["next_observations"]["state"][:, 1])
    np.testing.assert_array_equal(rows["observations"]["base_action"], batch["observations"]["base_action"][:, 0])


def test_delayed_success_value() -> None:
    """A success h steps ahead is worth gamma to the h."""
    agent = value_everywhere(make(), 7.0)
    for ahead in range(3):
        rewards = jnp.zeros(3).at[ahead].set(1.0)
        flags = {"ends": rewards, "valid": jnp.asarray(np.arange(3) <= ahead, jnp.float32)}
        batch = windows(rewards=rewards, masks=1.0 - rewards, **flags)
        np.testing.assert_allclose(targets(agent, batch, jax.random.key(0)), GAMMA**ahead, rtol=1e-6)


def test_target_clip() -> None:
    agent = set_config(value_everywhere(make(), 7.0), target_clip=(0.0, 1.0))
    np.testing.assert_array_equal(targets(agent, windows(rewards=jnp.zeros(3)), jax.random.key(0)), 1.0)
    np.testing.assert_array_equal(targets(agent, windows(rewards=jnp.full(3, -9.0)), jax.random.key(0)), 0.0)


def test_drawn_heads_differ() -> None:
    """Two drawn heads are never the same."""
    params = make().target_critic
    for member in range(4):
        params = constant_critic(params, float(member), member)
    agent = set_config(make().replace(target_critic=params), n_step=1, noise_std=0.0)
    batch = windows(2, rewards=jnp.zeros(2))
    found = np.asarray([targets(agent, batch, jax.random.key(seed))[0] for seed in range(60)]) / GAMMA
    assert set(np.round(found).astype(int)) == {0, 1, 2}  # with repeats, the minimum would be 3 once in 16 draws


def test_target_noise() -> None:
    """Target noise is clipped, and absent in the critic warm-up."""
    batch = windows(2)
    cautious = set_config(restless(), n_step=1, target_subset=4, online=replace(ONLINE, initial_updates=1))
    one, two = (targets(cautious, batch, jax.random.key(seed)) for seed in (1, 2))
    np.testing.assert_array_equal(one, two)
    later = cautious.replace(updates=jnp.asarray(1, jnp.int32))
    assert moved(targets(later, batch, jax.random.key(1)), targets(later, batch, jax.random.key(2)))
    wild = set_config(later, noise_std=1.0, noise_clip=1e-9)
    np.testing.assert_allclose(targets(wild, batch, jax.random.key(1)), one, rtol=1e-4)


def test_critic_losses() -> None:
    q, y = jnp.asarray([[1.0, 0.0], [4.0, 0.0]]), jnp.asarray([2.0, 3.0])
    assert float(critic_loss(q, y, "mse")) == pytest.approx((1 + 4 + 9 + 9) / 4)
    assert float(critic_loss(q, y, "squared_mean")) == pytest.approx((1.5**2 + 3.0**2) / 2)


def test_network_inputs() -> None:
    """The critic sees the combined action, and the actor the base."""
    agent = restless()
    one = seen(None, observe((ROWS,)), ACTION)
    shifted = one._replace(base=one.base - 0.05)
    q = [agent.values(each, one.base + 0.1, agent.critic.params, None) for each in (one, shifted)]
    np.testing.assert_array_equal(q[0], q[1])
    assert moved(agent.actor(one), agent.actor(shifted))


def test_steps_per_call() -> None:
    """A call takes four critic steps and one actor step, each with its average."""
    agent, info = update(make(), windows(lead=(4, ROWS)))
    assert steps(agent.critic) == 4 and steps(agent.actor) == 1 and int(agent.updates) == 4
    assert set(info) == {"critic/loss", "critic/q", "critic/target", "actor/loss", "actor/residual"}
    mix = lambda new, old: jax.tree.map(lambda a, b: CONFIG.tau * a + (1 - CONFIG.tau) * b, new, old)  # noqa: E731
    target = make().target_critic
    stepped, keys = make(), jax.random.split(jax.random.split(make().rng, 3)[1], 4)
    for i in range(4):
        rows = jax.tree.map(lambda leaf, i=i: leaf[i], windows(lead=(4, ROWS)))
        stepped, _ = critic_step(stepped, rows, keys[i])
        target = mix(stepped.critic.params, target)
    assert largest_difference(agent.target_critic, target) < 1e-5
    assert largest_difference(agent.target_actor, mix(agent.actor.params, make().target_actor)) < 1e-6
    assert moved(agent.actor.params, make().actor.params)


def test_actor_rests_in_warm_up() -> None:
    """The actor rests during the critic warm-up."""
    agent = set_config(make(), online=replace(ONLINE, initial_updates=3)).online()
    for _ in range(3):
        agent, info = update(agent, windows(lead=(1, ROWS)))
        assert not moved(agent.actor.params, make().actor.params) and steps(agent.actor) == 0
        assert not moved(agent.target_actor, make().target_actor)
        assert float(info["actor/residual"]) == 0.0
    assert steps(agent.critic) == 3
    agent, _ = update(agent, windows(lead=(1, ROWS)))
    assert steps(agent.actor) == 1 and moved(agent.actor.params, make().actor.params)
    assert int(agent.online().updates) == 0


def test_residual_penalty() -> None:
    """The actor climbs the critic, and a penalty holds it back."""
    agent, batch = make(), windows()
    for seed in range(30):
        agent, info = actor_step(agent, batch, jax.random.key(seed))
    first = actor_step(make(), batch, jax.random.key(0))[1]
    assert float(info["actor/loss"]) < float(first["actor/loss"]) - 1e-3
    assert 0.0 < float(info["actor/residual"]) <= SCALE
    held = set_config(make(), residual_penalty=100.0)
    for seed in range(30):
        held, there = actor_step(held, batch, jax.random.key(seed))
    assert float(there["actor/residual"]) < 0.3 * float(info["actor/residual"])


def test_gradient_clipping() -> None:
    """Gradients are clipped to their norm."""
    model = make().actor.replace(optimizer=Adam(1e-2, weight_decay=1e-2, clip_norm=1.0))
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 100.0), model.params)
    moment = model.apply_gradients(grads).opt_state[0].mu
    assert float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(moment)))) == pytest.approx(0.1, rel=1e-4)


def test_minibatches_half_demonstrations() -> None:
    """Every minibatch is half demonstrations."""
    rows = {key: np.asarray(leaf) for key, leaf in windows(1, (40,)).items() if key not in ("valid",)}
    flat: Batch = jax.tree.map(lambda leaf: np.asarray(leaf)[:, 0], windows(1, (40,), rewards=jnp.ones(1)))
    flat.pop("valid")
    assert set(flat) == set(rows)
    offline = OfflineData.create(flat, ("ends",))
    buffer = ReplayBuffer.create(jax.tree.map(lambda leaf: leaf[0], flat), 64)
    buffer = buffer.extend({**jax.tree.map(jnp.asarray, flat), "rewards": jnp.zeros(40)})
    batch = sample_minibatches(jax.random.key(0), offline, buffer, 4, 8, 0.5, make().needs.window)
    np.testing.assert_array_equal(np.asarray(batch["rewards"]).mean(axis=-1), [[1, 1, 1, 1, 0, 0, 0, 0]] * 4)
    assert batch["observations"]["base_action"].shape == (4, 8, 3, ACTION)


IMAGE = EncoderConfig(kind="conv", conv_features=(4,), conv_strides=(2,))


@functools.cache
def seeing() -> tuple[Residual, Batch]:
    """Return an agent with a camera of 9x9 pixels, and windows for it."""
    batch, draw = windows(), np.random.default_rng(3)
    for key in ("observations", "next_observations"):
        batch[key]["camera"] = jnp.asarray(draw.integers(0, 256, (ROWS, 3, 9, 9, 3)), jnp.uint8)
    example = jax.tree.map(lambda leaf: leaf[:1, 0], batch["observations"])
    config = replace(CONFIG, encoder=IMAGE, trunk_width=16)
    create = lambda key: Residual.create(key, example, jnp.zeros((1, ACTION)), config)  # noqa: E731
    return jax.jit(create, compiler_options=QUICK)(jax.random.key(0)), batch


def test_critic_step_trains_encoder() -> None:
    """With images, only the critic step trains encoder and trunk."""
    agent, batch = seeing()
    assert agent.encoder is not None and agent.trunk is not None
    first = jax.tree.map(lambda leaf: leaf[:, 0], batch["observations"])
    np.testing.assert_array_equal(act(agent, first, jax.random.key(0), True), first["base_action"])
    stepped, _ = critic_step(agent, batch, jax.random.key(0))
    for name in ("critic", "encoder", "trunk"):
        assert moved(getattr(stepped, name).params, getattr(agent, name).params), name
    assert moved(stepped.target_trunk, agent.target_trunk) and not moved(stepped.actor.params, agent.actor.params)
    after, _ = actor_step(stepped, batch, jax.random.key(1))
    assert moved(after.actor.params, agent.actor.params)
    for name in ("critic", "encoder", "trunk", "target_critic", "target_trunk"):
        assert not moved(getattr(after, name), getattr(stepped, name)), name


def test_joined_histories() -> None:
    """Joined histories use the last base action."""
    joined = observe((4,))
    joined["base_action"] = jnp.concatenate([jnp.zeros((4, ACTION)), joined["base_action"]], axis=-1)
    np.testing.assert_array_equal(seen(None, joined, ACTION).base, joined["base_action"][:, ACTION:])


def test_window_length() -> None:
    """Windows are two rows at least."""
    assert (
        make().needs.window == 3
        and set_config(make(), n_step=1).needs.window == 2
        and set_config(make(), n_step=5).needs.window == 5
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual_scale": 0.0}, "residual_scale is 0.0"),
        ({"residual_scale": 1.5}, "at most 1"),
        ({"n_step": 0}, "n_step is 0"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"target_subset": 11}, "num_critics=10"),
        ({"timeouts": "ignore"}, "terminal or bootstrap"),
        ({"critic_loss": "huber"}, "mse or squared_mean"),
        ({"target_clip": (1.0, 0.0)}, "target_clip"),
    ],
)
def test_wrong_settings_refused(changes: dict[str, Any], words: str) -> None:
    """Settings that cannot be used are refused."""
    with pytest.raises(ConfigError, match=words):
        ResidualConfig(**changes)


def test_missing_base_action_refused() -> None:
    """Observations without a base action are refused."""
    for observations in (jnp.zeros((1, 3)), {"state": jnp.zeros((1, 3))}):
        with pytest.raises(ConfigError, match="base_action"):
            Residual.create(jax.random.key(0), observations, jnp.zeros((1, 2)), CONFIG)


def test_paper_presets() -> None:
    """Presets have the paper's numbers."""
    can, door = (Residual.preset(family, "paper") for family in ("other", "adroit"))
    config = can.config
    assert (config.residual_scale, config.actor_lr, config.critic_lr, config.n_step) == (0.1, 1e-6, 1e-4, 3)
    assert (config.num_critics, config.target_subset, config.noise_std, config.discount) == (10, 2, 0.05, 0.99)
    assert (config.online.random_steps, config.online.initial_updates, config.online.utd_ratio) == (10_000, 10_000, 4)
    assert config.online.replay == "mixed" and config.online.offline_ratio == 0.5 and config.batch_size == 256
    assert can.online_steps == 300_000 and can.offline_steps == door.offline_steps == 0
    assert (door.config.residual_scale, door.config.actor_lr, door.reward) == (0.2, 5e-6, (1.0, 1.0))
    assert Residual.preset("kitchen", "paper").config.timeouts == "bootstrap"
    assert Residual.preset("adroit").run == {"normalize": True, "std_floor": 0.1, "action_range": "data"}
    assert door.config.needs.action_margin == 0.2
