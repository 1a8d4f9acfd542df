"""QAM and DSRL on a tiny set of OGBench, offline and online; what a random policy reaches there."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from o2o import envs
from o2o.config import LoopConfig
from o2o.envs.ogbench import PLAYS, wheel
from o2o.files import read_rows
from o2o.runs import session
from tests.conftest import narrow

pytest.importorskip("ogbench", reason="OGBench is not installed: QAM and DSRL on its tasks go UNTESTED here")
NAME = "ogbench/scene-play-singletask-task4-sparse"
LIMIT = 12


@pytest.fixture(scope="module")
def play_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    envs.make_dataset("ogbench/scene-play", root, steps=60, processes=1)
    return root


@pytest.mark.parametrize("agent", ["qam", "dsrl"])
def test_method_runs(agent, play_root, tmp_path, monkeypatch):
    """It learns from chunks of the set, plays them in the task, goes online in one buffer, and is judged by success."""
    monkeypatch.setitem(os.environ, "MINARI_DATASETS_PATH", str(play_root))
    run = session.preset_run(agent, NAME, "small", episode_limit=LIMIT, offline_steps=4, online_steps=16)
    paper = session.preset_run(agent, NAME, "paper").config
    fields = [("batch_size", 8), ("chunk", 5), ("online.min_rows", 0), ("online.warmup_steps", 10)]
    config = session.with_fields(run.config, [*fields, *narrow(run.config)])
    assert config.online.replay == "append" == paper.online.replay and paper.chunk == 5
    loop = LoopConfig(eval_every=0, eval_episodes=2, eval_envs=1, log_every=4, updates_per_dispatch=2)
    assert session.train(replace(run, config=config, loop=loop), tmp_path / "run")
    rows = read_rows(tmp_path / "run/episodes.jsonl")
    assert {row["length"] for row in rows} == {LIMIT} and not any(row["success"] for row in rows)
    assert all(-5 * LIMIT <= row["return"] <= -LIMIT for row in rows)
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in metrics} >= {"offline", "online"}
    losses = [value for row in metrics for key, value in row.items() if key.endswith("loss")]
    assert len(losses) >= 4 and all(map(math.isfinite, losses)) and any(losses)
    assert metrics[-1]["gradient_steps"] > 4, "it learns online, too"


@pytest.mark.parametrize("scene", ["cube-double-play", "scene-play", "puzzle-3x3-play"])
def test_random_policy_fails(scene):
    """Random actions never reach a goal, and every step has a negative reward: the protocol's own check."""
    wheel()
    env, rng = gym.make(f"{PLAYS[scene].env}-singletask-v0", disable_env_checker=True), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(150):
        _, reward, terminated, _, info = env.step(rng.uniform(-1.0, 1.0, 5).astype(np.float32))
        assert float(reward) < 0 and not terminated and not info["success"]
    env.close()
