"""What a run is judged by: Kitchen's share of subtasks, in rows, best checkpoints, pictures, tables and reports."""

import io
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from rich.console import Console

from o2o import envs
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.report.plots import judged_by, panels
from o2o.report.suite import load_suite
from o2o.report.suite_report import Method, _metrics
from o2o.report.tables import print_rows
from o2o.train.evaluation import evaluate
from o2o.train.trainer import Trainer
from tests.system.test_chunk_loops import Probe, ProbeConfig

DONE = [0.0, 1.0, 1.0, 2.0, 3.0]
"""Subtasks completed after each step: a return of 7, a score of 0.75, no success."""


class Kitchen(gym.Env):
    """Rewards with the subtasks completed so far."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        done = DONE[self.t - 1]
        return np.full(2, self.t, np.float32), done, False, self.t == len(DONE), {"success": done == 4.0}


def env_fn(evaluation: bool) -> gym.Env:
    return envs.wrap(Kitchen(), envs.task_for("FrankaKitchen-v1"), evaluation=evaluation)


def test_kitchen_score_in_rows(tmp_path: Path) -> None:
    """The kitchen's score is in the rows and makes the best checkpoint."""
    episodes = datasets.record(Kitchen(), lambda _, rng: rng.uniform(-1, 1, 1).astype(np.float32), 10)
    space = {"observation_space": Kitchen.observation_space, "action_space": Kitchen.action_space}
    folder = datasets.write("kitchen-v0", episodes, **space, spec=None, root=tmp_path)
    data = datasets.load(folder, task=envs.task_for("FrankaKitchen-v1"), cache=False)
    trainer = Trainer(Probe, ProbeConfig(), data, env_fn, loop=LoopConfig(eval_episodes=2))
    rows = trainer.evaluate()
    assert [(row["score"], row["return"], row["success"]) for row in rows] == [(0.75, 7.0, False)] * 2
    assert trainer.counters.score == 0.75
    trainer.close()


def test_plots_and_tables_show_score(tmp_path: Path) -> None:
    """Pictures and tables show the score where it is neither success nor return."""
    agent = Probe.create(None, None, np.zeros((1, 1)))
    place = {"phase": "offline", "env_steps": 0, "gradient_steps": 10}
    rows = [{**place, **row} for row in evaluate(agent, env_fn, 2)]
    (tmp_path / "config.json").write_text(json.dumps({"agent": "iql"}))
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert panels([tmp_path])[0].curves["iql"].offline.centre.tolist() == [0.75]
    text = io.StringIO()
    print_rows(rows, "evaluation", Console(file=text, width=100))
    assert "score" in text.getvalue() and "0.750" in text.getvalue()


def test_judging_metric_of_rows() -> None:
    """Rows are judged by the score where it says more than success, else by success or return."""
    kitchen = {"seed": 0, "score": 0.75, "success": False, "return": 7.0}
    maze, hopper = {**kitchen, "score": 0.0}, {**kitchen, "score": 7.0, "success": None}
    assert judged_by([kitchen, maze]) == "score" and judged_by([maze]) == "success" and judged_by([hopper]) == "return"
    old = [{key: row[key] for key in ("success", "return")} for row in (kitchen, hopper)]
    assert judged_by([kitchen, *old]) == "success" and judged_by(old[1:]) == "return"


def test_report_has_score() -> None:
    """A report has the score of a task that has one."""
    suite = load_suite("offline")
    kitchen = {"seed": 0, "score": 0.75, "success": False, "return": 7.0}
    methods = [Method("kitchen", "iql", [kitchen], []), Method("maze", "iql", [{**kitchen, "score": 0.0}], [])]
    assert _metrics(suite, methods) == ("score", *suite.metrics) and _metrics(suite, methods[1:]) == suite.metrics
