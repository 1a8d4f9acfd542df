"""A robot's own sparse reward, -1 until success and 0 then: returns of its dataset and of what it plays online."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from o2o import envs
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.data.task import Task
from o2o.errors import DatasetError
from o2o.runs import session

ARM = "SparseArm-v0"
TASK = Task(
    "arm", sparse=True, has_success=True, success_reward=0.0, raw_failure_reward=-1.0, terminate_on_success=True,
    reward_scale=10.0, reward_bias=5.0,
)  # fmt: skip
FAILED, SOLVED = [-500.0] * 4, [-5 - 5 * 0.99 + 5 * 0.99**2, -5 + 5 * 0.99, 5.0]


class Arm(gym.Env):
    """Every other episode, the first one included, succeeds in its third step; the others never do."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.t, self.lucky = 0, self.episodes % 2 == 0
        self.episodes += 1
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return np.full(2, self.t, np.float32), 0.0 if self.lucky and self.t == 3 else -1.0, False, False, {}


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return a dataset of two episodes of four steps, the first successful; the task is registered."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("o2o.envs.tasks.TASKS", list(envs.TASKS))
    gym.register(ARM, Arm, max_episode_steps=4)
    envs.register(ARM, TASK)
    env = gym.make(ARM)
    recorded = list(datasets.record(env, lambda _, rng: rng.uniform(-1, 1, 1).astype(np.float32), 8))
    own = {"observation_space": env.observation_space, "action_space": env.action_space}
    datasets.write("own/arm-v0", recorded, **own, spec=None)
    yield "own/arm-v0"
    gym.registry.pop(ARM)


def test_returns_by_declared_rewards(arm: str) -> None:
    """Returns of failure and success go by the declared rewards."""
    rows = datasets.load(arm, task=TASK).arrays
    assert TASK.failure_reward == -5.0
    assert rows["rewards"].tolist() == [-5, -5, 5, -5, -5, -5, -5, -5]
    assert rows["ends"].tolist() == [False, False, True, True, False, False, False, True]
    np.testing.assert_allclose(rows["mc_returns"], [*SOLVED, -500.0, *FAILED], rtol=1e-6)


def test_single_success_trajectory(arm: str) -> None:
    """A trajectory of one success is no failure.

    Behind the first success of an episode that went on, every step may be one more, a trajectory of its own.
    """
    about = datasets.info(arm)
    steps = np.arange(3) == 2
    more = datasets.Episode(
        observations=np.zeros((4, 2), np.float32), actions=np.zeros((3, 1), np.float32),
        rewards=np.asarray([-1.0, 0.0, 0.0]), terminations=np.zeros(3, bool), truncations=steps,
    )  # fmt: skip
    own = {"observation_space": about.observation_space, "action_space": about.action_space}
    datasets.write("own/more-v0", [more], **own, spec=None)
    np.testing.assert_allclose(datasets.load("own/more-v0", task=TASK).arrays["mc_returns"], [-0.05, 5.0, 5.0])


def test_undeclared_rewards_refused(arm: str) -> None:
    """Failing rewards other than the declared ones are refused."""
    words = r"own/arm-v0: episode 0, step 0 is no success and has the raw reward -1.0, .* arm declares 0.0"
    undeclared = replace(TASK, raw_failure_reward=0.0)
    with pytest.raises(DatasetError, match=words):
        datasets.load(arm, task=undeclared)
    for task in (replace(undeclared, sparse=False), replace(undeclared, success_reward=None)):
        assert datasets.load(arm, task=task).size == 8, "dense, or success not known"
    assert TASK.strange_failures([-1.0, -0.5, 0.0], [False, False, False]).tolist() == [1], "the reward says success"
    maze = envs.task_for("PointMaze_UMaze-v3")
    assert maze.strange_failures([0.0, 1.0, 1.0, 0.5], [False, True, False, False]).tolist() == [3]


def test_online_returns_match(arm: str) -> None:
    """Online episodes have the same returns."""
    run = session.preset_run("calql", arm, "small", env=ARM, loop=LoopConfig(eval_every=0, eval_episodes=1))
    widths = [(f"{network}_hidden_dims", (8,)) for network in ("actor", "critic")]
    config = session.with_fields(run.config, [*widths, ("batch_size", 8), ("num_critics", 2)])
    trainer = session.build(replace(run, config=config))
    trainer.offline(5)
    trainer.online(12)
    assert trainer.counters.phase == "online"
    buffer = trainer.replay.buffer
    assert int(buffer.pending[0]) == 2 and trainer.counters.episodes == [3]
    np.testing.assert_allclose(buffer.rows["mc_returns"][0, :10], [*SOLVED, *FAILED, *SOLVED], rtol=1e-5)
    trainer.close()
