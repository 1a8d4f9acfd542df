"""Benchmark suites: typed tables of what to run, and the bookkeeping that runs each cell once.

A cell is one run of one method on one dataset with some seeds. Its raw rows end up in `results/<suite>/<cell>/`; its
run folder, with the checkpoints, stays under `runs/`. Reports are in `o2o.report`.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from o2o.errors import ConfigError, O2OError, RunError
from o2o.user_code import run_file

State = Literal["missing", "interrupted", "active", "finished"]
KEPT = ("config.json", "episodes.jsonl", "metrics.jsonl", "status.json")
"""Files of a finished run that are copied to the results."""
CELL_FILE = "cell.json"
RESULTS = Path("benchmarks/results")
RUNS = Path("runs/bench")


@dataclass(frozen=True)
class Published:
    """A figure that somebody else reported."""

    value: float
    metric: str
    """Metric of our rows that it speaks of, in the same unit."""
    source: str
    """Paper and table, or repository and commit."""
    same_data: bool = False
    """Whether it was measured on this very dataset; if not, it never stands beside our figures."""


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
class Variant:
    """A method: an agent with what differs from its preset."""

    label: str
    agent: str
    overrides: tuple[tuple[str, Any], ...] = ()
    """Config fields by dotted name, such as `("online.warmup_steps", 0)`."""
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
    starts_from: str | None = None
    """Variant (`label` or `suite/label`) whose run folder holds the agents to start from."""
    base: str | None = None
    """Variant whose run holds the base policies, or a base of its own (`Variant.base`)."""

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
        for first, last in sorted(_covered(folder, stem)):
            path = folder / f"{stem}--seeds{first}-{last}"
            if first <= self.seed <= last and (_status(path) or {}).get("status") == "finished":
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
    published: Mapping[tuple[str, str], Published | None] = field(default_factory=dict)
    """(dataset, label) to a published figure."""

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
        blocks = [_split(cell, [(i, i) for i in range(count)]) if alone(cell) else [cell] for cell in planned]
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
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(dict.fromkeys(known))}"
            raise ConfigError(f"suite {suite} has no {what} {name!r}; {hint}")


def load_suite(name: str, folder: Path = Path("benchmarks")) -> Suite:
    """Return `SUITE` of `folder/<name>.py`, or of the Python file `name`. Raises `ConfigError` if there is none."""
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.py") if "SUITE" in file.read_text())
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        found = f"suites there: {', '.join(known)}" if known else "no suite there; run from a checkout or name a file"
        raise ConfigError(f"no benchmark suite {name!r} in {folder}; {hint}{found}")
    suite = getattr(run_file(path), "SUITE", None)
    if not isinstance(suite, Suite):
        raise ConfigError(f"{path} defines no `SUITE` of type o2o.bench.Suite")
    return suite


@dataclass(frozen=True)
class Job:
    """A cell with where it stands."""

    cell: Cell
    state: State
    run: Path
    results: Path


def _status(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"{folder / 'status.json'} cannot be read ({error}); delete the run folder or mend the file"
        ) from error


def _alive(status: Mapping[str, Any]) -> bool:
    """Tell whether the process that wrote `status` still runs here (fields `pid` and `host`, where given)."""
    pid = status.get("pid")
    if not isinstance(pid, int) or status.get("host", socket.gethostname()) != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def state_of(run: Path, results: Path) -> State:
    """Tell where a cell stands from the `status.json` of its results or, before those exist, of its run folder."""
    finished = _status(results)
    if finished is not None and finished.get("status") == "finished":
        return "finished"
    status = _status(run)
    if status is None:
        return "interrupted" if (run / "config.json").exists() else "missing"
    if status.get("status") == "running" and _alive(status):
        return "active"
    return "interrupted"


def _covered(folder: Path, stem: str) -> set[tuple[int, int]]:
    """Return the (first, last) seeds of a method's folders in `folder`."""
    pattern = re.compile(re.escape(stem) + r"--seeds(\d+)-(\d+)")
    names = [path.name for path in folder.glob(f"{stem}--seeds*")] if folder.is_dir() else []
    return {(int(m[1]), int(m[2])) for m in map(pattern.fullmatch, names) if m}


def _split(cell: Cell, blocks: Iterable[tuple[int, int]]) -> list[Cell]:
    """Cut a cell into the `blocks` (first, last) of seeds that exist already and the stretches between them."""
    end, cells = cell.seed + cell.seeds, []
    started = dict(sorted(blocks))
    seed = cell.seed
    while seed < end:
        last = started.get(seed, min((first for first in started if seed < first < end), default=end) - 1)
        cells.append(replace(cell, seed=seed, seeds=last - seed + 1))
        seed = last + 1
    return cells


def jobs(suite: Suite, cells: Sequence[Cell], results_dir: Path, runs_dir: Path) -> list[Job]:
    """Return where every cell stands; seeds beyond those of an earlier run become cells of their own.

    Raises `RunError` if a cell was run with other settings than the suite now has: such rows are never mixed.
    """
    found = []
    for planned in cells:
        results_root, runs_root = results_dir / suite.name, runs_dir / suite.name
        blocks = _covered(results_root, planned.stem) | _covered(runs_root, planned.stem)
        for cell in _split(planned, blocks):
            run, results = runs_root / cell.name, results_root / cell.name
            changed = changed_settings(cell, results)
            if changed:
                raise RunError(f"{results} has other settings ({changed}); restore them, or remove it and {run}")
            found.append(Job(cell, state_of(run, results), run, results))
    return found


def changed_settings(cell: Cell, results: Path) -> str:
    """Describe how the settings stored with a cell's results differ from the suite's; empty if they do not."""
    path = results / CELL_FILE
    if not path.exists():
        return ""
    stored, now = json.loads(path.read_text()), cell.settings()
    keys = [key for key in now | stored if stored.get(key) != now.get(key) and key not in ("seed", "seeds")]
    return ", ".join(f"{key}: {stored.get(key)} then, {now.get(key)} now" for key in keys)


def pending(suite: Suite, results_dir: Path = RESULTS, runs_dir: Path = RUNS) -> list[Job]:
    """Return the suite's cells that are not finished."""
    return [job for job in jobs(suite, suite.cells(), results_dir, runs_dir) if job.state != "finished"]


def collect(job: Job) -> bool:
    """Copy the raw rows of a run that has finished to the results; return whether it has."""
    status = _status(job.run)
    if status is None or status.get("status") != "finished":
        return False
    job.results.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if not (job.run / name).exists():
            raise RunError(f"{job.run} is marked finished but has no {name}; resume or delete it")
        partial = job.results / f".{name}.part"
        shutil.copyfile(job.run / name, partial)
        partial.replace(job.results / name)
    return True


def run_suite(
    suite: Suite | str,
    train: Callable[[Cell, Path], object],
    resume: Callable[[Path], object],
    *,
    agents: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: int | None = None,
    out: Path | None = None,
    runs: Path = RUNS,
    say: Callable[[str], None] = print,
) -> int:
    """Run the missing cells, resume the interrupted ones, leave the finished ones; return 0 if all finished, else 1.

    `train(cell, run)` makes the run folder, `resume(run)` goes on with it; both leave `status.json` there. A cell that
    fails with an `O2OError` is reported and the others still run; one whose status is "stopped" stops the suite.
    """
    suite = load_suite(suite) if isinstance(suite, str) else suite
    planned = jobs(suite, suite.cells(agents, tasks, seeds), out or RESULTS, runs)
    for number, job in enumerate(planned, start=1):
        place = f"[{number}/{len(planned)}] {job.cell.name}"
        if job.state in ("finished", "active"):
            say(f"{place}: {'finished already' if job.state == 'finished' else 'running in another process'}")
            continue
        if not collect(job):
            say(f"{place}: {'resuming' if job.state == 'interrupted' else 'starting'}")
            _run(job, train, resume, lambda text, place=place: say(f"{place}: {text}"))
        if (_status(job.run) or {}).get("status") == "stopped":
            say(f"{place}: stopped; the same command goes on from here")
            break
    return int(any(state_of(job.run, job.results) != "finished" for job in planned))


def _run(
    job: Job, train: Callable[[Cell, Path], object], resume: Callable[[Path], object], say: Callable[[str], None]
) -> None:
    """Run one cell as far as it goes and keep its rows if it finished."""
    job.results.mkdir(parents=True, exist_ok=True)
    (job.results / CELL_FILE).write_text(json.dumps(asdict(job.cell), indent=2) + "\n")
    try:
        if job.state == "interrupted":
            resume(job.run)
        else:
            train(job.cell, job.run)
    except O2OError as error:
        say(f"failed: {error}")
    collect(job)
