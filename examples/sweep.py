"""A sweep: each value of a setting with several seeds, and a table of their scores with intervals.

    python examples/sweep.py

Runs that exist are resumed, so a sweep that was stopped goes on when it is started again.
"""

from pathlib import Path

import numpy as np

from o2o import envs
from o2o.report.stats import interval
from o2o.runs import session

AGENT, SETTING, VALUES = "iql", "beta", (1.0, 3.0, 10.0)


def main(folder=Path("runs/sweep"), values=VALUES, seeds=3, episodes=20, **changes):
    """Train all values, evaluate them in new episodes, print a row for each and return the means."""
    dataset, means = envs.make_embedded(envs.DEMO_DATASET), {}
    for value in values:
        path = Path(folder) / f"{SETTING}-{value:g}"
        run = session.preset_run(AGENT, dataset, "small", seeds=seeds, **changes)
        run = session.with_fields(run, {"config": {SETTING: value}})
        _ = session.resume(path) if path.exists() else session.train(run, path)
        rows = session.evaluate_run(path, episodes)
        scores = [np.mean([row["score"] for row in rows if row["seed"] == seed]) for seed in range(seeds)]
        means[value] = float(np.mean(scores))
        low, high = interval(scores)
        print(f"{SETTING} {value:g}: {means[value]:.2f} [{low:.2f}, {high:.2f}] over {seeds} seeds")
    return means


if __name__ == "__main__":
    main()
