"""Statistics over seeds: means, interquartile means, stratified bootstrap intervals, probability of improvement.

A seed's score at an evaluation point is the mean over its episodes; every interval is over seeds, never over episodes.
Aggregates and intervals follow Agarwal et al., "Deep RL at the Edge of the Statistical Precipice" (arXiv 2108.13264).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from o2o.errors import ConfigError

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
Statistic = Callable[[Floats], Any]
"""Reduces the last axis: `[..., n]` to `[...]`."""

PHASES = ("offline", "warmup", "online")


def mean(scores: ArrayLike) -> Any:
    """Return the mean over the last axis, `[..., n]` to `[...]`."""
    return np.mean(np.asarray(scores, np.float64), axis=-1)


def iqm(scores: ArrayLike) -> Any:
    """Return the mean without the floor(n / 4) lowest and highest of the last axis; below n = 4 that is the mean."""
    return scipy_stats.trim_mean(np.asarray(scores, np.float64), 0.25, axis=-1)


STATISTICS: dict[str, Statistic] = {"mean": mean, "iqm": iqm}


def statistic_of(name: str) -> Statistic:
    """Return a statistic by its name in `STATISTICS`. Raises `ConfigError` for another."""
    if name not in STATISTICS:
        raise ConfigError(f"unknown statistic {name!r}; expected one of {', '.join(STATISTICS)}")
    return STATISTICS[name]


def as_strata(scores: Any) -> list[Floats]:
    """Return one float array of seeds per task from `[tasks, seeds]`, `[seeds]`, or rows of unequal length."""
    rows = list(scores)
    if not rows:
        raise ConfigError("statistics need at least one score, got none")
    nested = [rows] if np.ndim(rows[0]) == 0 else rows
    strata = [np.asarray(row, np.float64) for row in nested]
    for task, row in enumerate(strata):
        if row.ndim != 1 or row.size == 0 or not np.all(np.isfinite(row)):
            raise ConfigError(f"scores of task {task}: expected a non-empty row of finite numbers, got {row!r}")
    return strata


def _resample(strata: Sequence[Floats], samples: int, rng: np.random.Generator) -> Floats:
    """Draw seeds with replacement within each task, `[samples, all seeds]`."""
    return np.concatenate([row[rng.integers(row.size, size=(samples, row.size))] for row in strata], axis=1)


def _percentiles(values: Floats, confidence: float) -> tuple[float, float]:
    """Return the limits between which the middle `confidence` of the values lies."""
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence must lie between 0 and 1, got {confidence}")
    low, high = np.quantile(values, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)


def interval(
    scores: Any, statistic: Statistic = mean, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `statistic` over seeds resampled within each task.

    `scores` is `[tasks, seeds]`, `[seeds]`, or a list of rows of unequal length. One seed gives an interval of width
    zero, and a handful gives one that is too narrow (three seeds cover about 75 % where 95 % is asked for).
    """
    values = statistic(_resample(as_strata(scores), samples, np.random.default_rng(seed)))
    return _percentiles(values, confidence)


def _better(x: Floats, y: Floats) -> Floats:
    """Return P(X > Y) + P(X = Y) / 2 of `[..., n]` against `[..., m]`."""
    pairs = np.sign(x[..., :, None] - y[..., None, :])
    return np.mean(0.5 * (pairs + 1.0), axis=(-2, -1))


def probability_of_improvement(
    x: Any, y: Any, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return how often a seed of `x` beats one of `y` on the same task (ties count half), averaged over tasks.

    With its bootstrap interval: (probability, low, high). Both are `[tasks, seeds]` or `[seeds]`, tasks in one order.
    """
    strata_x, strata_y = as_strata(x), as_strata(y)
    if len(strata_x) != len(strata_y):
        raise ConfigError(f"probability of improvement needs the same tasks: {len(strata_x)} against {len(strata_y)}")
    rng = np.random.default_rng(seed)
    pairs = list(zip(strata_x, strata_y, strict=True))
    drawn = [_better(_resample([a], samples, rng), _resample([b], samples, rng)) for a, b in pairs]
    return float(np.mean([_better(a, b) for a, b in pairs])), *_percentiles(np.mean(drawn, axis=0), confidence)


@dataclass(frozen=True)
class Point:
    """One evaluation of a run: where it was made and every seed's mean score over its episodes."""

    phase: str
    env_steps: int
    gradient_steps: int
    scores: Mapping[int, float]
    """Seed to score."""

    @property
    def values(self) -> Floats:
        """The scores in the order of their seeds, `[seeds]`."""
        return np.asarray([self.scores[seed] for seed in sorted(self.scores)], np.float64)


def aggregate(rows: Iterable[Row], metric: str = "return") -> list[Point]:
    """Return the evaluation points of episode rows in the order of the run, without episodes whose `metric` is None.

    Offline points are told apart by gradient steps, the others by environment steps; rows with one `seed` are taken for
    one agent's, so rows of several runs, each counted from 0, have to come from `o2o.report.plots.pool`.
    """
    groups: dict[tuple[int, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    updates: dict[tuple[int, int], int] = defaultdict(int)
    for row in rows:
        if row["phase"] not in PHASES:
            raise ConfigError(f"unknown phase {row['phase']!r} in an episode row; expected one of {', '.join(PHASES)}")
        if row.get(metric) is None:
            continue
        phase = PHASES.index(row["phase"])
        key = (phase, row["gradient_steps"] if phase == 0 else row["env_steps"])
        groups[key][row["seed"]].append(float(row[metric]))
        updates[key] = max(updates[key], row["gradient_steps"])
    return [
        Point(
            phase=PHASES[phase],
            env_steps=0 if phase == 0 else step,
            gradient_steps=updates[phase, step],
            scores={seed: float(np.mean(values)) for seed, values in groups[phase, step].items()},
        )
        for phase, step in sorted(groups)
    ]


@dataclass(frozen=True)
class Band:
    """A line with its interval: steps, centre, low and high, all `[points]`."""

    steps: Floats
    centre: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Curve:
    """A learning curve over seeds: the offline part by gradient steps, the online part by environment steps."""

    offline: Band
    online: Band
    seeds: int
    """Of the online part, where there is one."""
    warmup_steps: int = 0
    """Environment steps at the evaluation that ended the warm-up; 0 without one."""


def _band(points: Sequence[tuple[int, Floats]], statistic: Statistic, confidence: float) -> Band:
    limits = [interval(values, statistic, confidence) for _, values in points]
    return Band(
        steps=np.asarray([step for step, _ in points], np.float64),
        centre=np.asarray([statistic(values) for _, values in points], np.float64),
        low=np.asarray([low for low, _ in limits], np.float64),
        high=np.asarray([high for _, high in limits], np.float64),
    )


def _of_everyone(points: Sequence[Point]) -> list[Point]:
    """Return the points that all seeds have that have any of these."""
    most = max((len(point.scores) for point in points), default=0)
    return [point for point in points if len(point.scores) == most]


def curve(
    rows: Iterable[Row], metric: str = "return", statistic: Statistic = iqm, confidence: float = 0.95
) -> Curve | None:
    """Return the learning curve of episode rows, or None where no row has the metric.

    The online part begins at 0 with the last offline evaluation, so that what the switch does can be seen.
    Of each part, points that not all of its seeds have, because a run was broken off or is still going, are left out.
    """
    points = aggregate(rows, metric)
    if not points:
        return None
    before = [point for point in points if point.phase == "offline"]
    after = _of_everyone([point for point in points if point.phase != "offline"])
    complete = _of_everyone(before)
    offline = [(point.gradient_steps, point.values) for point in complete]
    online = {point.env_steps: point.values for point in after}
    if after and before and (common := after[0].scores.keys() & before[-1].scores.keys()):
        online.setdefault(0, np.asarray([before[-1].scores[seed] for seed in sorted(common)]))
    return Curve(
        offline=_band(offline, statistic, confidence),
        online=_band(sorted(online.items(), key=lambda item: item[0]), statistic, confidence),
        seeds=len((after or complete)[0].scores),
        warmup_steps=max((point.env_steps for point in points if point.phase == "warmup"), default=0),
    )
