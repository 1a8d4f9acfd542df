"""What reaches a robot, and what a human's takeover leaves behind: in training, in evaluation, in play, in files."""

from typing import Any

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from o2o import envs, video
from o2o.episode import EnvSlot
from o2o.errors import DivergenceError
from o2o.evaluate import EnvFn, evaluate
from o2o.fleet import Fleet
from o2o.tasks import Task
from tests.test_evaluate import Pendulum

HUMAN = (1, 2)
"""Steps of every episode, counted from 0, in which a human has the arm."""
LIMIT = 6
TASK = Task("arm", has_success=True)


class Arm(gym.Env):
    """An arm that moves by what is commanded; `played` are the commands of each episode. The human says -1."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, human: tuple[int, ...] = HUMAN) -> None:
        self.human, self.played = human, list[list[float]]()

    def _observation(self) -> np.ndarray:
        return np.asarray([self.x, len(self.played[-1])], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.played.append([])
        self.x = float(self.np_random.uniform())
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        info: dict[str, Any] = {"success": False}
        if len(self.played[-1]) in self.human:
            info["intervene_action"] = np.float32([-1.0])
        self.played[-1].append(float(action[0]))
        self.x += float(info.get("intervene_action", action)[0])
        return self._observation(), self.x, False, len(self.played[-1]) == LIMIT, info


def arms(made: list[Arm] | None = None, human: tuple[int, ...] = HUMAN) -> EnvFn:
    """Return a maker of arms as a run sees them, which keeps them in `made`."""

    def make(evaluation: bool) -> gym.Env:
        arm = Arm(human)
        if made is not None:
            made.append(arm)
        return envs.wrap(arm, TASK, evaluation=evaluation)

    return make


def test_an_action_that_is_not_finite_reaches_no_robot_in_evaluation_and_play() -> None:
    diverged, made = Pendulum(gains=jnp.full(2, jnp.nan)), list[Arm]()
    with pytest.raises(DivergenceError, match="action has nan in entry 0 and was not played"):
        evaluate(diverged, arms(made), episodes=1)
    slot = EnvSlot(arms(made)(True), (0,))
    with pytest.raises(DivergenceError, match="action has nan in entry 0 and was not played"):
        video.record(slot, diverged, None, 1, None)
    assert [arm.played for arm in made] == [[[]], [[]]]


def test_an_action_that_is_not_finite_has_its_error_in_processes_too() -> None:
    fleet = Fleet(arms(), 0, 2, False, processes=2)
    before = fleet.snapshot()
    with pytest.raises(DivergenceError, match="action has inf in entry 0"):
        fleet.step(np.float32([[0.1], [np.inf]]), lambda *_: None)
    assert fleet.snapshot() == before
    fleet.close()
