"""Sweeps: settings, datasets and seeds to try, as a typed Python or TOML file, and the table of what they scored.

A sweep is a suite (`o2o.report.suite`) whose methods are made from the values of its settings.
"""

import dataclasses
import hashlib
import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from o2o.config import from_dict
from o2o.errors import ConfigError
from o2o.report.plots import judged_by
from o2o.report.scores import place, read_scores
from o2o.report.stats import interval
from o2o.report.suite import BenchTask, Suite, Variant
from o2o.settings import Amount, Count, Seed, Settings
from o2o.user_code import run_file

Metric = Literal["auto", "score", "success", "return", "normalized"]
LONGEST_LABEL = 80
"""Longest label of a method; a longer one is cut, and ends with a digest of the whole."""
ATTEMPTS = 1000
"""Draws per sample after which a sweep gives up finding another one."""


@dataclass(frozen=True)
class Between(Settings):
    """Numbers to draw from: uniform between `low` and `high`, or uniform in the logarithm; `whole`: integers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        """Raise `ConfigError` for ends in the wrong order, and for a logarithm of what is not above 0."""
        super().__post_init__()
        if not self.low < self.high:
            raise self.refuse("high", f"more than low, which is {self.low:g}")
        if self.log and self.low <= 0:
            raise self.refuse("low", "a number above 0 with log")

    def draw(self, rng: np.random.Generator) -> float | int:
        """Return a number, rounded to six digits so that it can be written down."""
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = rng.uniform(*ends)
        value = float(f"{math.exp(value) if self.log else value:.6g}")
        return round(value) if self.whole else value


@dataclass(frozen=True)
class Sweep(Settings):
    """Agents x settings x datasets x seeds to train."""

    agents: tuple[str, ...]
    """Names of agents, or module:Class of your own."""
    datasets: tuple[str, ...]
    """Minari ids or paths, each for runs of its own."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Setting of a run by dotted name, such as config.beta, to the values to try: a list, or `Between` to draw from."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all runs by dotted name, such as config.discount or loop.eval_every."""
    samples: Count | None = None
    """Draw so many different combinations of the values; None: all combinations."""
    draw_seed: Seed = 0
    """Seed of that draw."""
    seeds: Count = 3
    """Seeds of every combination, 0 first."""
    seeds_per_cell: Count | None = None
    """How many of them learn side by side in one run; None: all of them."""
    preset: Literal["paper", "small"] = "small"
    """Settings that all runs start from."""
    offline_steps: Amount = 20_000
    """Gradient steps of pre-training."""
    online_steps: Amount = 0
    """Environment steps, warm-up included."""
    eval_every: Amount = 5_000
    """Environment steps between two evaluations."""
    eval_episodes: Count = 20
    """Episodes of an evaluation, per seed."""
    metric: Metric = "auto"
    """What the table is sorted by, the largest first; `auto` takes what the task is judged by."""
    name: str = ""
    """Folder of the results; empty for the file's name."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value of another type, and for settings without values or with too many."""
        super().__post_init__()
        for name, value in (("agents", self.agents), ("datasets", self.datasets)):
            if not value or len(set(value)) < len(value):
                raise self.refuse(name, "one or more, each of them once")
        if not re.fullmatch(r"(\w[\w. -]*)?", self.name):
            raise self.refuse("name", "the name of a folder: letters, digits, dots, dashes")
        object.__setattr__(self, "fixed", dict(_flat("fixed", self.fixed)))
        object.__setattr__(self, "settings", {k: _values(k, v) for k, v in _flat("settings", self.settings)})
        ranges = [name for name, values in self.settings.items() if isinstance(values, Between)]
        if ranges and self.samples is None:
            raise ConfigError(f"Sweep.settings: {ranges[0]} is a range to draw from; set `samples`, or give a list")
        own = {"seed", "seeds", "dataset", "agent", "preset", "offline_steps", "online_steps"}
        for name in (*self.settings, *self.fixed):
            if name in own | {"loop.eval_every", "loop.eval_episodes"}:
                raise ConfigError(f"Sweep.settings: {name} is a field of the sweep itself; set it there")
        if both := self.settings.keys() & self.fixed.keys():
            raise ConfigError(f"Sweep: {min(both)} is in settings and in fixed; give one of them")

    def combinations(self) -> list[dict[str, Any]]:
        """Return the values of every combination to try: all in order, or `samples` different ones at random."""
        if self.samples is None:
            return [dict(zip(self.settings, each, strict=True)) for each in itertools.product(*self.settings.values())]
        if not any(isinstance(values, Between) for values in self.settings.values()):
            grid = dataclasses.replace(self, samples=None).combinations()
            picked = np.random.default_rng(self.draw_seed).permutation(len(grid))[: self.samples]
            return [grid[i] for i in picked]
        found: dict[str, dict[str, Any]] = {}
        for values in itertools.islice(self._draws(), ATTEMPTS * self.samples):
            found.setdefault(repr(values), values)
            if len(found) == self.samples:
                break
        return list(found.values())

    def _draws(self) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.draw_seed)
        while True:
            yield {
                name: values.draw(rng) if isinstance(values, Between) else values[int(rng.integers(len(values)))]
                for name, values in self.settings.items()
            }

    def suite(self) -> Suite:
        """Return the suite whose methods are the combinations."""
        common = tuple(self.fixed.items())
        variants = [
            Variant(label_of(agent, values), agent, fields=(*common, *values.items()))
            for agent in self.agents
            for values in self.combinations()
        ]
        return Suite(
            name=self.name or "sweep",
            description=f"Sweep of {', '.join(self.settings) or 'agents'}.",
            tasks=tuple(BenchTask(dataset) for dataset in self.datasets),
            variants=tuple(variants),
            seeds=self.seeds,
            seeds_per_cell=self.seeds_per_cell,
            preset=self.preset,
            offline_steps=self.offline_steps,
            online_steps=self.online_steps,
            eval_every=self.eval_every,
            eval_episodes=self.eval_episodes,
        )


def _flat(where: str, values: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by dotted name; TOML makes tables of names with dots. A table with low and high is a `Between`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"Sweep.{where} is {values!r}; expected settings by name")
    for name, value in values.items():
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"Sweep.{where} has {name!r}; expected names like config.beta")
        if isinstance(value, Mapping) and not {"low", "high"} & value.keys():
            yield from _flat(where, value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _values(name: str, values: Any) -> tuple[Any, ...] | Between:
    """Return the values to try of a setting."""
    if isinstance(values, Between):
        return values
    if isinstance(values, Mapping):
        return from_dict(Between, values, f"Sweep.settings {name}")
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(f"Sweep.settings: {name} is {values!r}; expected a list of values to try, or low and high")
    found = tuple(tuple(item) if isinstance(item, list) else item for item in values)
    if len({_text(item) for item in found}) < len(found):
        raise ConfigError(f"Sweep.settings: {name} has a value twice: {list(values)}")
    return found


def _text(value: Any) -> str:
    """Return a value as part of a label: 3 for 3 and 3.0."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return ",".join(map(_text, value)) if isinstance(value, tuple) else str(value)


def label_of(agent: str, values: Mapping[str, Any]) -> str:
    """Return the label of a combination, such as `iql beta=3`. Folders are named after it, so no two become the same.

    Where characters would be lost in such a name, the label ends with a digest of the whole.
    """
    parts = [f"{name.removeprefix('config.')}={_text(value)}" for name, value in values.items()]
    label = " ".join([agent, *parts])
    if len(label) <= LONGEST_LABEL and re.fullmatch(r"[\w.= ]+", label, re.ASCII):
        return label
    return f"{label[:LONGEST_LABEL]} {hashlib.sha256(label.encode()).hexdigest()[:8]}"


def read_file(path: Path) -> Suite | Sweep:
    """Return the `SUITE` or `SWEEP` of a Python file, or the sweep of a TOML file. Raises `ConfigError`."""
    if path.suffix != ".toml":
        module = run_file(path)
        found = getattr(module, "SUITE", getattr(module, "SWEEP", None))
        if not isinstance(found, Suite | Sweep):
            raise ConfigError(
                f"{path} defines no `SUITE` of type o2o.report.suite.Suite, and no `SWEEP` of o2o.report.sweep.Sweep"
            )
    else:
        try:
            found = from_dict(Sweep, tomllib.loads(path.read_text()), str(path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no TOML: {error}") from error
    if isinstance(found, Sweep) and not found.name:
        return dataclasses.replace(found, name=path.stem)
    return found


def load_sweep(path: Path) -> Sweep:
    """Return the sweep of a file. Raises `ConfigError` if it has none."""
    found = read_file(path)
    if not isinstance(found, Sweep):
        raise ConfigError(f"{path} defines a suite and no sweep; run it with `o2o bench run {path}`")
    return found


@dataclass(frozen=True)
class Scored:
    """A line of a sweep's table: one combination on one dataset, at its last evaluation."""

    dataset: str
    label: str
    scores: tuple[float, ...]
    """Of each seed."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.scores))

    @property
    def interval(self) -> tuple[float, float]:
        """Bootstrap interval of the mean."""
        return interval(self.scores)


def table(suite: Suite, out: Path, metric: Metric = "auto") -> tuple[str, list[Scored]]:
    """Return the metric and the lines of a sweep's results in folder `out`, per dataset the best first."""
    wanted = {(cell.dataset, cell.label) for cell in suite.cells()}
    last: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in read_scores(out / suite.name):
        key = (row["dataset"], row["method"], row["seed"])
        if key[:2] in wanted and row["seed"] < suite.seeds and (key not in last or place(row) >= place(last[key])):
            last[key] = row
    name = judged_by(list(last.values())) if metric == "auto" else metric
    scores: dict[tuple[str, str], list[float]] = {}
    for (dataset, label, _), row in sorted(last.items()):
        if row[name] is not None:
            scores.setdefault((dataset, label), []).append(row[name])
    lines = [Scored(*key, tuple(values)) for key, values in scores.items()]
    return name, sorted(lines, key=lambda line: (line.dataset, -line.mean, line.label))
