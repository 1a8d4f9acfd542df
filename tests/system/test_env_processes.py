"""Training environments in processes: the fleet's rows, resets, snapshots and failures as without; real MuJoCo."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest

from o2o import envs
from o2o.errors import ConfigError, EnvironmentFaultError, EnvironmentMismatchError
from o2o.train.collect import Fleet
from o2o.train.env_processes import Board, Crew, Layout
from o2o.train.evaluation import EnvFn

ENVS = 3
STEPS = 60


def pictured(limit: int = 12) -> EnvFn:
    """Return a maker of pendulums that show an image as well, and break where the action is at its limit."""

    class Pictured(gymnasium.ObservationWrapper):
        def __init__(self, env: gymnasium.Env) -> None:
            super().__init__(env)
            image = gymnasium.spaces.Box(0, 255, (4, 2, 1), np.uint8)
            self.observation_space = gymnasium.spaces.Dict({"pole": env.observation_space, "image": image})

        def observation(self, observation: np.ndarray) -> dict[str, Any]:
            return {"pole": observation, "image": (observation * 100).astype(np.uint8).repeat(2).reshape(4, 2, 1)}

        def step(self, action: Any) -> Any:
            if abs(action[0]) >= 3.0:
                raise RuntimeError("gripper lost contact")
            return super().step(action)

    def make(evaluation: bool) -> gymnasium.Env:
        env = Pictured(gymnasium.make("InvertedPendulum-v5", max_episode_steps=limit))
        return envs.wrap(env, envs.task_for("InvertedPendulum-v5"), evaluation=evaluation)

    return make


@pytest.fixture(scope="module")
def fleets() -> Iterator[tuple[Fleet, Fleet]]:
    """Return a fleet in this process and one in two others."""
    pair = Fleet(pictured(), 3, 1, ENVS), Fleet(pictured(), 3, 1, ENVS, processes=2)
    yield pair
    for fleet in pair:
        fleet.close()


def actions(steps: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.2, 0.2, (steps, ENVS, 1)).astype(np.float32)


def played(fleet: Fleet, given: np.ndarray) -> list[Any]:
    """Return all that stepping the fleet gives."""
    seen: list[Any] = []
    for action in given:
        seen.append(fleet.step(action, lambda index, row: seen.append((index, row))))
        seen.append(fleet.observations)
    return seen


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.asarray(a).dtype == np.asarray(b).dtype


def test_fleet_in_processes_bitwise(fleets: tuple[Fleet, Fleet]) -> None:
    """A fleet in processes is the same to the last bit, also when resumed."""
    here, there = fleets
    assert_same(here.observations, there.observations)
    first, second = actions(STEPS, 0), actions(STEPS, 1)
    expected = played(here, first)
    assert_same(played(there, first), expected)
    rows = [row for _, row in (entry for entry in expected if isinstance(entry, tuple)) if isinstance(row, dict)]
    assert len(rows) > ENVS and {row["terminated"] for row in rows} == {False, True}
    snapshot = json.loads(json.dumps(here.snapshot()))
    assert json.loads(json.dumps(there.snapshot())) == snapshot
    observations = here.observations
    expected = played(here, second)
    assert_same(played(there, second), expected)
    assert there.restore(snapshot, observations) == [True] * ENVS
    assert_same(played(there, second), expected)
    assert there.restore(snapshot, jax.tree.map(lambda leaf: leaf + 1, observations)) == [False] * ENVS
    assert here.restore(snapshot, jax.tree.map(lambda leaf: leaf + 1, observations)) == [False] * ENVS
    assert_same(there.observations, here.observations)
    assert there.snapshot() == here.snapshot()


def test_failing_environment_rolls_back(fleets: tuple[Fleet, Fleet]) -> None:
    """A failing environment takes the others back."""
    words = []
    for fleet in fleets:
        played(fleet, actions(3, 2))
        before, observations = fleet.snapshot(), fleet.observations
        bad = actions(1, 3)[0]
        bad[1:] = 1.0
        with pytest.raises(EnvironmentFaultError, match="gripper lost contact at step") as caught:
            fleet.step(bad, lambda *_: None)
        words.append(str(caught.value))
        assert fleet.snapshot() == before
        assert fleet.restore(json.loads(json.dumps(before)), observations) == [True] * ENVS
        played(fleet, actions(2, 4))
    assert words[0] == words[1]
    assert_same(fleets[0].observations, fleets[1].observations)


def test_killed_process_named() -> None:
    """A killed process is named, and none is left."""
    fleet = Fleet(pictured(), 0, 1, ENVS, processes=8)
    assert fleet.crew is not None and [len(share) for share in fleet.crew.shares] == [1] * ENVS, "no idle process"
    fleet.step(actions(1, 0)[0], lambda *_: None)
    before = fleet.snapshot()
    pids = [child.process.pid for child in fleet.crew.children]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(EnvironmentFaultError, match=r"the process of training environments 1 to 1 died \(killed by"):
        for action in actions(2, 0):
            fleet.step(action, lambda *_: None)
    assert fleet.snapshot() == before
    fleet.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_unsendable_refused() -> None:
    """What cannot go to another process is refused."""
    lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"env_fn cannot go .* or set loop\.env_processes to 0"):
        Crew(lambda _: lock, 1, 1)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="env_processes is -1; expected 0"):
        Fleet(pictured(), 0, 1, processes=-1)


def test_board_round_trip() -> None:
    """A board gives back what was put down."""
    layout = Layout(2, (3,), (((2,), "<f4"), ((2, 2, 1), "|u1")))
    board = Board(mmap(-1, layout.size), layout)
    observation = {"b": np.arange(4, dtype=np.uint8).reshape(2, 2, 1), "a": np.float32([0.1, 2.0])}
    info = {"executed_action": np.float32([0.1, 0.2, 0.3]), "intervened": True, "raw_reward": 1 / 3, "success": None}
    outcome = (observation, 0.1, True, False, info)
    board.write(1, outcome)
    assert_same(board.read(1, observation), outcome)
    board.write(0, (observation, 0.1, True, False, {**info, "success": True}))
    assert board.read(0, observation)[4]["success"] is True and board.read(1, observation)[4]["success"] is None
    with pytest.raises(
        EnvironmentMismatchError, match=r"shape \(2,\) and type float64, at the reset it was \(2,\) and"
    ):
        board.write(0, ({**observation, "a": np.zeros(2)}, 0.1, True, False, info))
