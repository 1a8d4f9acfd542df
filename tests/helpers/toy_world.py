"""A toy environment and its dataset, small enough to follow every number, for the tests of base policies."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o.data import datasets
from o2o.data.datasets import Dataset

HIGH = np.asarray([1.0, 2.0], np.float32)


class Toy(gym.Env):
    """A drifting point: the first coordinate ends the episode beyond 1.2, a time limit of 6 steps does else."""

    observation_space = spaces.Dict({"a": spaces.Box(-np.inf, np.inf, (1,)), "b": spaces.Box(-np.inf, np.inf, (2,))})
    action_space = spaces.Box(-HIGH, HIGH, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.a, self.b, self.t = self.np_random.uniform(-1, 1, 1), self.np_random.uniform(-1, 1, 2), 0
        return self._observation(), {}

    def _observation(self) -> dict[str, np.ndarray]:
        return {"a": self.a.astype(np.float32), "b": self.b.astype(np.float32)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.a, self.b = self.a + 0.3, self.b + 0.1 * np.asarray(action)
        return self._observation(), 0.0, bool(self.a[0] > 1.2), self.t >= 6, {"executed": action}


def make_world(root: Path) -> Dataset:
    """Write 40 rows or so of random actions in Toy, some episodes terminated and some cut, and load them."""
    env = Toy()
    env.action_space.seed(0)
    recorded = list(datasets.record(env, lambda _, rng: (0.4 * rng.uniform(-HIGH, HIGH)).astype(np.float32), 40))
    datasets.write(
        "toy-v0", recorded, observation_space=env.observation_space, action_space=env.action_space, spec=None, root=root
    )
    data = datasets.load("toy-v0", root=root, action_range="data", action_margin=0.2)
    ends, masks = data.arrays["ends"], data.arrays["masks"]
    assert (masks[ends] == 0).any() and (masks[ends] == 1).any()
    return data
