"""WSRL learns: after a few thousand steps in the maze it solves it clearly more often than its pre-training did."""

import dataclasses
from pathlib import Path

import numpy as np

from o2o import experiment
from o2o.plots import read_rows


def test_fine_tuning_solves_the_maze(embedded: str, tmp_path: Path) -> None:
    run = experiment.preset_run("wsrl", embedded, "small", seed=1)
    config = experiment.with_fields(run.config, [("online.warmup_steps", 500)])
    loop = dataclasses.replace(run.loop, eval_every=10_000, eval_episodes=30, checkpoint_every=100_000)
    experiment.train(
        dataclasses.replace(run, config=config, loop=loop, offline_steps=2_500, online_steps=4_000), tmp_path / "run"
    )
    rows = read_rows(tmp_path / "run" / "episodes.jsonl")
    before = np.mean([row["success"] for row in rows if row["phase"] == "offline"])
    after = np.mean([row["success"] for row in rows if row["env_steps"] == 4_000])
    assert after >= 0.5, f"success {before:.2f} before, {after:.2f} after fine-tuning"
    assert after > before
