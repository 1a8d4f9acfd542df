"""A run's policy in a loop of one's own: the plain environment, its raw observations, the returns of an evaluation."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from o2o.errors import CheckpointError, ConfigError, EnvironmentMismatchError
from o2o.runs import session
from o2o.runs.session import RunConfig, load_policy
from o2o.train.episode import EVAL_STREAM, reset_seed
from o2o.train.evaluation import evaluate

Maker = Callable[..., RunConfig]
ENV = "PointMaze_UMazeDense-v3"
"""Its returns tell any two paths apart; its observations are a Dict."""
CHUNKED = [("horizon", 3), ("execute", 2), ("width", 16), ("blocks", 1)]
RESIDUAL = [("online.random_steps", 20), ("online.initial_updates", 10)]


def play(policy: Any, seed: int) -> dict[str, Any]:
    """Play an episode by hand in the plain environment."""
    env = gym.make(ENV, continuing_task=True, reset_target=False)
    (observation, _), total, length, over = env.reset(seed=seed), 0.0, 0, False
    policy.reset(seed)
    while not over:
        assert set(observation) == {"achieved_goal", "desired_goal", "observation"}
        action = policy.act(observation)
        assert env.action_space.contains(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, length, over = total + float(reward), length + 1, terminated or truncated
    env.close()
    return {"return": total, "length": length}


@pytest.fixture
def dense(tiny_run: Maker, dense_maze: str) -> Maker:
    """Return a maker of tiny runs in `ENV`."""
    defaults = {"dataset": (dense_maze,), "online_steps": 0}
    return lambda agent, fields=(), **changes: tiny_run(agent, fields, **{**defaults, **changes})


def by_hand(path: Path, seed: int, seed_index: int = 0) -> dict[str, Any]:
    """Play the first episode of an evaluation with this seed."""
    return play(load_policy(path, seed_index=seed_index), reset_seed(seed, EVAL_STREAM, 0, 0))


def evaluated(path: Path, seed: int) -> dict[str, Any]:
    """Return what `evaluate_run` says of the same; more of them at once are rounded otherwise."""
    (row,) = session.evaluate_run(path, 1, seed=seed)
    return {"return": row["return"], "length": row["length"]}


def test_episode_by_hand(dense: Maker, tmp_path: Path) -> None:
    """An episode by hand is the evaluation's."""
    assert session.train(dense("bc", normalize=True, action_range="data"), tmp_path / "run")
    found = [by_hand(tmp_path / "run", seed) for seed in (3, 4)]
    assert found == [evaluated(tmp_path / "run", seed) for seed in (3, 4)]
    assert found[0]["return"] != found[1]["return"]


def test_policy_per_seed(dense: Maker, tmp_path: Path) -> None:
    """Each seed has its own policy."""
    assert session.train(dense("bc", seeds=2), tmp_path / "run")
    found = [by_hand(tmp_path / "run", 3, index) for index in range(2)]
    assert found[0]["return"] != found[1]["return"]
    _, trainer = session.open_run(tmp_path / "run")
    for index in range(2):
        (row,) = evaluate(trainer.agent_of(index), trainer.env_fn, 1, 3)
        assert found[index] == {"return": row["return"], "length": row["length"]}
    trainer.close()


def test_history_chunks_and_base(dense: Maker, tmp_path: Path) -> None:
    """An episode by hand is the evaluation's with history and chunks and on top of a base, too."""
    base = dense("diffusion_bc", CHUNKED, history=2, normalize=True)
    assert session.train(base, tmp_path / "base")
    assert by_hand(tmp_path / "base", 3) == evaluated(tmp_path / "base", 3)
    run = dense("residual", RESIDUAL, base=str(tmp_path / "base"), base_sample=True, offline_steps=0, online_steps=40)
    assert session.train(run, tmp_path / "run")
    assert by_hand(tmp_path / "run", 3) == evaluated(tmp_path / "run", 3)


def test_checkpoint_choice(dense: Maker, tmp_path: Path) -> None:
    """The policy is that of the checkpoint asked for, and refuses what does not fit it."""
    run = dense("bc", offline_steps=40)
    loop = dataclasses.replace(run.loop, checkpoint_every=20, log_every=20)
    assert session.train(dataclasses.replace(run, loop=loop), tmp_path / "run")
    early, late = (load_policy(tmp_path / "run", which) for which in ("20", "latest"))
    observation = {"achieved_goal": np.zeros(2), "desired_goal": np.ones(2), "observation": np.zeros(4)}
    assert np.any(early.act(observation) != late.act(observation))
    with pytest.raises(EnvironmentMismatchError, match="the observation has no entry 'desired_goal'"):
        late.act({"observation": np.zeros(4)})
    with pytest.raises(ConfigError, match=r"no seed of index 1: .* trained 1 seed\(s\), counted from 0"):
        load_policy(tmp_path / "run", seed_index=1)
    with pytest.raises(CheckpointError, match="no checkpoint 7"):
        load_policy(tmp_path / "run", "7")
