"""Data of one's own: recorded by hand in a robot, through wrappers or with cameras, written, loaded, made again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import ReshapeObservation, TimeAwareObservation

from o2o import envs
from o2o.data import datasets, files
from o2o.data.task import Task
from o2o.errors import DatasetError, EnvironmentMismatchError

ARM, CLOCK = "OwnArm-v0", "OwnPendulum-v0"


class Arm(gym.Env):
    """Says of its success in an array, at the third and last step of an episode."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-0.1, 0.1, (1,), np.float64)
    action_map = "its own"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.t += 1
        return np.full(2, self.t, np.float32), 0.0, self.t == 3, False, {"success": np.asarray([self.t == 3])}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Forget the environments that a test registers."""
    yield
    for name in (ARM, CLOCK):
        gym.registry.pop(name, None)


def written(env: gym.Env, steps: int, root: Path) -> datasets.Dataset:
    """Record random actions as the docs say, and load what was written."""
    env.action_space.seed(0)
    episodes = list(datasets.record(env, lambda *_: env.action_space.sample(), steps))
    own = {"observation_space": env.observation_space, "action_space": env.action_space}
    folder = datasets.write("own/set-v0", episodes, **own, spec=env.spec, eval_spec=env.spec, root=root)
    return datasets.load(folder, task=Task("own", has_success=True), cache=False)


def test_robot_class_array_success(tmp_path: Path) -> None:
    """A robot registered by its class may report success in an array."""
    gym.register(ARM, entry_point=Arm, max_episode_steps=5)
    data = written(gym.make(ARM), 6, tmp_path)
    assert data.info.episode_success is not None and data.info.episode_success.tolist() == [True, True]
    assert data.arrays["ends"].tolist() == [False, False, True] * 2
    assert data.info.env_spec is None and data.info.eval_env_spec is None
    with pytest.raises(EnvironmentMismatchError, match="does not name its environment; give one with `env`"):
        envs.make(data.info)
    env = envs.make(ARM, dataset=data.info)
    env.reset(seed=0)
    for sign in (1.0, -1.0, 1.0):
        *_, info = env.step(np.full(1, sign, np.float32))
    assert info["success"] is True
    env.close()


def test_same_environment_by_json(tmp_path: Path) -> None:
    """Environments are the same if their specifications read alike in JSON."""
    shaped = ReshapeObservation(gym.make("InvertedPendulum-v5"), (2, 2))
    assert shaped.spec is not None
    its = {"entry_point": shaped.spec.entry_point, "additional_wrappers": shaped.spec.additional_wrappers}
    gym.register(CLOCK, **its, max_episode_steps=9)
    about = written(gym.make(CLOCK), 5, tmp_path).info
    assert about.env_spec is not None and about.env_spec.additional_wrappers != its["additional_wrappers"]
    assert envs.same_environment(CLOCK, about)
    gym.registry.pop(CLOCK)
    gym.register(CLOCK, **its, max_episode_steps=8)
    assert not envs.same_environment(CLOCK, about)


def test_own_wrappers_ignored() -> None:
    """Wrappers of our own in a file are none of the environment's."""
    env = envs.make("InvertedPendulum-v5")
    assert env.spec is not None and env.spec.additional_wrappers
    spec = files.env_spec({"env_spec": env.spec.to_json(), "dataset_id": "own/set-v0"})
    assert spec is not None and spec.id == "InvertedPendulum-v5" and not spec.additional_wrappers
    env.close()


def test_recording_wrappers_named(tmp_path: Path) -> None:
    """Wrappers that a dataset was recorded through are named, not dropped."""
    env = TimeAwareObservation(gym.make("InvertedPendulum-v5"))
    about = written(env, 20, tmp_path).info
    with pytest.raises(EnvironmentMismatchError, match=r"wrappers around it \(TimeAwareObservation\).*`env` module:ID"):
        envs.make(about)
    assert env.spec is not None and not envs.same_environment("InvertedPendulum-v5", about)
    gym.register(CLOCK, env.spec.entry_point, max_episode_steps=1000, additional_wrappers=env.spec.additional_wrappers)
    again = envs.make(CLOCK, dataset=about)
    assert again.reset(seed=0)[0].shape == (5,)
    header = datasets.environment_entries(env.observation_space, env.action_space, again.spec)  # as a recorder says it
    spec = datasets.read_environment(header, "run")[2]
    assert spec is not None and [wrapper.name for wrapper in spec.additional_wrappers] == ["TimeAwareObservation"]
    again.close()
    env.close()


def test_camera_images_recorded(rendering: None, tmp_path: Path) -> None:
    """Images of cameras are recorded with the environment that renders them."""
    env = envs.CameraObservation(gym.make("InvertedPendulum-v5"), {"free": (16, 16)})
    data = written(env, 5, tmp_path)
    assert data.arrays["observations"]["free"].shape == (data.size, 16, 16, 3)
    assert data.info.env_spec is not None and data.info.env_spec.additional_wrappers == ()
    again = envs.make(data.info)
    assert again.reset(seed=0)[0]["free"].shape == (16, 16, 3)
    again.close()
    env.close()


def test_o2o_env_not_recorded() -> None:
    """Nothing is recorded from an environment of o2o's own."""
    env = envs.make("InvertedPendulum-v5")
    with pytest.raises(DatasetError, match=r"make it with gymnasium.make \(for images, o2o.envs.CameraObservation"):
        next(datasets.record(env, lambda *_: np.zeros(1, np.float32), 5))
    env.close()
