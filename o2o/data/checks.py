"""What a run asks of its data before it begins: figures to compare with, windows that fit, the scale of its rewards."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from o2o.data import datasets
from o2o.data.task import Task
from o2o.errors import ConfigError


def summary(data: datasets.Dataset) -> dict[str, float | None]:
    """Return the dataset's own mean success rate, raw return and normalised score per episode."""
    returns, solved = data.info.episode_returns, data.info.episode_success
    scores = None if returns is None else data.info.normalized(returns, data.task)
    mean = lambda values: None if values is None else float(np.mean(values))  # noqa: E731
    return {"success": mean(solved), "return": mean(returns), "normalized": mean(scores)}


def check_data(agent: Any, data: datasets.Dataset, normalize: bool) -> None:
    """Raise an `O2OError` where the agent cannot learn from the dataset: few rows, episodes shorter than its window.

    `normalize`: whether the run normalises observations; some agents want them raw.
    """
    if normalize and agent.needs.raw_observations:
        raise ConfigError("this agent standardises observations itself and wants them raw: leave out `normalize`")
    ends = np.flatnonzero(data.arrays["ends"])
    longest = int(np.diff(ends, prepend=-1).max()) if len(ends) else data.size
    if agent.needs.window > longest:
        raise ConfigError(
            f"the agent learns from {agent.needs.window} steps in a row, but the longest episode of dataset "
            f"{data.info.name} has {longest}; shorten its horizon"
        )


def returns_scale(ids: Sequence[str], task: Task, span: float, **options: Any) -> float:
    """Return the reward scale with which best and worst return of a dataset's episodes lie `span` apart.

    `options`: those of `datasets.load`. Raises `ConfigError` if they are equal, or `span` is not positive.
    """
    if not span > 0:
        raise ConfigError(f"task.normalize_returns is {span}; expected a positive number, such as 1000")
    plain = dataclasses.replace(task, reward_scale=1.0, reward_bias=0.0)
    rows = datasets.load(ids, task=plain, discount=None, **{"clip_actions": True, **options}).arrays
    starts = np.flatnonzero(np.concatenate([[True], rows["ends"][:-1]]))
    returns = np.add.reduceat(rows["rewards"].astype(np.float64), starts)
    if returns.max() == returns.min():
        raise ConfigError(
            f"task.normalize_returns: all episodes of {', '.join(ids)} have the return {returns.max():g}, so there is "
            "no scale; give task.reward_scale"
        )
    return span / float(returns.max() - returns.min())
