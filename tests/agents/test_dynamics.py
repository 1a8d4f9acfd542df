"""The dynamics ensemble: hold-out and bootstrap, a linear-Gaussian world, elites, early stopping, termination rules."""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.errors import ConfigError, DatasetError
from o2o.nn.dynamics import Dynamics, split_rows, training_row
from o2o.nn.terminations import RULES, check_size, termination_of

A = np.asarray([[0.9, 0.1], [-0.1, 0.8]], np.float32)
B = np.asarray([[0.5], [1.0]], np.float32)
NOISE = 0.05


@dataclass
class World:
    """Stands where an `OfflineData` would: its rows are all that a dynamics model reads."""

    rows: dict[str, Any]


jax.tree_util.register_dataclass(World, data_fields=["rows"], meta_fields=[])


def make_world(size: int = 600, offset: float = 0.0) -> World:
    """Return a linear-Gaussian system around `offset`; it ends where the first coordinate exceeds 1."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(size, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, size=(size, 1)).astype(np.float32)
    following = states @ A.T + actions @ B.T + NOISE * rng.normal(size=(size, 2)).astype(np.float32)
    rows = {
        "observations": states + offset, "actions": actions, "next_observations": following + offset,
        "rewards": states[:, 0] + actions[:, 0], "masks": 1.0 - (following[:, 0] > 1.0),
    }  # fmt: skip
    return World({key: jnp.asarray(value, jnp.float32) for key, value in rows.items()})


def make_model(termination: Any = "never", members: int = 3, elites: int = 2, patience: int = 5) -> Dynamics:
    return Dynamics.create(
        jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros((1, 1)), hidden_dims=(32,), num=members, elites=elites,
        learning_rate=5e-3, patience=patience, termination=termination,
    )  # fmt: skip


@jax.jit
def train(model: Dynamics, data: World, rng: jax.Array) -> Dynamics:
    """Take 1500 steps with a validation after every 250."""

    def part(model: Dynamics, key: jax.Array) -> tuple[Dynamics, None]:
        model, _ = jax.lax.scan(lambda m, k: (m.train_step(data, k)[0], None), model, jax.random.split(key, 250))
        return model.validate(data), None

    return jax.lax.scan(part, model, jax.random.split(rng, 6))[0]


@pytest.fixture(scope="module")
def trained() -> tuple[Dynamics, World]:
    world = make_world(offset=10.0)
    return train(make_model("learned").prepare(world), world, jax.random.key(1)), world


def test_learnt_dynamics_match_world(trained: tuple[Dynamics, World]) -> None:
    """The learnt world is the true one, in raw units."""
    model, _ = trained
    states: Any = 10.0 + np.asarray([[0.5, -0.5], [0.0, 1.0], [-1.0, 0.3]], np.float32)
    actions: Any = np.asarray([[0.2], [-0.7], [0.5]], np.float32)
    steps = jax.jit(jax.vmap(lambda key: model.step(key, states, actions)))(jax.random.split(jax.random.key(2), 200))
    following, rewards = (np.asarray(steps[i]) for i in (0, 1))
    expected = 10.0 + (states - 10.0) @ A.T + actions @ B.T
    np.testing.assert_allclose(following.mean(axis=0), expected, atol=0.08)
    np.testing.assert_allclose(rewards.mean(axis=0), states[:, 0] - 10.0 + actions[:, 0], atol=0.08)
    assert 0.5 * NOISE < following.std(axis=0).mean() < 3.0 * NOISE


def test_learnt_termination(trained: tuple[Dynamics, World]) -> None:
    """The learnt termination follows the dataset's ends."""
    model, world = trained
    _, _, ended = jax.jit(model.step)(jax.random.key(0), world.rows["observations"], world.rows["actions"])
    assert float(jnp.mean(ended == (world.rows["masks"] == 0.0))) > 0.93
    assert 0.02 < float(jnp.mean(world.rows["masks"] == 0.0)) < 0.5


def test_holdout_rows_never_trained_on() -> None:
    """Hold-out rows are never trained on, and all others can be."""
    for size in (50, 61, 1000, 5001, 9000):
        held, _ = split_rows(size)
        assert len(held) == min(int(0.2 * size), 1000) and len(set(held.tolist())) == len(held)
        trained_on = np.asarray(training_row(jnp.arange(size - len(held)), size))
        assert sorted([*trained_on.tolist(), *held.tolist()]) == list(range(size))


def test_bootstrap_list_per_member() -> None:
    """Each member has a bootstrap list of its own, and it is the same at every step.

    About 63 % of the rows are in a list that was drawn with replacement; two steps draw from one list.
    """
    size, seen = 100, []
    numbered = jnp.arange(size, dtype=jnp.float32)[:, None] * jnp.ones(2)
    rest = {"actions": jnp.zeros((size, 1)), "next_observations": jnp.zeros((size, 2)), "rewards": jnp.zeros(size)}
    data = World({"observations": numbered, **rest})
    model = make_model(members=2)

    def record(self: Any, params: Any, rows: Any) -> Any:
        seen.append(np.asarray(rows["observations"][..., 0]))
        return jnp.zeros(()), {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dynamics, "loss", record)
        with jax.disable_jit():
            for key in jax.random.split(jax.random.key(3), 2):
                model.train_step(data, key)
    rows = [{*seen[0][member].tolist(), *seen[1][member].tolist()} for member in range(2)]
    assert all(0.5 * 80 < len(each) < 0.75 * 80 for each in rows), "80 training rows, 63 % of them in a list"
    assert rows[0] != rows[1]


def test_elites_have_least_error() -> None:
    """Elites are the members with the least error, and every row comes from one."""
    model, world = make_model(members=3, elites=2), make_world()
    kernel, bias = (model.best["params"]["output"][key] for key in ("kernel", "bias"))
    constants = jnp.asarray([1.0, 2.0, 3.0])  # members that always say their number, with hardly any noise
    bias = bias.at[:, :3].set(constants[:, None]).at[:, 3:].set(-30.0)
    best = {"params": {**model.best["params"], "output": {"kernel": 0.0 * kernel, "bias": bias}}}
    model = model.replace(best=best, best_error=jnp.asarray([0.3, 0.1, 0.2]))
    states, actions = world.rows["observations"], world.rows["actions"]
    following, rewards, ended = model.step(jax.random.key(0), states, actions)
    said = np.round(np.asarray(following - states)).astype(int)
    assert set(said[:, 0].tolist()) == {2, 3} and 0.4 < np.mean(said[:, 0] == 2) < 0.6
    np.testing.assert_array_equal(said[:, 0], said[:, 1])
    np.testing.assert_array_equal(np.round(rewards), said[:, 0])
    assert not ended.any()


def test_validation_keeps_best_weights() -> None:
    """Only better weights are kept, and none after the patience has run out."""
    world, model = make_world(), make_model(patience=2)
    first = model.prepare(world).validate(world)
    np.testing.assert_allclose(first.best_error, first.holdout_error(world, model.model.params), rtol=1e-6)
    worse = first.replace(model=first.model.replace(params=jax.tree.map(lambda leaf: leaf + 3.0, first.model.params)))
    kept = worse.validate(world)
    np.testing.assert_array_equal(kept.best_error, first.best_error)
    for one, two in zip(jax.tree.leaves(kept.best), jax.tree.leaves(first.best), strict=True):
        np.testing.assert_array_equal(one, two)
    assert int(kept.waited) == 1
    late = kept.replace(waited=jnp.asarray(2), best_error=jnp.full(3, 1e9))
    np.testing.assert_array_equal(late.validate(world).best_error, late.best_error)


def test_constant_dimensions_centred() -> None:
    """Constant dimensions are only centred."""
    world = make_world()
    world.rows["observations"] = world.rows["observations"].at[:, 1].set(7.0)
    model = make_model().prepare(world)
    assert float(model.mean[1]) == pytest.approx(7.0) and float(model.std[1]) == 1.0
    assert float(model.std[0]) == pytest.approx(float(world.rows["observations"][:, 0].std()), rel=0.1)


def test_too_few_rows_refused() -> None:
    """Too few rows are refused."""
    with pytest.raises(DatasetError, match=r"has 49 transitions; a dynamics ensemble needs at least 50"):
        split_rows(49)


def test_task_termination_rules() -> None:
    """Each task's rule ends failed states only, whatever precedes the last observation."""
    hopper = np.zeros((6, 11), np.float32)
    hopper[:, 0] = [1.2, 0.7, 1.2, 1.2, np.nan, 200.0]
    hopper[2, 1], hopper[3, 5] = -0.2, 150.0
    np.testing.assert_array_equal(RULES["hopper"](jnp.asarray(hopper)), [False, True, True, True, True, False])
    walker = np.zeros((4, 17), np.float32)
    walker[:, 0] = [1.2, 0.8, 2.0, 1.2]
    walker[3, 1] = 1.0
    np.testing.assert_array_equal(RULES["walker2d"](jnp.asarray(walker)), [False, True, True, True])
    cheetah = np.zeros((2, 17), np.float32)
    cheetah[1, 3] = -100.0
    np.testing.assert_array_equal(RULES["halfcheetah"](jnp.asarray(cheetah)), [False, True])
    pen = np.zeros((2, 45), np.float32)
    pen[:, 26] = [0.2, 0.07]
    np.testing.assert_array_equal(RULES["pen"](jnp.asarray(pen)), [False, True])
    assert not RULES["never"](jnp.full((3, 2), 1e9)).any()
    for name, states in (("hopper", hopper), ("walker2d", walker), ("halfcheetah", cheetah), ("pen", pen)):
        for before in (states[::-1], np.full((len(states), 1), 300.0)):  # an older observation, or a position
            longer = jnp.asarray(np.concatenate([before, states], axis=1))
            np.testing.assert_array_equal(RULES[name](longer), RULES[name](jnp.asarray(states)))
            np.testing.assert_array_equal(
                RULES[name].out_of_range(longer), RULES[name].out_of_range(jnp.asarray(states))
            )
    names = ["Hopper-v5", "Walker2d-v4", "HalfCheetah-v5", "AdroitHandPen-v1", "AntMaze_UMaze-v5", None]
    found = [termination_of(name) for name in names]
    assert found == ["hopper", "walker2d", "halfcheetah", "learned", "learned", "learned"]


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"])
def test_rules_match_environments(env_id: str) -> None:
    """A rule knows the observations of its environment, with and without the position."""
    rule = RULES[termination_of(env_id)]
    for position in (False, True):
        env = gym.make(env_id, exclude_current_positions_from_observation=not position)
        observation, _ = env.reset(seed=0)
        assert observation.shape == (rule.size + position,) and not rule(jnp.asarray(observation))
        if not position:
            env.unwrapped.data.qpos[:2] = [300.0, 0.1]  # type: ignore[attr-defined]
            fallen = env.unwrapped._get_obs()  # type: ignore[attr-defined]
            assert bool(rule(jnp.asarray(fallen))) == (env_id != "HalfCheetah-v5")
        env.close()


def test_short_observations_refused() -> None:
    """Observations too short for a rule are refused."""
    with pytest.raises(ConfigError, match=r"'hopper' reads observations of 11 numbers, the task's have 10; set"):
        check_size("hopper", 10)
    with pytest.raises(ConfigError, match=r"'pen' reads observations of 45 numbers"):
        make_model(termination="pen")
    check_size("learned", 1)
