"""Evaluation: rows, determinism, the shares of slots, and carries cleared at every end, in real MuJoCo."""

from typing import Any, Self

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from o2o import envs
from o2o.data.normalizer import Normalizer
from o2o.errors import ConfigError
from o2o.train.acting import clear_carry
from o2o.train.evaluation import EnvFn, Evaluator, evaluate
from o2o.types import Agent, Array, Batch, Carry, Info

LIMIT = 12


class Pendulum(Agent):
    """A linear controller of the inverted pendulum, with noise where asked for."""

    gains: Array
    config: Any = struct.field(pytree_node=False, default=None)

    @classmethod
    def create(cls, rng: Array, observations: Any, actions: Any, config: Any = None) -> Self:
        return cls(gains=jax.random.normal(rng, observations.shape[-1:]), config=config)

    def update(self, batch: Batch) -> tuple[Self, Info]:
        return self, {}

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        action = jnp.sum(observations * self.gains, axis=-1, keepdims=True)
        if not deterministic:
            action = action + 0.3 * jax.random.normal(rng, action.shape)
        return jnp.clip(action, -1.0, 1.0), carry

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Carry:
        return None

    def online(self) -> Self:
        return self


class Counting(Pendulum):
    """The same, remembering the steps since the episode began; the action says how many."""

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        return self.gains[0] + carry["steps"] / 1000, {"steps": carry["steps"] + 1}

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Carry:
        return {"steps": jnp.zeros((*batch_shape, 1))}


class Recorder(gymnasium.Wrapper):
    """Keep the actions of every episode."""

    def __init__(self, env: gymnasium.Env, episodes: list[list[float]]) -> None:
        super().__init__(env)
        self.episodes = episodes

    def reset(self, **kwargs: Any) -> Any:
        self.episodes.append([])
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.episodes[-1].append(float(action[0]))
        return self.env.step(action)


STEADY = Pendulum(gains=jnp.asarray([0.3, 1.0, 0.3, 0.3]))
STILL = Pendulum(gains=jnp.zeros(4))


def pendulum(limit: int = LIMIT) -> EnvFn:
    """Return a maker of inverted pendulums with a time limit."""
    make = lambda evaluation: envs.make(  # noqa: E731
        "InvertedPendulum-v5", evaluation=evaluation, env_kwargs={"max_episode_steps": limit}
    )
    return make


def stack(*agents: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *agents)


def test_hand_written_agent() -> None:
    """The hand-written agent is an `Agent`."""
    assert isinstance(STEADY, Agent)


def test_row_per_episode_and_seed() -> None:
    """Evaluation gives one row per episode and seed."""
    made = []

    def env_fn(evaluation: bool) -> gymnasium.Env:
        made.append(evaluation)
        return pendulum()(evaluation)

    evaluator = Evaluator(env_fn, seeds=2, episodes=5, seed=0, normalized=lambda raw: raw / LIMIT, slots=2)
    rows = evaluator(stack(STEADY, STILL), None, point=0)
    assert [(row["seed"], row["episode"]) for row in rows] == [(s, e) for s in (0, 1) for e in range(5)]
    assert made == [True] * 4
    for row in rows:
        assert set(row) >= {"return", "length", "success", "success_last", "normalized", "terminated"}
        assert row["normalized"] == row["return"] / LIMIT
        assert row["terminated"] == (row["length"] < LIMIT)
    assert {row["return"] for row in rows if row["seed"] == 0} == {float(LIMIT)}
    evaluator(stack(STEADY, STILL), None, point=1)
    assert made == [True] * 4, "the environments are kept"
    evaluator.close()


def test_deterministic_evaluation_repeats() -> None:
    """Deterministic evaluation repeats itself."""
    evaluator = Evaluator(pendulum(200), seeds=2, episodes=3, seed=4)
    agents = stack(STILL, Pendulum(gains=jnp.asarray([0.0, 0.2, 0.0, 0.1])))
    first = evaluator(agents, None, point=10)
    assert evaluator(agents, None, point=10) == first
    assert len({row["length"] for row in first}) > 1
    assert evaluator(agents, None, point=11) != first, "another point of the run plays other episodes"
    fresh = Evaluator(pendulum(200), seeds=2, episodes=3, seed=4)
    assert fresh(agents, None, point=10) == first
    for each in (evaluator, fresh):
        each.close()


def test_sampled_evaluation_repeats() -> None:
    """Sampled evaluation repeats itself, too."""
    evaluator = Evaluator(pendulum(200), seeds=1, episodes=4, seed=0)
    agents = stack(STILL)
    first = evaluator(agents, None, point=0, deterministic=False)
    assert evaluator(agents, None, point=0, deterministic=False) == first
    assert evaluator(agents, None, point=0) != first
    evaluator.close()


def test_policy_noise_from_seed() -> None:
    """The noise of policies comes from the seed, too."""
    first = []
    for seed in (0, 1, 0):
        episodes: list[list[float]] = []
        evaluator = Evaluator(lambda e, kept=episodes: Recorder(pendulum()(e), kept), seeds=1, episodes=1, seed=seed)
        evaluator(stack(STILL), None, point=0, deterministic=False)
        evaluator.close()
        first.append(next(played[0] for played in episodes if played))
    assert first[0] == first[2] != first[1] and 0 not in first


@pytest.mark.parametrize("slots", [1, 3, 10])
def test_slot_count_changes_nothing(slots: int) -> None:
    """The number of episodes played side by side changes nothing."""
    agents = stack(STILL, STEADY)
    evaluator = Evaluator(pendulum(100), seeds=2, episodes=4, seed=1, slots=slots)
    reference = Evaluator(pendulum(100), seeds=2, episodes=4, seed=1, slots=2)
    assert evaluator(agents, None, point=3) == reference(agents, None, point=3)
    for each in (evaluator, reference):
        each.close()


@pytest.mark.parametrize("gain", [0.0, 0.9], ids=["time limits", "falls"])
def test_carries_cleared_at_ends(gain: float) -> None:
    """Carries are cleared at every end of an episode."""
    played: list[list[list[float]]] = []

    def env_fn(evaluation: bool) -> gymnasium.Env:
        played.append([])
        return Recorder(pendulum(LIMIT if not gain else 100)(evaluation), played[-1])

    agents = stack(Counting(gains=jnp.full(4, gain)), Counting(gains=jnp.full(4, -gain)))
    evaluator = Evaluator(env_fn, seeds=2, episodes=5, seed=0, slots=2)
    rows = evaluator(agents, None, point=0)
    assert {row["terminated"] for row in rows} == {bool(gain)}
    evaluator(agents, None, point=1)
    evaluator.close()
    episodes = [episode for slot in played for episode in slot if episode]  # the reset that tries it plays none
    assert len(episodes) == 20 and min(map(len, episodes)) > 2
    for slot, recorded in enumerate(played):
        offset = gain if slot < 2 else -gain
        for episode in filter(None, recorded):
            np.testing.assert_allclose(episode, offset + np.arange(len(episode)) / 1000, atol=1e-6)


def test_clear_carry() -> None:
    """`clear_carry` touches only what ended."""
    carry = {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 3))}
    fresh = jax.tree.map(jnp.zeros_like, carry)
    ended = np.asarray([[True, False, False], [False, False, True]])
    cleared = clear_carry(carry, fresh, ended)
    np.testing.assert_array_equal(cleared["b"], 1.0 - ended)
    np.testing.assert_array_equal(cleared["a"], np.broadcast_to((1.0 - ended)[..., None], (2, 3, 4)))


def test_normalizer_applied() -> None:
    """The normalizer is applied."""
    scale = Normalizer(mean=jnp.zeros(4), std=jnp.full(4, 2.0))
    doubled = STEADY.replace(gains=STEADY.gains * 2)
    assert evaluate(doubled, pendulum(100), 2, normalizer=scale) == evaluate(STEADY, pendulum(100), 2)
    assert evaluate(STEADY, pendulum(300), 1)[0]["length"] > evaluate(STILL, pendulum(300), 1)[0]["length"]


def test_zero_episodes_refused() -> None:
    """An evaluation of no episodes is refused."""
    with pytest.raises(ConfigError, match="eval_episodes is 0"):
        Evaluator(pendulum(), seeds=1, episodes=0, seed=0)
