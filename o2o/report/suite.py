"""Benchmark suites: typed tables of what to run.

A cell is one run of one method on one dataset with some seeds. `o2o.report.jobs` runs each cell once,
`o2o.report.scores` keeps its results, and `o2o.report.suite_report` writes the report.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from o2o.errors import ConfigError, RunError, suggest
from o2o.files import read_object
from o2o.user_code import run_file


@dataclass(frozen=True)
class BenchTask:
    """A dataset and what overrides its task's conventions."""

    dataset: str
    """Minari id."""
    options: tuple[tuple[str, Any], ...] = ()
    """Fields of the task, such as `("binary", True)`."""
    target: float | None = None
    """Score of the suite's first metric to reach; the report says after how many environment steps each method did."""


@dataclass(frozen=True)
class Published:
    """Other people's success rates of a suite's methods (`o2o.report.published`). Only for the same data."""

    file: Path
    """A csv file."""
    same_data: bool = False
    """Whether they were measured on data of the same distribution, in the same environments."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` unless the data are the same: a figure on other data stands beside none of ours."""
        if not self.same_data:
            raise ConfigError(
                f"published figures {self.file} stand beside a suite's own only where the data are the same; say "
                "`same_data=True`, or leave `published` out"
            )


@dataclass(frozen=True)
class Variant:
    """A method: an agent with what differs from its preset."""

    label: str
    agent: str
    overrides: tuple[tuple[str, Any], ...] = ()
    """Config fields by dotted name, such as `("online.warmup_steps", 0)`."""
    fields: tuple[tuple[str, Any], ...] | None = None
    """Settings of the run by dotted name, such as `("loop.overlap", True)`, over all others."""
    offline_steps: int | None = None
    """Gradient steps of pre-training; None for the suite's."""
    online_steps: int | None = None
    """Environment steps; None for the suite's."""
    starts_from: str | None = None
    """Earlier variant (`label` or `suite/label`) whose pre-trained agents this one starts from."""
    base: str | None = None
    """Base policy to correct: an earlier variant (seed i corrects its seed i, in a run of its own), or a file."""


@dataclass(frozen=True)
class Cell:
    """One run: everything `train` needs to know."""

    suite: str
    dataset: str
    label: str
    agent: str
    preset: str
    offline_steps: int
    online_steps: int
    eval_every: int
    offline_eval_every: int
    eval_episodes: int
    options: tuple[tuple[str, Any], ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """How many, side by side."""
    fields: tuple[tuple[str, Any], ...] | None = None
    """Settings of the run by dotted name, such as `("loop.overlap", True)`, over all others."""
    starts_from: str | None = None
    """Variant (`label` or `suite/label`) whose run folder holds the agents to start from."""
    base: str | None = None
    """Variant whose run holds the base policies, or a base of its own (`Variant.base`)."""

    def needs(self, other: "Cell") -> bool:
        """Whether this cell can only begin when `other` has finished: it starts from it, or corrects it."""
        named = {text.rpartition("/") for text in (self.starts_from, self.base) if text and _is_variant(text)}
        suites = {(suite or self.suite, label) for suite, _, label in named}
        overlap = other.seed < self.seed + self.seeds and self.seed < other.seed + other.seeds
        return (other.suite, other.label) in suites and other.dataset == self.dataset and overlap

    def source(self, run: Path) -> Path | None:
        """Return the run folder to start from, beside this cell's own `run` or in its suite's folder."""
        if self.starts_from is None:
            return None
        suite, _, label = self.starts_from.rpartition("/")
        folder = run.parent.parent / suite if suite else run.parent
        return folder / replace(self, label=label).name

    def base_of(self, run: Path) -> tuple[str, int] | None:
        """Return the base of this cell's own `run`, and which seed of it; raises `RunError` if that is not run yet."""
        if self.base is None or not _is_variant(self.base):
            return None if self.base is None else (self.base, 0)
        suite, _, label = self.base.rpartition("/")
        folder, stem = (run.parent.parent / suite if suite else run.parent), replace(self, label=label).stem
        for first, last in sorted(covered(folder, stem)):
            path = folder / f"{stem}--seeds{first}-{last}"
            if first <= self.seed <= last and (status_of(path) or {}).get("status") == "finished":
                return str(path), self.seed - first
        raise RunError(
            f"{self.name} corrects {self.base}, whose seed {self.seed} has no finished run in {folder}: run it first, "
            f"o2o bench run {suite or self.suite}"
        )

    @property
    def stem(self) -> str:
        """Folder name without the seeds: `<dataset>--<label>`."""
        return f"{_slug(self.dataset)}--{_slug(self.label)}"

    @property
    def name(self) -> str:
        """Folder name: `<dataset>--<label>--seeds<first>-<last>`."""
        return f"{self.stem}--seeds{self.seed}-{self.seed + self.seeds - 1}"

    def settings(self) -> dict[str, Any]:
        """Return all that decides what is learnt, seeds aside, JSON-able."""
        values = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in values.items() if key not in ("seed", "seeds")}


@dataclass(frozen=True)
class Suite:
    """One table of results: tasks x methods x seeds."""

    name: str
    description: str
    tasks: tuple[BenchTask, ...]
    variants: tuple[Variant, ...]
    seeds: int = 3
    seeds_per_cell: int | None = None
    """How many seeds learn side by side in one run; None: all of them."""
    preset: str = "small"
    offline_steps: int = 20_000
    """Gradient steps of pre-training."""
    online_steps: int = 0
    """Environment steps, warm-up included; 0 for an offline suite."""
    eval_every: int = 5_000
    """Environment steps between two evaluations."""
    offline_eval_every: int = 0
    """Gradient steps between two evaluations while pre-training; 0 for one at its end."""
    eval_episodes: int = 20
    metrics: tuple[str, ...] = ("success", "return")
    statistic: Literal["iqm", "mean"] = "mean"
    published: Published | None = None
    """Figures to print and draw beside the suite's own."""

    def cells(self, agents: Sequence[str] = (), tasks: Sequence[str] = (), seeds: int | None = None) -> list[Cell]:
        """Return the planned cells with all their seeds: only `agents` (labels) and `tasks` (datasets) where given.

        Raises `ConfigError` for unknown ones.
        """
        _known("method", agents, [variant.label for variant in self.variants], self.name)
        _known("dataset", tasks, [task.dataset for task in self.tasks], self.name)
        count = self.seeds if seeds is None else seeds
        if count < 1:
            raise ConfigError(f"suite {self.name}: seeds is {count}; expected at least 1")
        planned = [
            self._cell(task, variant, count)
            for task in self.tasks
            if not tasks or task.dataset in tasks
            for variant in self.variants
            if not agents or variant.label in agents
        ]
        alone = lambda cell: cell.base is not None and _is_variant(cell.base)  # noqa: E731
        blocks = [split(cell, [(i, i) for i in range(count)]) if alone(cell) else [cell] for cell in planned]
        return [cell for block in blocks for cell in block]

    def _cell(self, task: BenchTask, variant: Variant, seeds: int) -> Cell:
        return Cell(
            suite=self.name,
            dataset=task.dataset,
            label=variant.label,
            agent=variant.agent,
            preset=self.preset,
            offline_steps=self.offline_steps if variant.offline_steps is None else variant.offline_steps,
            online_steps=self.online_steps if variant.online_steps is None else variant.online_steps,
            eval_every=self.eval_every,
            offline_eval_every=self.offline_eval_every,
            eval_episodes=self.eval_episodes,
            options=task.options,
            overrides=variant.overrides,
            fields=variant.fields,
            starts_from=variant.starts_from,
            base=variant.base,
            seeds=seeds,
        )


def _is_variant(base: str) -> bool:
    """Whether a base is a variant of a suite, and not module:function or a file."""
    return ":" not in base and not Path(base).suffix


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")


def _known(what: str, asked: Sequence[str], known: Sequence[str], suite: str) -> None:
    for name in asked:
        if name not in known:
            raise ConfigError(f"suite {suite} has no {what} {name!r}; {suggest(name, known)}")


def status_of(folder: Path) -> dict[str, Any] | None:
    """Return a folder's `status.json`, None if it has none. Raises `RunError` for one that cannot be read."""
    return read_object(folder / "status.json") if (folder / "status.json").exists() else None


def covered(folder: Path, stem: str) -> set[tuple[int, int]]:
    """Return the (first, last) seeds of a method's run folders in `folder`."""
    pattern = re.compile(re.escape(stem) + r"--seeds(\d+)-(\d+)")
    names = [path.name for path in folder.glob(f"{stem}--seeds*")] if folder.is_dir() else []
    return {(int(m[1]), int(m[2])) for m in map(pattern.fullmatch, names) if m}


def split(cell: Cell, blocks: Iterable[tuple[int, int]]) -> list[Cell]:
    """Cut a cell into the `blocks` (first, last) of seeds that exist already and the stretches between them."""
    end, cells = cell.seed + cell.seeds, []
    started = dict(sorted(blocks))
    seed = cell.seed
    while seed < end:
        last = started.get(seed, min((first for first in started if seed < first < end), default=end) - 1)
        cells.append(replace(cell, seed=seed, seeds=last - seed + 1))
        seed = last + 1
    return cells


def pieces(cell: Cell, size: int | None) -> list[Cell]:
    """Cut a cell into cells of `size` seeds, the last of what is left; None leaves it whole."""
    ends = range(cell.seed, cell.seed + cell.seeds, size or cell.seeds)
    return [replace(cell, seed=i, seeds=min(ends.step, cell.seed + cell.seeds - i)) for i in ends]


def load_suite(name: str, folder: Path = Path("benchmarks")) -> Suite:
    """Return the suite `name` of `folder/suites.py`, or `SUITE` or `SWEEP` of the file `name` (.py, .toml).

    Raises `ConfigError` if there is no such suite.
    """
    if name.endswith((".py", ".toml")):
        from o2o.report.sweep import Sweep, read_file

        found = read_file(Path(name))
        return found.suite() if isinstance(found, Sweep) else found
    path = folder / "suites.py"
    if not path.is_file():
        raise ConfigError(
            f"no benchmark suite {name!r}: {path} does not exist; run from a checkout, or give a Python file that "
            "defines SUITE"
        )
    suites: dict[str, Suite] = run_file(path).SUITES
    if name not in suites:
        raise ConfigError(f"no benchmark suite {name!r} in {path}; {suggest(name, suites)}")
    return suites[name]
