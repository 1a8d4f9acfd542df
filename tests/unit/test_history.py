"""Observation history: by hand, and that a dataset's rows are what the live environment gives for the same actions."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from o2o import envs
from o2o.data import datasets
from o2o.data.history import History, join, with_history
from o2o.data.task import Task
from o2o.errors import ConfigError

TASK = Task("walk")
CAMERA = spaces.Dict(
    {"camera": spaces.Box(0, 255, (4, 5, 3), np.uint8), "place": spaces.Box(-np.inf, np.inf, (2,), np.float64)}
)


class Walk(gym.Env):
    """A walk of 1 to 7 steps, seen as numbers and by a camera that always writes into the same array."""

    observation_space = CAMERA
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self) -> None:
        self.image = np.zeros((4, 5, 3), np.uint8)
        self.place, self.left = np.zeros(2), 0

    def _observation(self) -> dict[str, np.ndarray]:
        self.image[...] = (100 * self.place[0]).astype(np.uint8)
        self.image[0, 0] = self.left
        return {"camera": self.image, "place": self.place.copy()}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.left = self.np_random.uniform(0, 1, 2), int(self.np_random.integers(1, 8))
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self.place, self.left = self.place + np.abs(0.1 * action), self.left - 1
        return self._observation(), 0.0, self.left == 0 and self.place[0] > 0.7, self.left == 0, {}


class Copied(gym.ObservationWrapper):
    """What a recorder must do with such a camera."""

    def observation(self, observation: Any) -> Any:
        return {key: value.copy() for key, value in observation.items()}


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> tuple[datasets.Dataset, list[int]]:
    """Return a dataset of such walks, and the seeds of its episodes."""
    root = tmp_path_factory.mktemp("walks")
    episodes = list(datasets.record(Copied(Walk()), lambda _, rng: rng.uniform(-0.9, 0.9, 2).astype(np.float32), 60))
    lengths = {len(episode.rewards) for episode in episodes}
    assert 1 in lengths and max(lengths) > 4
    assert {bool(episode.terminations[-1]) for episode in episodes} == {True, False}
    path = datasets.write(
        "test/walk-v0", episodes, observation_space=CAMERA, action_space=Walk.action_space, spec=None, root=root
    )
    data = datasets.load(path, task=TASK, cache=False)
    return data, [int(episode.seed or 0) for episode in episodes]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return set(left) == set(right) and all(same(left[key], right[key]) for key in left)
    return left.dtype == right.dtype and np.array_equal(left, right)


def row(observations: Any, index: int) -> Any:
    return {key: value[index] for key, value in observations.items()}


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_dataset_rows_match_live_env(length: int, walks: tuple[datasets.Dataset, list[int]], tmp_path: Path) -> None:
    """A dataset's rows are what the live environment gives for the same actions."""
    data, seeds = walks
    joined = with_history(data, length).arrays
    env = envs.wrap(Walk(), TASK, history=length)
    at = 0
    for seed in seeds:
        observation, over = env.reset(seed=seed)[0], False
        while not over:
            assert same(row(joined["observations"], at), observation)
            assert env.observation_space.contains(observation)
            observation, _, terminated, truncated, _ = env.step(data.arrays["actions"][at])
            over = terminated or truncated
            assert same(row(joined["next_observations"], at), observation)
            assert bool(joined["ends"][at]) == over
            at += 1
    assert at == data.size


def test_next_observations_from_next_row(
    walks: tuple[datasets.Dataset, list[int]],
) -> None:
    """The next observations are the next row's observations, except at the ends."""
    arrays = with_history(walks[0], 3).arrays
    inside = np.flatnonzero(~arrays["ends"][:-1])
    for key in ("state", "camera"):
        np.testing.assert_array_equal(arrays["next_observations"][key][inside], arrays["observations"][key][inside + 1])
    assert arrays["observations"]["state"].shape == (walks[0].size, 6)
    assert arrays["observations"]["camera"].shape == (walks[0].size, 4, 5, 9)
    assert arrays["observations"]["camera"].dtype == np.uint8


def test_history_stays_in_episode() -> None:
    """A history shows nothing of another episode."""
    base = {"observations": np.arange(6, dtype=np.float32)[:, None], "ends": np.array([0, 0, 1, 1, 0, 1], bool)}
    arrays = {**base, "next_observations": base["observations"] + 0.5, "rewards": np.zeros(6, np.float32)}
    data: Any = datasets.Dataset(arrays, None, "", (), None, None, TASK)  # type: ignore[arg-type]
    joined = with_history(data, 3).arrays
    expected = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3], [4, 4, 4], [4, 4, 5]]
    np.testing.assert_array_equal(joined["observations"], expected)
    after = [[0, 0, 0.5], [0, 1, 1.5], [1, 2, 2.5], [3, 3, 3.5], [4, 4, 4.5], [4, 5, 5.5]]
    np.testing.assert_array_equal(joined["next_observations"], after)
    assert with_history(data, 1) is data


def test_history_values() -> None:
    """A history of numbers equals the one made by hand."""
    history = History(3)
    assert history.reset(np.array([1.0])).tolist() == [1, 1, 1]
    assert history.push(np.array([2.0])).tolist() == [1, 1, 2]
    assert [history.push(np.array([x])).tolist() for x in (3.0, 4.0)] == [[1, 2, 3], [2, 3, 4]]
    assert history.reset(np.array([9.0])).tolist() == [9, 9, 9]


def test_reused_arrays_keep_past() -> None:
    """Arrays that an environment writes again do not change the past."""
    reused, history = np.zeros(2), History(2)
    history.reset({"state": reused})
    reused[:] = 5.0
    assert history.push({"state": reused})["state"].tolist() == [0, 0, 5, 5]


def test_images_stacked_oldest_first() -> None:
    """Images are joined along their channels, the oldest first."""
    frames = [{"camera": np.full((2, 2, 1), value, np.uint8)} for value in (1, 2, 3)]
    assert join(frames)["camera"].shape == (2, 2, 3) and join(frames)["camera"][0, 1].tolist() == [1, 2, 3]


def test_history_below_one_refused(walks: tuple[datasets.Dataset, list[int]]) -> None:
    """A history below one is refused."""
    for refused in (lambda: History(0), lambda: with_history(walks[0], 0), lambda: envs.wrap(Walk(), TASK, history=0)):
        with pytest.raises(ConfigError, match="history is 0; expected at least 1"):
            refused()
