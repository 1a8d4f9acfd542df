"""A task of OGBench by every door: settings, training offline and online, evaluation, resuming."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from o2o import cli, envs
from o2o.config import LoopConfig
from o2o.files import read_rows
from o2o.runs import session
from tests.conftest import narrow

pytest.importorskip("ogbench", reason="OGBench is not installed: training on its tasks goes UNTESTED here")
NAME = "ogbench/scene-play-singletask-task1-sparse"


@pytest.fixture(scope="module")
def play_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scene")
    envs.make_dataset("ogbench/scene-play", root, steps=60, processes=1)
    return root


@pytest.fixture
def play(play_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(os.environ, "MINARI_DATASETS_PATH", str(play_root))
    return play_root


def test_settings_as_published(play):
    """The command line's paper settings judge as the papers do; rewards are the task's own, nothing is normalised."""
    for agent in ("fql", "rebrac", "qc", "expo", "rlpd"):
        _, run = cli.parse_train(agent, ["--dataset", NAME])
        loop = run.loop
        assert (loop.eval_episodes, loop.eval_every, loop.offline_eval_every) == (50, 50_000, 50_000), agent
        assert loop.deterministic_eval is False and run.normalize is False
        task = session.task_of(run)
        assert (task.reward_scale, task.reward_bias, task.terminate_on_success) == (1.0, 0.0, False), agent
        assert task.binary and len(task.goal) == 5
    _, small = cli.parse_train("qc", ["--dataset", NAME, "--preset", "small"])
    assert small.loop.eval_every == LoopConfig(eval_every=2_500).eval_every


def test_run(play, tmp_path):
    """A run trains on the task's rows and in its environment, is judged by success, and goes on from its checkpoint."""
    run = session.preset_run("qc", NAME, "small", episode_limit=15, offline_steps=4, online_steps=40)
    config = session.with_fields(run.config, [("batch_size", 8), ("online.min_rows", 0), *narrow(run.config)])
    online = replace(config.online, **{k: 10 for k in ("warmup_steps", "random_steps") if getattr(config.online, k)})
    loop = LoopConfig(eval_every=0, eval_episodes=2, eval_envs=1, log_every=10, updates_per_dispatch=4)
    run = replace(run, config=replace(config, online=online), loop=loop)
    assert session.train(run, path := tmp_path / "qc")
    rows = read_rows(path / "episodes.jsonl")
    assert rows and all(row["success"] is False or row["success"] == 0 for row in rows)
    assert {row["length"] for row in rows} == {15}
    assert all(-5 * 15 <= row["return"] < -15 for row in rows), "the environment's own reward is dense"
    stored = json.loads((path / "config.json").read_text())
    assert stored["dataset"] == [NAME] and stored["dataset_summary"]["success"] is not None
    assert session.resume(path, online_steps=50)
    evaluated = session.evaluate_run(path, 1, "latest", 1, True)
    assert [row["length"] for row in evaluated] == [15] and not evaluated[0]["success"]
