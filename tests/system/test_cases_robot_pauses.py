"""Training in one process never leaves a robot with its last command while something takes longer than a step."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import pytest

from o2o.envs.safety import Watchdog
from o2o.runs import session
from o2o.runs.session import RunConfig

Maker = Callable[..., RunConfig]


class Hardware(gym.Env):
    """The maze as hardware: it notes what is done to it."""

    metadata = {"replayable": False}
    made: list["Hardware"] = []
    steps_until_signal = 10**9

    def __init__(self) -> None:
        self.made.append(self)
        self.done: list[str] = []
        self.maze = gym.make("PointMaze_UMaze-v3").unwrapped
        self.observation_space, self.action_space = self.maze.observation_space, self.maze.action_space

    def reset(self, **options):
        self.done.append("reset")
        return self.maze.reset(**options)

    def step(self, action):
        self.done.append("step")
        if self.done.count("step") == self.steps_until_signal and "stop" in self.done:  # not in an evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return self.maze.step(action)

    def stop(self):
        self.done.append("stop")


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> type[Hardware]:
    """Return the maze's class; a watchdog that never barks is around it."""
    make = lambda: Watchdog(Hardware(), 1e6)  # noqa: E731
    monkeypatch.setitem(gym.registry, "PausedMaze-v0", gym.envs.registration.EnvSpec("PausedMaze-v0", make))
    monkeypatch.setattr(Hardware, "made", [])
    return Hardware


def test_robot_holds_still(hardware: type[Hardware], tiny_run: Maker, tmp_path: Path) -> None:
    """Before a program is compiled in mid-episode, a checkpoint or the end, the robot is stopped, and begins anew."""
    run = tiny_run("rlpd", [("online.random_steps", 10)], offline_steps=5, online_steps=60, env="PausedMaze-v0")
    run = replace(run, episode_limit=300, loop=replace(run.loop, eval_every=0, checkpoint_every=40, eval_envs=1))
    assert session.train(run, tmp_path / "run", quiet=True)
    (done,) = [each.done for each in hardware.made if each.done.count("step") == 60]  # not those of evaluation
    for before, after in pairwise(done):
        assert before != "stop" or after != "step", "a stopped robot goes on in a new episode"
    first = done.index("step")
    stops = [done[first:i].count("step") for i, what in enumerate(done) if what == "stop" and i > first]
    assert {10, 40, 60} <= set(stops), "random actions end, a checkpoint, the end of training"


def test_signal_stops_robot(hardware: type[Hardware], tiny_run: Maker, tmp_path: Path, monkeypatch) -> None:
    """A signal stops the robot before anything is written."""
    monkeypatch.setattr(hardware, "steps_until_signal", 30)
    run = tiny_run("rlpd", [("online.random_steps", 10)], offline_steps=5, online_steps=60, env="PausedMaze-v0")
    run = replace(run, episode_limit=300, loop=replace(run.loop, eval_every=0, eval_envs=1))
    assert not session.train(run, tmp_path / "run", quiet=True)
    (done,) = [each.done for each in hardware.made if each.done.count("step") == 30]
    assert done[len(done) - done[::-1].index("step")] == "stop"
