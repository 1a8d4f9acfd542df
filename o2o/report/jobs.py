"""The bookkeeping of benchmark suites: where every cell stands, and running each once.

The run folder of a cell, with the checkpoints, stands under `runs/bench/<suite>/`. With another folder of results `out`
than the committed one it stands under `<out>/runs/<suite>/`, so that nothing that ran before counts. Beside the run
folder `<cell>.json` says with which settings the run began, and `<cell>.failed.txt` why it failed. The results of a
finished run go to `<results>/<suite>/` (`o2o.report.scores`).
"""

import json
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from o2o.errors import ConfigError, O2OError, RunError
from o2o.files import alive, write_atomically
from o2o.report.scores import CELLS, keep, read_cells
from o2o.report.suite import Cell, Suite, covered, load_suite, pieces, split, status_of

State = Literal["missing", "interrupted", "active", "finished"]
RESULTS = Path("benchmarks/results")
RUNS = Path("runs/bench")


@dataclass(frozen=True)
class Job:
    """A cell with where it stands."""

    cell: Cell
    state: State
    run: Path
    """Its run folder."""
    results: Path
    """The suite's folder of results."""

    @property
    def record(self) -> Path:
        """File beside the run folder with the cell as it was when its run began."""
        return self.run.with_name(f"{self.run.name}.json")

    @property
    def failure(self) -> Path:
        """File beside the run folder with the traceback of a run that failed."""
        return self.run.with_name(f"{self.run.name}.failed.txt")


def folders(out: Path | None = None, runs: Path | None = None) -> tuple[Path, Path]:
    """Return the folders of results and of runs: those given, else the committed results, and the runs that go there.

    Results in another folder have their own runs, `out/runs`. Raises `ConfigError` for an address instead of a folder.
    """
    if out is not None and (found := re.search(r"(?:^|/)([a-z][a-z0-9+]+):/(.*)", out.as_posix())):
        raise ConfigError(
            f"`out` is the address {found[1]}://{found[2]}; expected a folder of this machine: give the address with "
            "`store`"
        )
    results = (out or RESULTS).absolute()  # an environment may change the working folder
    return results, runs or (RUNS.absolute() if results.resolve() == RESULTS.resolve() else results / "runs")


def _alive(status: Mapping[str, Any]) -> bool:
    """Tell whether the process that wrote `status` still runs here (fields `pid` and `host`, where given)."""
    pid = status.get("pid")
    if not isinstance(pid, int) or status.get("host", socket.gethostname()) != socket.gethostname():
        return False
    return alive(pid) and pid != os.getpid()


def state_of(run: Path) -> State:
    """Tell where the run of an unfinished cell stands, from the `status.json` of its folder."""
    status = status_of(run)
    if status is None:
        return "interrupted" if (run / "config.json").exists() else "missing"
    if status.get("status") == "running" and _alive(status):
        return "active"
    return "interrupted"


def jobs(suite: Suite, cells: Sequence[Cell], results_dir: Path, runs_dir: Path) -> list[Job]:
    """Return where every cell stands; seeds beyond those of an earlier run become cells of their own.

    Raises `RunError` if a cell's results are of other settings than the suite now has: such scores are never mixed.
    """
    results, runs, found = results_dir / suite.name, runs_dir / suite.name, []
    finished = read_cells(results)
    for planned in cells:
        own = {cell.seeds: cell for cell in finished if cell.method == (planned.dataset, planned.label)}
        begun = own.keys() | covered(runs, planned.stem)
        stretches = split(planned, begun)
        whole = [(cell.seed, cell.seed + cell.seeds - 1) in begun for cell in stretches]
        sizes = [None if kept else suite.seeds_per_cell for kept in whole]
        for cell in (part for item, size in zip(stretches, sizes, strict=True) for part in pieces(item, size)):
            run, kept = runs / cell.name, own.get((cell.seed, cell.seed + cell.seeds - 1))
            changed = changed_settings(cell, kept.cell) if kept is not None else ""
            if changed:
                raise RunError(
                    f"{results / CELLS} has {cell.name} with other settings ({changed}); restore them, or remove its "
                    f"line and {run}"
                )
            found.append(Job(cell, "finished" if kept is not None else state_of(run), run, results))
    return found


def changed_settings(cell: Cell, stored: Mapping[str, Any]) -> str:
    """Describe how `stored` settings differ from the cell's; empty if they do not. Seeds are no setting."""
    now = cell.settings()
    keys = [key for key in {**now, **stored} if stored.get(key) != now.get(key) and key not in ("seed", "seeds")]
    return ", ".join(f"{key}: {stored.get(key)} then, {now.get(key)} now" for key in keys)


def check_run(job: Job) -> None:
    """Raise `RunError` if the run of an unfinished cell began with other settings, or if its settings are not known."""
    if job.state in ("finished", "missing"):
        return
    if not job.record.exists():
        raise RunError(f"{job.run} was begun with settings that are not on record ({job.record.name}); remove it")
    changed = changed_settings(job.cell, json.loads(job.record.read_text()))
    if changed:
        raise RunError(f"{job.run} was begun with other settings ({changed}); restore them, or remove it")


def pending(suite: Suite, results_dir: Path = RESULTS, runs_dir: Path = RUNS) -> list[Job]:
    """Return the suite's cells that are not finished."""
    return [job for job in jobs(suite, suite.cells(), results_dir, runs_dir) if job.state != "finished"]


def collect(job: Job) -> bool:
    """Keep the results of a run that has finished; return whether it has."""
    if (status_of(job.run) or {}).get("status") != "finished":
        return False
    keep(job.results, job.cell, job.run)
    return True


@dataclass(frozen=True)
class Ended:
    """How the work on a cell ended: its `status.json` says how far it came."""

    job: Job
    error: str = ""
    """What failed, in a line; empty if nothing did."""
    trace: str = ""
    """The traceback of it."""


BackEnd = Callable[[Sequence[Job]], Iterable[Ended]]
"""Works on cells, given in the order of the suite, and yields each when it has ended."""


def attempt(job: Job, train: Callable[[Cell, Path], object], resume: Callable[[Path], object]) -> Ended:
    """Work on a cell from where it stands now, as far as it goes; whatever fails is returned."""
    try:
        state = state_of(job.run)
        if state != "active" and (status_of(job.run) or {}).get("status") != "finished":
            _ = train(job.cell, job.run) if state == "missing" else resume(job.run)
    except Exception as error:
        return failed(job, error)
    return Ended(job)


def failed(job: Job, error: BaseException) -> Ended:
    """Return the end of a cell that raised `error`."""
    name = "" if isinstance(error, O2OError) else f"{type(error).__name__}: "
    lines = traceback.format_exception(error)
    return Ended(job, " ".join(f"{name}{error}".split()), "".join(lines))


def in_turn(
    train: Callable[[Cell, Path], object],
    resume: Callable[[Path], object],
    say: Callable[[str], None],
    do: Callable[..., Ended] = attempt,
) -> BackEnd:
    """Return the back end that works on one cell after the other in this process.

    `train(cell, run)` makes the run folder, `resume(run)` goes on with it; both leave `status.json` there. `do(job,
    train, resume)` works on one cell.
    """

    def work(todo: Sequence[Job]) -> Iterator[Ended]:
        for job in todo:
            say(f"{job.cell.name}: {'resuming' if job.state == 'interrupted' else 'starting'}")
            yield do(job, train, resume)

    return work


def plan(
    suite: Suite,
    agents: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: int | None = None,
    out: Path | None = None,
    runs: Path | None = None,
) -> list[Job]:
    """Return where the chosen cells of a suite stand.

    Raises `RunError` if one has results, or a run to go on with, of other settings.
    """
    planned = jobs(suite, suite.cells(agents, tasks, seeds), *folders(out, runs))
    for job in planned:
        check_run(job)
    return planned


def run_jobs(planned: Sequence[Job], work: BackEnd, say: Callable[[str], None] = print) -> int:
    """Let `work` do the cells that are not finished and keep their results; return 0 if all have finished, else 1.

    Nothing is done for a finished cell. A cell that fails leaves its traceback beside its run, and the others still
    run; one whose status is "stopped" stops the rest. Raises `RunError` for a folder that cannot be written.
    """
    unfinished, todo = 0, []
    for job in planned:
        if job.state == "finished":
            say(f"{job.cell.name}: finished already")
        elif job.state == "active":
            unfinished += 1
            say(f"{job.cell.name}: running in another process")
        elif collect(job):
            say(f"{job.cell.name}: results taken from {job.run}, which has the same settings")
        else:
            _begin(job)
            todo.append(job)
    left = len(todo)
    for ended in work(todo) if todo else ():
        job, status = ended.job, (status_of(ended.job.run) or {}).get("status")
        if ended.error:
            write_atomically(job.failure, ended.trace)
            say(f"{job.cell.name}: failed: {ended.error}")
        elif collect(job):
            left -= 1
            say(f"{job.cell.name}: finished, {left} left")
        elif status == "stopped":
            say(f"{job.cell.name}: stopped; the same command goes on from here")
            break
    return int(bool(left + unfinished))


def _begin(job: Job) -> None:
    """Write down as what a cell begins; what an earlier attempt said of its failure is void."""
    try:
        job.record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(job.record, json.dumps(asdict(job.cell), indent=2) + "\n")
        job.failure.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"the runs cannot be written to {job.record.parent}: {error.strerror}; give another folder with `out`"
        ) from error


def run_suite(
    suite: Suite | str,
    work: BackEnd,
    *,
    agents: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: int | None = None,
    out: Path | None = None,
    runs: Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Run the chosen cells of a suite: `plan`, then `run_jobs`."""
    suite = load_suite(suite) if isinstance(suite, str) else suite
    return run_jobs(plan(suite, agents, tasks, seeds, out, runs), work, say)
