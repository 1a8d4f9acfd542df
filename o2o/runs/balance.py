"""Plot which balance coefficient a FamO2O agent chooses in which states (arXiv 2310.17966).

In mazes the plot is a map: states of the dataset at their position, coloured by coefficient. In other environments it
is a histogram, and the coefficient against the critics' value of the policy's action.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from o2o.data.datasets import Dataset
from o2o.data.normalizer import normalize
from o2o.errors import ConfigError
from o2o.report.plots import COLORS, GRID, INK, check_picture, save_picture
from o2o.runs.session import agent_class, check_seed_index, load_config, open_run

STATES = 5_000
"""Most states of the dataset in a plot, spread evenly over its rows."""


def plot_balance(
    path: str | Path, out: str | Path | None = None, seed_index: int = 0, which: str | int = "latest"
) -> Figure:
    """Draw the balance coefficients of one seed of the run in folder `path`, and return the figure.

    `out`: a file for the picture. `seed_index` counts from 0; `which` is the checkpoint: `latest`, `best` or a step.
    Raises `ConfigError` if the agent has no balance coefficient, the run has no such seed, or the picture cannot be
    written.
    """
    config = load_config(path)
    if not hasattr(agent_class(config.agent), "balance"):
        raise ConfigError(
            f"agent {config.agent} of run {path} has no balance coefficient to draw; give a run of famo2o or famo2o_cql"
        )
    check_seed_index(path, seed_index)
    if out is not None:
        check_picture(Path(out))
    _, trainer = open_run(path, which)
    try:
        rows = np.unique(np.linspace(0, trainer.data.size - 1, STATES).astype(int))
        raw = np.asarray(trainer.data.arrays["observations"][rows])
        agent = trainer.agent_of(seed_index)
        betas, values = choices(agent, jnp.asarray(normalize(trainer.normalizer, raw)))
        ends, title = agent.config.reach, f"{config.agent}, {trainer.data.info.name}"
        columns = position(trainer.data, raw.shape[-1])
    finally:
        trainer.close()
    if columns is None:
        figure = draw_values(betas, values, ends, title)
    else:
        figure = draw_map(raw[:, columns], betas, ends, title)
    if out is not None:
        save_picture(figure, Path(out))
    return figure


@jax.jit
def _choices(agent: Any, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
    actions, _ = agent.sample_actions(observations, None, jax.random.key(0), True)
    return agent.balance(observations), agent.critic(observations, actions).min(axis=0)


def choices(agent: Any, observations: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients `[N]` at observations `[N, D]`, and the smallest critic value of the policy's action."""
    betas, values = _choices(agent, observations)
    return np.asarray(betas), np.asarray(values)


def position(data: Dataset, width: int) -> list[int] | None:
    """Return the columns of x and y in a maze's flat observations `[N, width]`; None if there are none.

    The position is `achieved_goal` if that is kept, else the first two numbers of the state. (In Dict observations of
    AntMaze these are no position.) In a history of observations the columns are those of the newest one.
    """
    if data.task.family not in ("pointmaze", "antmaze"):
        return None
    leaves = data.observation_spec.leaves
    sizes = [int(np.prod(leaf.shape)) for leaf in leaves]
    starts = dict(zip([leaf.name for leaf in leaves], np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    start = starts.get("achieved_goal")
    if start is None and (data.task.family == "pointmaze" or len(leaves) == 1):
        start = starts.get("observation")
    if start is None:
        return None
    start += width - sum(sizes)
    return [start, start + 1]


def draw_map(positions: np.ndarray, betas: np.ndarray, ends: tuple[float, float], title: str) -> Figure:
    """Return a map of states at positions `[N, 2]`, coloured by coefficients `[N]`. The title names `ends`."""
    figure, (axes,) = _figure(title, ends, 1, (6.4, 5.2))
    points = axes.scatter(positions[:, 0], positions[:, 1], c=betas, s=7, cmap="viridis", linewidths=0)
    figure.colorbar(points, ax=axes, label="balance coefficient (larger: more improvement)")
    axes.set(xlabel="x", ylabel="y", aspect="equal")
    return figure


def draw_values(betas: np.ndarray, values: np.ndarray, ends: tuple[float, float], title: str) -> Figure:
    """Return a histogram of coefficients `[N]`, and a scatter plot of them against values `[N]`."""
    figure, (left, right) = _figure(title, ends, 2, (9.0, 4.2))
    low, high = (ends[0] - 0.5, ends[1] + 0.5) if ends[0] == ends[1] else ends
    low, high = min(low, float(betas.min())), max(high, float(betas.max()))
    left.hist(betas, bins=40, range=(low, high), color=COLORS[0])
    left.set(xlabel="balance coefficient (larger: more improvement)", ylabel="states", xlim=(low, high))
    right.scatter(values, betas, s=7, color=COLORS[0], alpha=0.4, linewidths=0)
    right.set(xlabel="value of the policy's action, least critic", ylabel="balance coefficient", ylim=(low, high))
    return figure


def _figure(title: str, ends: tuple[float, float], panels: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    text = f"Balance coefficient in [{ends[0]:g}, {ends[1]:g}] over states of the dataset\n{title}"
    figure.suptitle(text, fontsize=9, color=INK, x=0.01, ha="left")
    panes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for axes in panes:
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panes
