"""A simulator of which only one can run: training and evaluation take turns in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from o2o.config import RunConfig
from o2o.data import datasets
from o2o.data.datasets import Episode
from o2o.envs.shared import OneSimulator
from o2o.errors import ConfigError, EnvironmentFaultError
from o2o.runs import session
from o2o.runs.folder import read_status

T, LIMIT = 12, 5


class OnlyOne(gym.Env):
    """Its observation counts the steps since the reset; a second object fails in its constructor."""

    observation_space, action_space = spaces.Box(-100, 100, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
    open_now, made, steps, at = 0, 0, 0, 0

    def __init__(self, **_: Any) -> None:
        if OnlyOne.open_now:
            raise OSError("[Errno 98] Address already in use: port 2000")
        OnlyOne.open_now, OnlyOne.made = 1, OnlyOne.made + 1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.at = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        OnlyOne.steps, self.at = OnlyOne.steps + 1, self.at + 1
        return np.full(3, self.at, np.float32), 1.0, False, False, {}

    def close(self) -> None:
        OnlyOne.open_now -= 1


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """Return a maker of tiny TD3+BC runs in the simulator, which has a time limit of 5 steps."""
    for name in ("open_now", "made", "steps"):
        monkeypatch.setattr(OnlyOne, name, 0)
    monkeypatch.setitem(gym.registry, "OnlyOne-v0", EnvSpec("OnlyOne-v0", entry_point=OnlyOne, max_episode_steps=LIMIT))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    rows = Episode(np.zeros((T + 1, 3)), np.full((T, 2), 0.1), np.zeros(T), np.zeros(T, bool), np.arange(T) == T - 1)
    kinds: Any = {"observation_space": OnlyOne.observation_space, "action_space": OnlyOne.action_space}
    datasets.write("lab/one-v0", [rows] * 3, spec=None, root=tmp_path, **kinds)

    def make(online: int, **changes: Any) -> RunConfig:
        loop = {"eval_envs": 0, "eval_episodes": 2, "eval_every": 8, "log_every": 4, "checkpoint_every": 10}
        config = {"batch_size": 4, "actor_hidden_dims": (8,), "critic_hidden_dims": (8,)}
        run = session.preset_run(
            "td3bc", "lab/one-v0", "small", "OnlyOne-v0", offline_steps=2, online_steps=online, config=config, loop=loop
        )
        return session.with_fields(run, changes)

    return make


def test_take_turns(run_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    """One simulator trains, evaluates and records; evaluations cut the training episode, and nothing is mixed up."""
    assert session.train(run_of(20, record=True), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/episodes.jsonl").read_text().splitlines()]
    assert read_status(tmp_path / "run") == "finished" and OnlyOne.open_now == 0
    evaluated = [row for row in rows if row["kind"] == "eval"] if "kind" in rows[0] else rows
    assert {row["return"] for row in evaluated} == {float(LIMIT)}
    assert OnlyOne.steps == 20 + LIMIT * len(evaluated)
    recorded = datasets.load(next((tmp_path / "run/recorded").glob("*-v0")), cache=False)
    assert recorded.size == 20, "every training step, and none of an evaluation"
    now, after = (np.asarray(recorded.arrays[key]) for key in ("observations", "next_observations"))
    np.testing.assert_array_equal(after - now, 1.0)
    assert len(session.evaluate_run(tmp_path / "run", 3)) == 3 and OnlyOne.open_now == 0


def test_resume_one(run_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A finished run goes on in one simulator."""
    assert session.train(run_of(10), tmp_path / "run") and OnlyOne.made == 2, "once to look, once to train"
    assert session.resume(tmp_path / "run", online_steps=20) and OnlyOne.open_now == 0


def test_two_are_refused_with_remedy(run_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    """With an environment of its own for evaluation, the refusal names the setting that shares one."""
    with pytest.raises(ConfigError, match="1 can be had .*set `loop.eval_envs` to 0"):
        session.train(run_of(20, **{"loop.eval_envs": 1}), tmp_path / "run")
    assert not (tmp_path / "run").exists() and OnlyOne.open_now == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("seeds", 2), ("loop.env_processes", 1), ("loop.eval_process", True), ("config.online.num_envs", 2)],
)
def test_one_for_several_refused(run_of: Callable[..., RunConfig], name: str, value: Any) -> None:
    """One simulator cannot serve several seeds, environments or processes."""
    with pytest.raises(ConfigError, match=rf"loop.eval_envs is 0, one environment for everything, and `{name}`"):
        run_of(20, **{name: value})


def test_step_of_other_episode(run_of: Callable[..., RunConfig]) -> None:
    """A share whose episode was broken off refuses to play on in another's; closing twice closes once."""
    one = OneSimulator()
    first, second = one(gym.spec("OnlyOne-v0")), one(gym.spec("OnlyOne-v0"))
    first.reset(seed=0)
    second.reset(seed=0)
    with pytest.raises(EnvironmentFaultError, match="was reset by another user"):
        first.step(np.zeros(2, np.float32))
    first.close()
    first.close()
    assert OnlyOne.open_now == 1 and second.step(np.zeros(2, np.float32))[0][0] == 1
    second.close()
    assert OnlyOne.open_now == 0
