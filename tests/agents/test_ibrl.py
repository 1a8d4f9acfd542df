"""IBRL: cloning offline, the choice by the target critics in acting and bootstrapping, n-step targets (2311.02198)."""

import functools
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import BC, IBRL, IBRLConfig
from o2o.agents.td3 import TD3
from o2o.errors import ConfigError
from o2o.nn.modules import Adam
from o2o.rl.windows import n_step_rows
from o2o.types import Batch, OnlineConfig
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

KEY = jax.random.key(8)
GAMMA = 0.99
CONFIG = tiny(
    IBRLConfig(),
    clone_hidden_dims=(16, 16),
    actor_dropout=0.0,
    clone_dropout=0.0,
    clone_lr=0.01,
    target_noise=0.0,
    target_subset=None,
    choice="hard",
    policy_delay=2,
    tau=0.25,
    critic_lr=0.01,
)
STATES = jnp.asarray(np.random.default_rng(1).normal(size=(3000, OBSERVATION_DIM)), jnp.float32)


def rows_of(batch: Batch, config: IBRLConfig) -> Batch:
    """Return the n-step rows of windows `[rows, 3, ...]`."""
    return n_step_rows(batch, config.n_step, config.discount, config.timeouts)


jit = functools.partial(jax.jit, compiler_options=QUICK)
update = jit(lambda agent, batch: agent.update(batch))
choose = jit(lambda agent, states, actions, rng: agent.choose(states, actions, rng))
targets = jit(lambda agent, batch, rng: agent.targets(rows_of(batch, agent.config), rng))


def windows(rows: Any = 8, **changes: Any) -> Batch:
    """Return windows of three rows that no episode ends in, leaves `[rows, 3, ...]`."""
    flat = make_batch(rows, 3)
    flags = {"masks": jnp.ones((rows, 3)), "ends": jnp.zeros((rows, 3)), "valid": jnp.ones((rows, 3))}
    return {**flat, **flags, **{name: jnp.broadcast_to(value, (rows, 3)) for name, value in changes.items()}}


@functools.cache
def cloned() -> Any:
    """Return the agent after two offline calls."""
    agent = create(IBRL, CONFIG)
    for _ in range(2):
        agent, _ = update(agent, jax.tree.map(lambda leaf: leaf[None], windows()))
    return agent


def learner(**changes: Any) -> Any:
    """Return the agent at the switch, its targets unlike what they follow."""
    agent = set_config(cloned(), **changes).online()
    scaled = {name: jax.tree.map(lambda leaf: 0.7 * leaf, getattr(agent, name).params) for name in ("actor", "critic")}
    return agent.replace(target_actor=scaled["actor"], target_critic=scaled["critic"])


def lowest(agent: Any, states: Any, actions: Any) -> Any:
    """Return the lowest target critic's values."""
    return agent.critic(states, actions, params=agent.target_critic).min(axis=0)


# ---------------------------------------------------------------- cloning, the switch


def test_offline_trains_clone_only() -> None:
    """Only the clone learns offline, and as BC does."""
    before, batch = create(IBRL, CONFIG), windows()
    after, info = update(before, jax.tree.map(lambda leaf: leaf[None], batch))
    rows = {name: batch[name][None, :, 0] for name in ("observations", "actions")}
    alone, by_hand = jit(BC.update)(before.reference, rows)
    assert largest_difference(after.reference.actor.params, alone.actor.params) < 1e-6
    assert float(info["reference/loss"]) == pytest.approx(float(by_hand["actor/loss"]), rel=1e-5)
    error = np.mean((np.asarray(before.cloned_actions(rows["observations"])) - np.asarray(rows["actions"])) ** 2)
    assert float(info["reference/loss"]) == pytest.approx(float(error), rel=1e-4)
    for name in ("actor", "critic"):
        assert not moved(getattr(after, name).params, getattr(before, name).params)
    assert int(after.updates) == 0
    np.testing.assert_array_equal(
        after.sample_actions(STATES[:9], None, KEY, True)[0], after.cloned_actions(STATES[:9])
    )


def test_online_clone_frozen() -> None:
    """The clone is frozen online and plays the warm-up."""
    before, agent = cloned(), cloned().online()
    after, info = update(agent, jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), windows()))
    assert not moved(after.reference.actor.params, before.reference.actor.params)
    assert (steps(after.reference.actor), steps(after.critic), steps(after.actor)) == (2, 2, 1)
    assert 0.0 <= float(info["ibrl/reference_share"]) <= 1.0
    np.testing.assert_array_equal(after.random_actions(STATES, KEY, ACTION_DIM), before.cloned_actions(STATES))
    assert (IBRLConfig().online.random_steps, IBRLConfig().online.first_update()) == (5000, 5000)


# ---------------------------------------------------------------- the choice


def test_hard_choice() -> None:
    """The hard choice is worth at least either and follows the target critics."""
    agent = learner()
    upside_down = jax.tree.map(lambda leaf: -leaf, agent.target_critic["params"]["output"])
    wrong = {"params": {**agent.critic.params["params"], "output": upside_down}}
    agent = agent.replace(critic=agent.critic.replace(params=wrong))
    own = jnp.tanh(jax.random.normal(KEY, (3000, ACTION_DIM)))
    choice = choose(agent, STATES, own, KEY)
    q = np.stack([lowest(agent, STATES, actions) for actions in (own, agent.cloned_actions(STATES))])
    np.testing.assert_allclose(lowest(agent, STATES, choice.actions), q.max(axis=0), atol=1e-6)
    np.testing.assert_array_equal(choice.cloned, q[1] > q[0])
    assert 0.1 < np.mean(choice.cloned) < 0.9


def test_soft_choice_by_hand() -> None:
    """The soft choice has the odds computed by hand, and their limits."""
    agent = learner(choice="soft", inverse_temperature=10.0)
    own = jnp.tanh(jax.random.normal(KEY, (3000, ACTION_DIM)))
    q = np.stack([lowest(agent, STATES, actions) for actions in (own, agent.cloned_actions(STATES))])
    probability = 1.0 / (1.0 + np.exp(10.0 * (q[0] - q[1])))
    drawn = np.asarray(choose(agent, STATES, own, KEY).cloned)
    for part in (probability < 0.3, (probability > 0.3) & (probability < 0.7), probability > 0.7):
        assert part.sum() > 100 and drawn[part].mean() == pytest.approx(probability[part].mean(), abs=0.05)
    even = choose(set_config(agent, inverse_temperature=0.0), STATES, own, KEY).cloned
    assert float(even.mean()) == pytest.approx(0.5, abs=0.04)
    sharp = choose(set_config(agent, inverse_temperature=1e8), STATES, own, KEY).cloned
    assert np.mean(np.asarray(sharp) == (q[1] > q[0])) > 0.999
    best, _ = agent.sample_actions(STATES, None, KEY, True)
    pair = np.stack([agent.actor(STATES), agent.cloned_actions(STATES)])
    q = np.stack([lowest(agent, STATES, jnp.asarray(actions)) for actions in pair])
    np.testing.assert_allclose(best, np.where((q[1] > q[0])[:, None], pair[1], pair[0]), atol=1e-6)


def test_choice_critic_subset() -> None:
    """A choice asks a random subset of the target critics, and a deterministic one all."""
    agent = learner(target_subset=1)
    own = agent.actor(STATES)
    each = [agent.critic(STATES, a, params=agent.target_critic) for a in (own, agent.cloned_actions(STATES))]
    by_member = np.asarray(each[1] > each[0])
    found = [np.asarray(choose(agent, STATES, own, jax.random.key(seed)).cloned) for seed in range(20)]
    drawn = [int(np.argmax((by_member == cloned).mean(axis=1))) for cloned in found]
    assert set(drawn) == {0, 1, 2, 3}
    for member, cloned in zip(drawn, found, strict=True):
        assert np.mean(by_member[member] == cloned) > 0.999
    all_of_them = np.asarray(each[1].min(axis=0) > each[0].min(axis=0))
    for seed in range(3):
        best, _ = agent.sample_actions(STATES, None, jax.random.key(seed), True)
        expected = np.where(all_of_them[:, None], agent.cloned_actions(STATES), own)
        np.testing.assert_allclose(best, expected, atol=1e-6)


def test_exploration_noise() -> None:
    """Only the actor's own action has exploration noise."""
    agent = learner(choice="soft", inverse_temperature=0.0, exploration_noise=0.1)
    actions = np.asarray(agent.sample_actions(STATES, None, KEY)[0])
    clone, own = np.asarray(agent.cloned_actions(STATES)), np.asarray(agent.actor(STATES))
    from_clone = np.all(actions == clone, axis=1)
    assert from_clone.mean() == pytest.approx(0.5, abs=0.05)
    noise = (actions - own)[~from_clone & (np.abs(own).max(axis=1) < 0.5)]
    assert noise.std() == pytest.approx(0.1, abs=0.01)


# ---------------------------------------------------------------- targets


class Echo(IBRL):
    """An agent whose clone says what the target actor says."""

    def cloned_actions(self, observations: Any) -> Any:
        """Return the target actor's actions."""
        return self.actor(observations, params=self.target_actor)


def test_agreeing_clone_is_td3() -> None:
    """With a clone that agrees it is n-step TD3."""
    agent, batch = learner(), windows()
    echo = Echo(**{field.name: getattr(agent, field.name) for field in fields(agent)})
    rows = rows_of(batch, agent.config)
    plain = TD3.next_values(agent, rows["next_observations"], KEY)
    powers = GAMMA ** np.arange(3)
    expected = (powers * np.asarray(batch["rewards"])).sum(axis=1) + GAMMA**3 * np.asarray(plain)
    np.testing.assert_allclose(targets(echo, batch, KEY)[0], expected, atol=1e-5)
    np.testing.assert_array_equal(rows["next_observations"], batch["next_observations"][:, 2])
    assert moved(targets(agent, batch, KEY)[0], targets(echo, batch, KEY)[0])


def test_target_takes_better_proposal() -> None:
    """The target takes the better of both proposals."""
    agent, batch = learner(), windows(64)
    found, info = targets(agent, batch, KEY)
    behind = batch["next_observations"][:, 2]
    q = [
        lowest(agent, behind, a) for a in (agent.actor(behind, params=agent.target_actor), agent.cloned_actions(behind))
    ]
    returns = (GAMMA ** np.arange(3) * np.asarray(batch["rewards"])).sum(axis=1)
    np.testing.assert_allclose(found, returns + GAMMA**3 * np.maximum(*q), atol=1e-5)
    assert float(info["ibrl/reference_share"]) == pytest.approx(float(np.mean(q[1] > q[0])), abs=1e-6)


def test_n_step_targets() -> None:
    """N-step targets stop at terminals and bootstrap at time limits."""
    agent = learner()
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 7.0))
    rewards, short = jnp.asarray([1.0, 2.0, 4.0]), {"ends": jnp.asarray([0.0, 1, 0]), "valid": jnp.asarray([1.0, 1, 0])}
    whole, cut = 1 + 2 * GAMMA + 4 * GAMMA**2, 1 + 2 * GAMMA
    cases = [({}, whole + 7 * GAMMA**3), (short, cut + 7 * GAMMA**2), ({**short, "masks": 1.0 - short["ends"]}, cut)]
    for flags, expected in cases:
        np.testing.assert_allclose(targets(agent, windows(rewards=rewards, **flags), KEY)[0], expected, rtol=1e-5)
    terminal = set_config(agent, timeouts="terminal")
    np.testing.assert_allclose(targets(terminal, windows(rewards=rewards, **short), KEY)[0], cut, rtol=1e-5)


def test_drawn_target_critics_differ() -> None:
    """Two target critics are drawn, and never the same."""
    agent, batch = learner(target_subset=2), windows(rewards=jnp.zeros(3))
    params = agent.target_critic
    for member in range(4):
        params = constant_critic(params, float(member), member)
    agent = agent.replace(target_critic=params)
    found = np.asarray([targets(agent, batch, jax.random.key(seed))[0] for seed in range(60)]) / GAMMA**3
    assert set(np.round(found).astype(int).ravel()) == {0, 1, 2}


def test_dropout_and_target_noise() -> None:
    """Dropout and noise are on in the target and off when it acts."""
    batch, still = windows(), learner()
    assert not moved(targets(still, batch, jax.random.key(1))[0], targets(still, batch, jax.random.key(2))[0])
    blurred = still.replace(actor=still.actor.replace(module=still.actor.module.clone(dropout=0.5)))
    for agent in (blurred, learner(target_noise=0.1)):
        assert moved(targets(agent, batch, jax.random.key(1))[0], targets(agent, batch, jax.random.key(2))[0])
        one, two = (agent.sample_actions(STATES[:9], None, jax.random.key(i), True)[0] for i in (1, 2))
        np.testing.assert_array_equal(one, two)


# ---------------------------------------------------------------- steps


def test_actor_loss_and_update_timing() -> None:
    """The lowest of all online critics; critics' targets follow every step, the actor's its own steps."""
    agent, batch = learner(), windows()
    rows = rows_of(batch, agent.config)
    loss, _ = agent.actor_loss(agent.actor.params, rows, KEY)
    q = np.asarray(agent.critic(rows["observations"], agent.actor(rows["observations"]))).min(axis=0)
    assert float(loss) == pytest.approx(-float(q.mean()), rel=1e-4)
    once, _ = update(agent, jax.tree.map(lambda leaf: leaf[None], batch))
    expected = jax.tree.map(lambda one, two: 0.25 * one + 0.75 * two, once.critic.params, agent.target_critic)
    assert largest_difference(once.target_critic, expected) < 1e-6
    assert not moved(once.target_actor, agent.target_actor) and steps(once.actor) == 0
    twice, _ = update(once, jax.tree.map(lambda leaf: leaf[None], batch))
    expected = jax.tree.map(lambda one, two: 0.25 * one + 0.75 * two, twice.actor.params, agent.target_actor)
    assert largest_difference(twice.target_actor, expected) < 1e-6 and steps(twice.actor) == 1


def test_actor_loss_noise() -> None:
    """The actor's own loss has noise, and gradients pass the noise's clip.

    a = clip(pi(s) + clip(N(0, 0.6^2), -0.3, 0.3), -1, 1), with the gradient of pi(s) also where a is clipped.
    """
    agent, states = learner(target_noise=0.6, noise_clip=0.3), STATES[:64]
    bold = jax.tree.map(lambda leaf: 4.0 * leaf, agent.actor.params)  # many actions near -1 and 1
    noise = jnp.clip(0.6 * jax.random.normal(jax.random.split(KEY)[1], (64, ACTION_DIM)), -0.3, 0.3)
    noisy = agent.actor(states, params=bold) + noise
    assert 0.1 < float(jnp.mean(jnp.abs(noisy) > 1.0)) < 0.9

    def expected(params: Any) -> Any:
        shift = jnp.clip(noisy, -1.0, 1.0) - agent.actor(states, params=bold)
        return -agent.critic(states, agent.actor(states, params=params) + shift).min(axis=0).mean()

    found = jit(jax.value_and_grad(lambda params: agent.actor_loss(params, {"observations": states}, KEY)[0]))(bold)
    loss, gradient = jit(jax.value_and_grad(expected))(bold)
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-4) and largest_difference(found[1], gradient) < 1e-5


def test_learner_outgrows_clone() -> None:
    """The learner outgrows its clone.

    Reward -4 |a - 0.5|^2, terminal; a clone that plays 0.1 leads a learner that starts near -0.7, for a while.
    """
    agent = learner()
    silent = jax.tree.map(jnp.zeros_like, agent.reference.actor.params)
    silent["params"]["mean"]["bias"] = jnp.full((ACTION_DIM,), np.arctanh(0.1))
    clone = agent.reference.actor.replace(params=silent)
    head = {**agent.actor.params["params"]["Dense_0"], "bias": jnp.full((ACTION_DIM,), np.arctanh(-0.7))}
    start = {"params": {**agent.actor.params["params"], "Dense_0": head}}
    actor = agent.actor.replace(params=start, optimizer=Adam(3e-3))
    agent = agent.replace(actor=actor, target_actor=start, reference=agent.reference.replace(actor=clone))

    def step(agent: Any, key: Any) -> tuple[Any, Any]:
        actions = jax.random.uniform(key, (64, 3, ACTION_DIM), minval=-1.0, maxval=1.0)
        rewards = -4.0 * jnp.square(actions - 0.5).sum(axis=-1)
        batch = windows(64, masks=jnp.zeros(3), ends=jnp.ones(3), valid=jnp.asarray([1.0, 0.0, 0.0]))
        agent, info = agent.update({k: v[None] for k, v in {**batch, "actions": actions, "rewards": rewards}.items()})
        return agent, info["ibrl/reference_share"]

    train = jax.jit(lambda agent: jax.lax.scan(step, agent, jax.random.split(KEY, 600)))
    agent, share = train(agent)
    assert float(share[-20:].mean()) < 0.05 < 0.2 < float(share[20:100].mean())
    best, _ = agent.sample_actions(make_batch(16)["observations"][0], None, KEY, True)
    assert float(jnp.abs(best - 0.5).mean()) < 0.15 and float(jnp.abs(best - 0.5).max()) < 0.4


# ---------------------------------------------------------------- settings


def test_wrong_settings_refused() -> None:
    """Wrong settings are refused."""
    wrong: dict[str, Any] = {"choice": "mean", "timeouts": "stop", "inverse_temperature": -1.0, "n_step": 0}
    for field, value in {**wrong, "target_subset": 5, "policy_delay": 0, "exploration_noise": -0.1}.items():
        with pytest.raises(ConfigError, match=f"IBRLConfig.{field} is"):
            replace(CONFIG, **{field: value})
    with pytest.raises(ConfigError, match="needs flat float32 observations"):
        IBRL.create(KEY, {"state": jnp.zeros((1, 3))}, jnp.zeros((1, ACTION_DIM)))  # type: ignore[arg-type]


def test_presets_follow_the_release() -> None:
    preset = IBRL.preset("adroit")
    config = preset.config
    assert (config.choice, config.inverse_temperature, config.num_critics, config.target_subset) == ("soft", 10.0, 5, 2)
    assert (config.n_step, config.policy_delay, config.tau, config.batch_size) == (3, 5, 0.01, 256)
    assert (config.actor_lr, config.critic_lr, config.actor_dropout, config.critic_layer_norm) == (
        1e-4,
        1e-4,
        0.5,
        True,
    )
    assert (config.exploration_noise, config.target_noise, config.noise_clip) == (0.1, 0.1, 0.3)
    assert config.online == OnlineConfig(utd_ratio=2, random_steps=5000, replay="append")
    assert (preset.reward, preset.online_steps) == ((1.0, 1.0), 200_000)
    assert IBRL.preset("locomotion").config.choice == "hard" and create(IBRL, CONFIG).needs.window == 3
    assert IBRL.preset("antmaze", "small").config.actor_hidden_dims == (128, 128)
