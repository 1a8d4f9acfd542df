"""DM-control's tasks of MuJoCo Playground: the same numbers as its own environment gives."""

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o import envs
from o2o.envs.playground import TASKS
from o2o.errors import ConfigError
from o2o.simulators import Batch
from o2o.simulators.playground import Playground


def test_named_without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ids are known; without the package one line says what to install."""
    assert len(TASKS) == 25 and all(f"playground/{name}-v0" in gym.registry for name in TASKS)
    monkeypatch.setitem(__import__("sys").modules, "mujoco_playground", None)
    with pytest.raises(ConfigError, match=r"pip install 'o2o\[playground\]'"):
        envs.make("playground/CartpoleBalance-v0")


def test_same_as_its_own() -> None:
    """Two environments side by side give Playground's observations and rewards; a time limit is no termination."""
    suite = pytest.importorskip("mujoco_playground", reason="pip install 'o2o[playground]'").dm_control_suite
    assert set(TASKS) == set(suite.ALL_ENVS)
    batch = Batch.of(Playground("CartpoleBalance"), envs.task_for("playground/CartpoleBalance-v0"), limit=3)
    worlds = jax.jit(lambda key: batch.reset(key, 2))(jax.random.key(0))
    step, actions = jax.jit(batch.step), jnp.asarray([[0.5], [-2.0]])
    theirs = suite.load("CartpoleBalance", config_overrides={"impl": "jax"})
    state, their_step = worlds.state, jax.jit(jax.vmap(theirs.step))
    for number in range(1, 4):
        worlds, rows, ends = step(worlds, actions)
        state = their_step(state, jnp.clip(actions, -1.0, 1.0))
        np.testing.assert_allclose(rows["next_observations"], state.obs, atol=1e-5)
        np.testing.assert_allclose(rows["rewards"], state.reward, atol=1e-5)
        assert ends.ended.tolist() == [number == 3] * 2 and rows["masks"].tolist() == [1.0, 1.0]
    assert worlds.length.tolist() == [0, 0]
    assert not np.allclose(worlds.observations, rows["next_observations"], atol=1e-3), "a new episode"
