"""Kill training at random instants, resume, and compare with the run that was never killed, bit for bit.

`python -m tests.slow.kills --kills 100 --seed 1` does many; `tests/slow/test_kills.py` a dozen.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from o2o import envs
from o2o.config import LoopConfig
from o2o.runs import session
from o2o.runs.folder import read_status
from tests.conftest import narrow
from tests.system.test_runs import assert_same_runs

ROOT = Path(__file__).resolve().parents[2]
AGENTS = ("wsrl", "iql", "fql", "td3bc", "ppo")
TRAIN = """
import sys
from pathlib import Path
from o2o.runs import session
source, run = map(Path, sys.argv[1:])
session.resume(run) if (run / "config.json").exists() else session.train(session.load_config(source), run)
"""


def tiny(agent: str, dataset: str) -> session.RunConfig:
    """Return a run of both phases that saves often."""
    run = session.preset_run(agent, dataset, "small")
    fields = [("batch_size", 16), *narrow(run.config), ("online.min_rows", 0)]
    config = session.with_fields(run.config, fields)
    loop = LoopConfig(eval_every=100, eval_episodes=1, log_every=10, checkpoint_every=40, updates_per_dispatch=10)
    return dataclasses.replace(run, config=config, loop=loop, offline_steps=100, online_steps=300)


def killed(source: Path, run: Path, draw: np.random.Generator) -> bool:
    """Train or resume `run` in a process that is killed at a random instant; False if it ended before."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", TRAIN, str(source), str(run)], env=environment)
    status = run / "status.json"
    before = status.stat().st_mtime_ns if status.exists() else 0
    while process.poll() is None and not (status.exists() and status.stat().st_mtime_ns > before):
        time.sleep(0.01)  # until it trains
    try:
        process.wait(float(draw.exponential(1.5)))
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.wait() in (0, -signal.SIGKILL), "it failed by itself"
    return process.returncode != 0


def kill_often(agent: str, dataset: str, folder: Path, kills: int, draw: np.random.Generator) -> None:
    """Train a run with `kills` kills, or several that end before, and compare each."""
    whole, number = folder / f"{agent}-whole", 0
    assert session.train(tiny(agent, dataset), whole)
    while kills:
        run, number = folder / f"{agent}-{number}", number + 1
        while kills and read_status(run) != "finished":
            kills -= killed(whole, run, draw)
        assert session.resume(run) and read_status(run) == "finished"
        assert_same_runs(whole, run, 0)


def main() -> int:
    """Kill from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = np.random.default_rng(given.seed)
    with tempfile.TemporaryDirectory() as root:
        dataset = str(Path(root) / envs.make_embedded(envs.DEMO_DATASET, Path(root)))
        for number in range(-(-given.kills // 3)):
            agent = AGENTS[number % len(AGENTS)]
            kill_often(agent, dataset, Path(root) / str(number), 3, draw)
            print(f"{agent}: 3 kills, then the same run bit for bit", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
