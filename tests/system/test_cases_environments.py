"""Environments as people have them: what cannot go well is settled before anything is learnt."""

import logging
from collections.abc import Callable, Iterator
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
from o2o.errors import ConfigError
from o2o.runs import session

T = 12


class Simulator(gym.Env):
    """At most `seats` of it can be had at once; the next one fails in its constructor, or in its reset."""

    observation_space, action_space = spaces.Box(-10, 10, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
    seats, open_now, steps, late = 10**6, 0, 0, False

    def __init__(self, **_: Any) -> None:
        self.refused = Simulator.open_now >= Simulator.seats
        if self.refused and not self.late:
            raise OSError("[Errno 98] Address already in use: port 2000")
        Simulator.open_now += 1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if self.refused:
            raise OSError("[Errno 98] Address already in use: port 2000")
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        Simulator.steps += 1
        return np.zeros(3, np.float32), 0.0, False, False, {}

    def close(self) -> None:
        Simulator.open_now -= 1


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunConfig]]:
    """Return a maker of tiny runs in the simulator, which has a time limit of 5 steps."""
    for name, value in (("seats", 10**6), ("open_now", 0), ("steps", 0), ("late", False)):
        monkeypatch.setattr(Simulator, name, value)
    monkeypatch.setitem(gym.registry, "Seat-v0", EnvSpec("Seat-v0", entry_point=Simulator, max_episode_steps=5))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    rows = Episode(np.zeros((T + 1, 3)), np.full((T, 2), 0.1), np.zeros(T), np.zeros(T, bool), np.arange(T) == T - 1)
    spaces_of: Any = {"observation_space": Simulator.observation_space, "action_space": Simulator.action_space}
    datasets.write("lab/seat-v0", [rows] * 3, spec=None, root=tmp_path, **spaces_of)

    def make(offline: int = 2, online: int = 0, *changes: tuple[str, Any]) -> RunConfig:
        run = session.preset_run("bc" if not online else "td3bc", "lab/seat-v0", "small", env="Seat-v0")
        dims = [(f"config.{name}", (8,)) for name in ("actor_hidden_dims", "critic_hidden_dims")]
        known = [(name, value) for name, value in dims if hasattr(run.config, name.partition(".")[2])]
        steps = [("offline_steps", offline), ("online_steps", online), ("config.batch_size", 4)]
        return session.with_fields(run, [*steps, *known, ("loop.eval_episodes", 5), *changes])

    yield make


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("seats", "slots"), [(1, 1), (3, 3)])
def test_fewer_instances_evaluate(
    run_of: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seats: int,
    slots: int,
    late: bool,
) -> None:
    """A simulator that gives fewer instances than asked for evaluates with those, and all five episodes are played."""
    monkeypatch.setattr(Simulator, "seats", seats)
    monkeypatch.setattr(Simulator, "late", late)
    assert session.train(run_of(), tmp_path / "run")
    assert f"only {slots} environments can be had at once for evaluation" in caplog.text
    assert Simulator.steps == 5 * 5 and Simulator.open_now == 0
    assert (tmp_path / "run" / "episodes.jsonl").read_text().count("\n") == 5


def test_one_instance_is_too_few_online(
    run_of: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training online needs an instance beside that of the evaluation: this is said before pre-training."""
    monkeypatch.setattr(Simulator, "seats", 1)
    with pytest.raises(ConfigError, match="1 environments to train in and 1 to evaluate in at once, and 1 can be had"):
        session.train(run_of(2, 10), tmp_path / "run")
    assert not (tmp_path / "run").exists() and Simulator.open_now == 0 and Simulator.steps == 0


def test_evaluation_without_limit_ends(
    run_of: Callable[..., RunConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no time limit is known, one is set and said before training; the evaluation ends."""
    gym.registry["Seat-v0"].max_episode_steps = None
    caplog.set_level(logging.WARNING)
    assert session.train(run_of(2, 0, ("loop.eval_episodes", 1)), tmp_path / "run")
    assert "environment Seat-v0 has no time limit: episodes are cut after 1000 steps" in caplog.text
    assert Simulator.steps == 1000


def test_other_reward_refused_by_run(
    run_of: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in an environment of another reward than its dataset's begins nothing."""
    rows = Episode(np.zeros((T + 1, 3)), np.full((T, 2), 0.1), np.zeros(T), np.zeros(T, bool), np.arange(T) == T - 1)
    dense = EnvSpec("Seat-v0", entry_point="m:E", max_episode_steps=5, kwargs={"reward_type": "dense"})
    spaces_of: Any = {"observation_space": Simulator.observation_space, "action_space": Simulator.action_space}
    datasets.write("lab/dense-v0", [rows], spec=dense, root=tmp_path, **spaces_of)
    gym.registry["Seat-v0"].kwargs["reward_type"] = "sparse"
    run = session.with_fields(run_of(), [("dataset", ("lab/dense-v0",))])
    with pytest.raises(ConfigError, match=r"pays another reward than dataset lab/dense-v0 .*'sparse', 'dense'"):
        session.train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_are_held_once(run_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A run lets go of the loaded rows, and the dataset on the device has its observations once."""
    data = session.load_data(run_of())
    trainer = session.build(run_of(), data)
    rows, frames = trainer.replay.data.rows, 3 * (T + 1)
    now, after = rows["observations"], rows["next_observations"]
    assert now.frames is after.frames and now.frames.shape == (frames, 3)  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(np.asarray(after), np.asarray(data.arrays["next_observations"]))
    trainer.forget_rows()
    assert trainer.data.size == 0 and trainer.data.info.episodes == 3
    trainer.close()
