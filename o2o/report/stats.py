"""Statistics over seeds: means, interquartile means, stratified bootstrap intervals, probability of improvement.

A seed's score at an evaluation is the mean over its episodes. Every interval is over seeds, never over episodes.
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
    """Return the interquartile mean over the last axis: the mean without the floor(n / 4) lowest and highest values."""
    return scipy_stats.trim_mean(np.asarray(scores, np.float64), 0.25, axis=-1)


STATISTICS: dict[str, Statistic] = {"mean": mean, "iqm": iqm}


def statistic_of(name: str) -> Statistic:
    """Return a statistic by its name in `STATISTICS`. Raises `ConfigError` for an unknown name."""
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


def _bootstrap(
    strata: Sequence[Floats],
    statistic: Callable[[list[Floats]], Any],
    confidence: float,
    samples: int,
    seed: int,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic of rows, each row resampled by itself.

    `statistic` takes one array `[..., n]` per row and returns `[...]`. `scipy.stats.bootstrap` refuses rows of one
    value, so these are passed to the statistic as they are.
    """
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence must lie between 0 and 1, got {confidence}")
    several = [i for i, row in enumerate(strata) if row.size > 1]
    if not several:
        value = float(statistic(list(strata)))
        return value, value

    def resampled(*rows: Floats, axis: int = -1) -> Any:
        drawn = dict(zip(several, rows, strict=True))
        shape = (*rows[0].shape[:-1], 1)
        return statistic([drawn.get(i, np.broadcast_to(row[:1], shape)) for i, row in enumerate(strata)])

    found = scipy_stats.bootstrap(
        [strata[i] for i in several],
        resampled,
        n_resamples=samples,
        confidence_level=confidence,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def interval(
    scores: Any, statistic: Statistic = mean, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `statistic` over seeds, which are resampled within each task.

    `scores` is `[tasks, seeds]`, `[seeds]`, or a list of rows of unequal length. One seed gives an interval of width
    zero. A handful gives one that is too narrow: three seeds cover about 75 % where 95 % is asked for.
    """
    return _bootstrap(
        as_strata(scores), lambda rows: statistic(np.concatenate(rows, axis=-1)), confidence, samples, seed
    )


def _better(x: Floats, y: Floats) -> Floats:
    """Return P(X > Y) + P(X = Y) / 2 of `[..., n]` against `[..., m]`.

    This is the Mann-Whitney U statistic over n m. `scipy.stats.mannwhitneyu` also computes p-values, for every
    resample of a bootstrap, and takes five times as long.
    """
    pairs = np.sign(x[..., :, None] - y[..., None, :])
    return np.mean(0.5 * (pairs + 1.0), axis=(-2, -1))


def probability_of_improvement(
    x: Any, y: Any, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return how often a seed of `x` beats a seed of `y` on the same task, averaged over tasks; ties count half.

    The result is (probability, low, high) with the bootstrap interval. `x` and `y` are `[tasks, seeds]` or `[seeds]`,
    with the tasks in the same order. Raises `ConfigError` if they differ in the number of tasks.
    """
    strata_x, strata_y = as_strata(x), as_strata(y)
    if len(strata_x) != len(strata_y):
        raise ConfigError(f"probability of improvement needs the same tasks: {len(strata_x)} against {len(strata_y)}")
    rows = [row for pair in zip(strata_x, strata_y, strict=True) for row in pair]

    def probability(rows: list[Floats]) -> Any:
        return np.mean([_better(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)], axis=0)

    return float(probability(rows)), *_bootstrap(rows, probability, confidence, samples, seed)


@dataclass(frozen=True)
class Point:
    """One evaluation of a run: its phase and steps, and each seed's mean score over its episodes."""

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
    """Return the evaluation points of episode rows in the order of the run; episodes without the metric are left out.

    Offline points are identified by gradient steps, the others by environment steps. Rows with the same `seed` count as
    the same agent, so rows of several runs must come from `o2o.report.plots.pool`, which numbers their seeds apart.
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


def performance_profile(scores: Any, thresholds: ArrayLike, confidence: float = 0.95, samples: int = 2000) -> Band:
    """Return the share of seeds, of all tasks together, whose score is above each threshold, with its interval.

    `scores` is `[tasks, seeds]`, `[seeds]`, or a list of rows of unequal length; the band's steps are the thresholds.
    Section 4.2 of Agarwal et al. (arXiv 2108.13264).
    """
    strata, places = as_strata(scores), np.asarray(thresholds, np.float64)

    def share(place: float) -> tuple[float, float, float]:
        above = [np.asarray(row > place, np.float64) for row in strata]
        return float(mean(np.concatenate(above))), *interval(above, mean, confidence, samples)

    return Band(places, *np.asarray([share(place) for place in places], np.float64).reshape(-1, 3).T)


@dataclass(frozen=True)
class Curve:
    """A learning curve over seeds: the offline part by gradient steps, the online part by environment steps."""

    offline: Band
    online: Band
    seeds: int
    """Number of seeds: of the online part if there is one, else of the offline part."""
    warmup_steps: int = 0
    """Environment steps at the evaluation that ended the warm-up; 0 without one."""

    @property
    def trains_first(self) -> bool:
        """Whether the offline part has more to show than the evaluation with which the online part begins."""
        return self.offline.steps.size > (1 if self.online.steps.size else 0)


def _band(points: Sequence[tuple[int, Floats]], statistic: Statistic, confidence: float) -> Band:
    limits = [interval(values, statistic, confidence) for _, values in points]
    return Band(
        steps=np.asarray([step for step, _ in points], np.float64),
        centre=np.asarray([statistic(values) for _, values in points], np.float64),
        low=np.asarray([low for low, _ in limits], np.float64),
        high=np.asarray([high for _, high in limits], np.float64),
    )


def _complete(points: Sequence[Point]) -> list[Point]:
    """Return the points that have a score of as many seeds as the most complete one."""
    most = max((len(point.scores) for point in points), default=0)
    return [point for point in points if len(point.scores) == most]


def curve(
    rows: Iterable[Row], metric: str = "return", statistic: Statistic = iqm, confidence: float = 0.95
) -> Curve | None:
    """Return the learning curve of episode rows, or None if no row has the metric.

    The online part begins at step 0 with the last offline evaluation, so that the plot shows the effect of the switch.
    Points without a score of every seed are left out, in each part: some run was stopped or is still going.
    """
    points = aggregate(rows, metric)
    if not points:
        return None
    before = [point for point in points if point.phase == "offline"]
    after = _complete([point for point in points if point.phase != "offline"])
    complete = _complete(before)
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
