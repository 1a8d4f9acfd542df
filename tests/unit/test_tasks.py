"""Tasks: reward transforms with their float32 values, success rules, and the table."""

import sys
from pathlib import Path

import numpy as np
import pytest

from o2o import envs
from o2o.data.task import Task
from o2o.errors import ConfigError


def test_maze_reward():
    """The maze's reward is minus five or five."""
    task = envs.task_for("AntMaze_Large-v5")
    assert task.rewards(np.array([0.0, 1.0])).tolist() == [-5.0, 5.0]
    assert task.failure_reward == -5.0
    assert task.terminate_on_success and dict(task.env_kwargs) == {"continuing_task": False, "reset_target": False}


def test_binary_reward_ignores_raw():
    """The binary reward ignores the raw one."""
    task = envs.task_for("AdroitHandPen-v1", binary=True)
    rewards = task.rewards(np.array([60.9, -3.2]), np.array([True, False]))
    assert rewards.tolist() == [5.0, -5.0] and rewards.dtype == np.float32
    assert task.failure_reward == -5.0 and task.terminate_on_success


def test_failure_reward_in_float32():
    """The failure reward equals that of `rewards` in float32."""
    task = Task("t", reward_scale=0.1, reward_bias=0.3, binary=True, sparse=True, has_success=True)
    assert np.float32(task.failure_reward) == task.rewards([0.0], [False])[0]
    assert Task("dense").failure_reward is None


def test_binary_needs_success_flags():
    """A binary reward without success flags is an error."""
    with pytest.raises(ConfigError, match="binary reward needs success flags"):
        Task("t", binary=True).rewards([1.0])


def test_success_source_order():
    """Success is read from the flags, else from the reward, else it is unknown."""
    maze = envs.task_for("PointMaze_UMaze-v3")
    assert maze.success(np.array([0.0, 1.0])).tolist() == [False, True]
    assert maze.success(np.array([1.0, 1.0]), np.array([0, 1])).tolist() == [False, True]
    assert Task("t", has_success=True).success(np.array([1.0])) is None
    assert envs.task_for("Hopper-v5").success(np.array([1.0]), np.array([True])) is None


@pytest.mark.parametrize(
    ("env_id", "family", "metric", "sparse"),
    [
        ("PointMaze_UMaze-v3", "pointmaze", "success", True),
        ("PointMaze_UMazeDense-v3", "pointmaze", "success", False),
        ("AntMaze_Medium_Diverse_GR-v5", "antmaze", "success", True),
        ("AdroitHandDoor-v1", "adroit", "success", False),
        ("FrankaKitchen-v1", "kitchen", "kitchen", False),
        ("Walker2d-v5", "locomotion", "return", False),
        ("CartPole-v1", "other", "success", False),
    ],
)
def test_task_table(env_id, family, metric, sparse):
    """The table has the family, the metric and the sparsity of each environment's task."""
    task = envs.task_for(env_id)
    assert (task.family, task.metric, task.sparse, task.env_id) == (family, metric, sparse, env_id)
    assert hash(task) == hash(envs.task_for(env_id))


def test_kitchen_reward_shift():
    """The kitchen's reward is shifted by four."""
    assert envs.task_for("FrankaKitchen-v1").rewards([0.0, 4.0]).tolist() == [-4.0, 0.0]


def test_episode_score_by_task_metric():
    """An episode is judged by its task's metric."""
    kitchen, maze, hopper = (envs.task_for(name) for name in ("FrankaKitchen-v1", "PointMaze_UMaze-v3", "Hopper-v5"))
    assert kitchen.score(71.0, 3.0, False) == 0.75 and maze.score(71.0, 3.0, False) == 0.0
    assert maze.score(71.0, 3.0, True) == 1.0 and hopper.score(71.0, 3.0, True) == 71.0
    assert Task("mine").score(71.0, 3.0, None) == 71.0, "where success is not known"


def test_binary_refused_without_success():
    """A binary reward is refused where it makes no sense."""
    with pytest.raises(ConfigError, match="Hopper-v5"):
        envs.task_for("Hopper-v5", binary=True)


def test_register_overrides_table(monkeypatch):
    """A registered task wins over the table."""
    monkeypatch.setattr("o2o.envs.tasks.TASKS", list(envs.TASKS))
    envs.register(r"Hopper-v\d+", Task("mine", "other", reward_scale=2.0))
    assert envs.task_for("Hopper-v5").reward_scale == 2.0
    assert envs.task_for("Walker2d-v5").reward_scale == 1.0
    with pytest.raises(ConfigError, match="not a regular expression"):
        envs.register("(", Task("mine"))


def test_local_module_env_and_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the working folder brings its environment and its task."""
    (tmp_path / "my_arm.py").write_text(
        "import gymnasium\nfrom o2o import envs\nfrom o2o.data.task import Task\n"
        "gymnasium.register('BentArm-v0', 'gymnasium.envs.mujoco.reacher_v5:ReacherEnv', max_episode_steps=7)\n"
        "envs.register('BentArm-v0', Task('arm', reward_scale=2.0))\n"
    )
    (tmp_path / "my_broken_arm.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr("o2o.envs.tasks.TASKS", list(envs.TASKS))
    assert envs.task_for("my_arm:BentArm-v0").reward_scale == 2.0
    env = envs.make("my_arm:BentArm-v0")
    assert env.spec is not None and env.spec.max_episode_steps == 7
    env.close()
    with pytest.raises(
        ConfigError, match=r"'my_broken_arm' cannot be imported \(ZeroDivisionError: division by zero\)"
    ):
        envs.make("my_broken_arm:BentArm-v0")
