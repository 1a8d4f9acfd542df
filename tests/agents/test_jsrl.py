"""JSRL: who acts when in an episode, the horizon over updates, what the learner starts from (arXiv 2204.02372)."""

import functools
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import IQL, JSRL, IQLConfig, JSRLConfig
from o2o.errors import ConfigError
from o2o.train.acting import clear_carry
from tests.helpers.contract import QUICK
from tests.helpers.tiny import ACTION_DIM, OBSERVATION_DIM, create, largest_difference, make_batch, moved, steps, tiny

KEY = jax.random.key(9)
update = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)
CONFIG = tiny(JSRLConfig(), value_hidden_dims=(16, 16), init_scheme="xavier", max_guide_steps=4, guide_steps="fixed")
EPISODES, LENGTH = 400, 6
STATES = jnp.asarray(np.random.default_rng(2).normal(size=(LENGTH, EPISODES, OBSERVATION_DIM)), jnp.float32)


@functools.cache
def offline() -> Any:
    """Return the agent after two offline calls."""
    agent = create(JSRL, CONFIG)
    for seed in range(2):
        agent, _ = update(agent, make_batch(1, seed=seed))
    return agent


@functools.partial(jax.jit, static_argnames=("deterministic", "changes"))
def play(agent: Any, rng: jax.Array, deterministic: bool = False, changes: Any = ()) -> tuple[Any, Any, Any, Any]:
    """Return each step's actions and those of the learner and of the guide alone, `[LENGTH, EPISODES, A]`, and h."""
    agent = agent.replace(config=replace(agent.config, **dict(changes)))
    guide = IQL(
        agent.actor.replace(params=agent.guide), agent.critic, agent.target_critic, agent.value, agent.rng, CONFIG
    )
    learner = guide.replace(actor=agent.actor)

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        states, key = inputs
        actions, carry = agent.sample_actions(states, carry, key, deterministic)
        act_rng = jax.random.split(key)[1]
        own, theirs = (each.sample_actions(states, None, act_rng, deterministic)[0] for each in (learner, guide))
        return carry, (actions, own, theirs)

    inputs = (STATES, jax.random.split(rng, LENGTH))
    carry, played = jax.lax.scan(step, agent.initial_carry((EPISODES,)), inputs)
    return *played, carry


@functools.cache
def divided() -> Any:
    """Return the online agent after an update: its learner is not its guide."""
    agent, _ = update(offline().online(), make_batch(2))
    narrow = lambda tree: {"params": {**tree["params"], "log_std": jnp.full((ACTION_DIM,), -4.0)}}  # noqa: E731
    actor = agent.actor.replace(params=narrow(agent.actor.params))
    return agent.replace(actor=actor, guide=narrow(agent.guide))  # samples that no clip makes equal


def is_guided(actions: Any, own: Any, theirs: Any) -> np.ndarray:
    """Return `[LENGTH, EPISODES]` whether an action is the guide's; every action is one or the other's."""
    by_guide = np.all(np.isclose(actions, theirs, rtol=0.0, atol=1e-6), axis=-1)
    by_learner = np.all(np.isclose(actions, own, rtol=0.0, atol=1e-6), axis=-1)
    assert np.all(by_guide != by_learner)
    return by_guide


# ---------------------------------------------------------------- who acts


def test_guide_acts_h_steps() -> None:
    """The guide acts exactly h steps.

    The first four of each episode with h = 4; none with h = 0; all where h is the episode's length.
    """
    agent = divided()
    for steps_of_guide in (4, 0, LENGTH):
        actions, own, theirs, _ = play(agent, KEY, changes=(("max_guide_steps", steps_of_guide),))
        expected = np.broadcast_to((np.arange(LENGTH) < steps_of_guide)[:, None], (LENGTH, EPISODES))
        np.testing.assert_array_equal(is_guided(actions, own, theirs), expected)


def test_random_horizons() -> None:
    """Random horizons are uniform below the largest and hold for the episode."""
    actions, own, theirs, carry = play(divided(), KEY, changes=(("guide_steps", "random"),))
    guided = is_guided(actions, own, theirs)
    assert np.all(np.diff(guided.astype(int), axis=0) <= 0), "once the learner acts it goes on to the end"
    counts = guided.sum(axis=0)
    np.testing.assert_array_equal(counts, carry.guided)
    np.testing.assert_allclose(np.bincount(counts, minlength=4) / EPISODES, 0.25, atol=0.06)
    *_, again = play(divided(), jax.random.key(1), changes=(("guide_steps", "random"),))
    assert moved(carry.guided, again.guided)


def test_episode_end_resets_guide() -> None:
    """Where an episode ends, the count and the guide's steps begin anew."""
    agent = divided()
    *_, carry = play(agent, KEY, changes=(("guide_steps", "random"),))
    ended = jnp.arange(EPISODES) < 200
    carry = clear_carry(carry, agent.initial_carry((EPISODES,)), ended)
    random = agent.replace(config=replace(agent.config, guide_steps="random"))
    _, after = random.sample_actions(STATES[0], carry, jax.random.key(2))
    np.testing.assert_array_equal(after.step, np.where(ended, 1, LENGTH + 1))
    np.testing.assert_array_equal(after.guided[200:], carry.guided[200:])
    assert set(np.asarray(after.guided[:200]).tolist()) == {0, 1, 2, 3}


def test_evaluation_uses_learner_only() -> None:
    """Evaluation is the learner's alone."""
    actions, own, theirs, carry = play(divided(), KEY, True)
    np.testing.assert_array_equal(actions, own)
    assert moved(own, theirs) and np.all(np.asarray(carry.step) == LENGTH)


# ---------------------------------------------------------------- the horizon


def test_horizon_annealing() -> None:
    """The horizon falls with the updates, never rises, and stays without annealing."""
    agent = divided()
    annealed = agent.replace(config=replace(agent.config, max_guide_steps=10, anneal_updates=20))
    horizons = [int(annealed.replace(updates=jnp.asarray(n, jnp.int32)).horizon()) for n in range(0, 30)]
    assert horizons[0] == 10 and horizons[10] == 5 and horizons[19] == 1 and set(horizons[20:]) == {0}
    assert np.all(np.diff(horizons) <= 0)
    wide = agent.replace(config=replace(agent.config, max_guide_steps=300, anneal_updates=1000))
    for n in (0, 160, 280, 410, 411, 999, 1000):  # after 280 of 1000 updates 216 of 300 steps; float32 makes it 217
        assert int(wide.replace(updates=jnp.asarray(n, jnp.int32)).horizon()) == -(-300 * (1000 - n) // 1000), n
    assert int(agent.replace(updates=jnp.asarray(10**6, jnp.int32)).horizon()) == 4


def test_online_updates_counted() -> None:
    """Online updates are counted, and the guide is frozen."""
    assert offline().updates is None
    agent = offline().online()
    after, info = update(agent, make_batch(2))
    assert int(after.updates) == 2 and float(info["jsrl/horizon"]) == 4.0
    assert not moved(after.guide, agent.guide) and moved(after.actor.params, agent.actor.params)


# ---------------------------------------------------------------- the learner


def test_updates_match_iql() -> None:
    """It learns as IQL does before and after the switch.

    h = 0 is plain IQL: the same updates, and samples from the same policy.
    """
    values = {field.name: getattr(CONFIG, field.name) for field in fields(IQLConfig)}
    plain, batch = create(IQL, IQLConfig(**values)), make_batch(2)
    agent = create(JSRL, CONFIG)
    for _ in range(2):
        plain, agent = update(plain, batch)[0], update(agent, batch)[0]
        for name in ("actor", "critic", "value"):
            assert largest_difference(getattr(plain, name).params, getattr(agent, name).params) < 1e-6
            assert steps(getattr(plain, name)) == steps(getattr(agent, name))
        assert largest_difference(plain.target_critic, agent.target_critic) < 1e-6
        agent = agent.online()
    assert agent.guide is not None and moved(agent.guide, agent.actor.params)


@pytest.mark.parametrize("learner", ["copied", "fresh_policy", "fresh"])
def test_learner_initialisation(learner: Any) -> None:
    """The learner starts from a copy, a fresh policy or fresh networks, as set."""
    before = offline()
    config = replace(before.config, learner=learner)
    after = jax.jit(lambda agent: agent.online())(before.replace(config=config))
    assert not moved(after.guide, before.actor.params) and after.online() is after
    kept = {name: not moved(getattr(after, name).params, getattr(before, name).params) for name in ("actor", "critic")}
    assert kept == {"actor": learner == "copied", "critic": learner != "fresh"}
    assert moved(after.target_critic, before.target_critic) == moved(after.value.params, before.value.params)
    assert moved(after.value.params, before.value.params) == (learner == "fresh")
    assert steps(after.actor) == (2 if learner == "copied" else 0) and steps(after.critic) == (2 * kept["critic"])


# ---------------------------------------------------------------- settings


def test_wrong_settings_refused() -> None:
    """Wrong settings are refused."""
    wrong: dict[str, Any] = {"max_guide_steps": -1, "anneal_updates": 0, "guide_steps": "best", "learner": "new"}
    for field, value in wrong.items():
        with pytest.raises(ConfigError, match=f"JSRLConfig.{field} is"):
            replace(CONFIG, **{field: value})
    with pytest.raises(ConfigError, match="expected a JSRLConfig"):
        JSRL.create(KEY, jnp.zeros((1, 3)), jnp.zeros((1, ACTION_DIM)), IQLConfig())


def test_presets_match_iql() -> None:
    """Presets are IQL's with a guide."""
    for family, expected in (("antmaze", 300), ("adroit", 60), ("other", 60)):
        preset, base = JSRL.preset(family), IQL.preset(family)
        assert preset.config.max_guide_steps == expected and preset.config.anneal_updates is None
        assert (preset.config.beta, preset.config.expectile) == (base.config.beta, base.config.expectile)
        assert (preset.offline_steps, preset.online_steps, preset.reward) == (
            base.offline_steps,
            base.online_steps,
            base.reward,
        )
    assert JSRL.preset("locomotion").normalize_returns == 1000.0
