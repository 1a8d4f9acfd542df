"""Can Uni-O4's off-line evaluation be trusted? AM-Q against true returns, and the dynamics' error by horizon.

One pre-training on Hopper: during the improvement, every policy is scored by AM-Q and played in the environment; then
the ensemble is rolled out along the dataset's own actions and compared with what was recorded.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from o2o.runs import session
from o2o.runs.folder import versions
from o2o.train.state import Hooks

RESULTS = Path(__file__).parent / "results" / "uni_o4_models"
DATASET = "o2o/hopper/medium-v0"
STEPS, EPISODES, HORIZON, STARTS = 10_000, 5, 50, 256


@dataclass(frozen=True)
class Candidate:
    """One policy at one time: what AM-Q says of it, and what the environment does."""

    gradient_steps: int
    member: int
    score: float
    returns: tuple[float, ...]


def candidates() -> tuple[list[Candidate], Any]:
    """Pre-train; at every 150th step of the improvement score and play all policies."""
    run = session.preset_run("uni_o4", DATASET, "small", offline_steps=STEPS)
    trainer = session.build(replace(run, loop=replace(run.loop, log_every=150, eval_episodes=EPISODES)))
    found: list[Candidate] = []

    def look(row: dict[str, Any]) -> None:
        if "improve/loss" not in row:
            return
        data = trainer.offline_data
        scores = jax.jit(jax.vmap(lambda a: a.amq(a.policies.params, data)[0]))(trainer.agent)[0]
        for member in range(scores.shape[0]):
            agent = trainer.agent.replace(chosen=jnp.full((1,), member, jnp.int32))
            rows = trainer.evaluator(agent, trainer.normalizer, 0, True)
            returns = tuple(float(row["return"]) for row in rows)
            found.append(Candidate(row["gradient_steps"], member, float(scores[member]), returns))

    trainer.hooks = Hooks(metrics=look)
    trainer.offline(STEPS)
    return found, trainer


def errors(trainer: Any) -> np.ndarray:
    """Return the dynamics' mean absolute error after 1 to HORIZON steps, in standard deviations of the data."""
    agent = jax.tree.map(lambda leaf: leaf[0], trainer.agent)
    rows = trainer.data.arrays
    ends = np.flatnonzero(rows["ends"])
    left = ends[np.searchsorted(ends, np.arange(len(rows["ends"])))] - np.arange(len(rows["ends"]))
    starts = np.random.default_rng(0).choice(np.flatnonzero(left >= HORIZON), STARTS, replace=False)
    width = rows["observations"].std(axis=0)
    step = jax.jit(agent.dynamics.step)
    state, out = jnp.asarray(rows["observations"][starts]), []
    for t in range(HORIZON):
        state, _, _ = step(jax.random.key(t), state, jnp.asarray(rows["actions"][starts + t]))
        truth = rows["next_observations"][starts + t]
        out.append(float(np.mean(np.abs(np.asarray(state) - truth) / width)))
    return np.asarray(out)


def main() -> None:
    """Measure, write rows, picture and text."""
    found, trainer = candidates()
    by_horizon = errors(trainer)
    scores, means = np.asarray([c.score for c in found]), np.asarray([np.mean(c.returns) for c in found])
    result: Any = spearmanr(scores, means)
    pairs = [(i, j) for i in range(len(found)) for j in range(i) if means[i] != means[j]]
    right = float(np.mean([(scores[i] > scores[j]) == (means[i] > means[j]) for i, j in pairs]))
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "versions": versions(),
        "candidates": [asdict(c) for c in found],
        "error_by_horizon": by_horizon.tolist(),
    }
    (RESULTS / "rows.json").write_text(json.dumps(content, indent=1) + "\n")
    figure = Figure(figsize=(9.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right_axes = figure.subplots(1, 2)
    left.scatter(scores, means, c=[c.gradient_steps for c in found], cmap="viridis")
    left.set(xlabel="AM-Q score", ylabel=f"true return (mean of {EPISODES} episodes)")
    right_axes.plot(np.arange(1, HORIZON + 1), by_horizon)
    right_axes.set(xlabel="steps in the model", ylabel="mean absolute error (standard deviations)", ylim=(0, None))
    figure.savefig(RESULTS / "models.png")
    text = [
        "# AM-Q and the dynamics ensemble",
        "",
        f"`uni_o4`, small preset, seed 0, {STEPS:,} gradient steps on `{DATASET}`: {len(found)} policies, its members "
        f"at {len({c.gradient_steps for c in found})} moments of their improvement, each scored by AM-Q and played for "
        f"{EPISODES} episodes.",
        "",
        f"- Rank correlation of score and true return: {result.statistic:.2f}. The policies of one run, and of one "
        "member at several moments, are no independent samples.",
        f"- Pairs of policies that AM-Q ranks as the environment does: {100 * right:.0f} % (a review of the paper has "
        "78 %, on other data).",
        f"- Error of a roll-out along recorded actions, in standard deviations of the data: {by_horizon[0]:.3f} after "
        f"1 step, {by_horizon[9]:.2f} after 10, {by_horizon[-1]:.2f} after {HORIZON}.",
        "",
        "![AM-Q against true returns; error by horizon](models.png)",
        "",
        f"Machine: {versions()['machine']}. Made by `python benchmarks/uni_o4_models.py`; raw rows in `rows.json`.",
        "",
    ]
    (RESULTS / "README.md").write_text("\n".join(text))
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
