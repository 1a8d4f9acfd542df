"""The bookkeeping of benchmark suites: where every cell stands, and running each once.

The run folder of a cell, with the checkpoints, stands under `runs/bench/<suite>/`. With another folder of results `out`
than the committed one it stands under `<out>/runs/<suite>/`, so that nothing that ran before counts. Beside the run
folder `<cell>.json` says with which settings the run began. The results of a finished run go to `<results>/<suite>/`
(`o2o.report.scores`).
"""

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from o2o.errors import O2OError, RunError
from o2o.files import alive, write_atomically
from o2o.report.scores import CELLS, keep, read_cells
from o2o.report.suite import Cell, Suite, covered, load_suite, split, status_of

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


def folders(out: Path | None = None, runs: Path | None = None) -> tuple[Path, Path]:
    """Return the folders of results and of runs: those given, else the committed results, and the runs that go there.

    Results in another folder have their own runs, `out/runs`.
    """
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
        for cell in split(planned, own.keys() | covered(runs, planned.stem)):
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


def run_suite(
    suite: Suite | str,
    train: Callable[[Cell, Path], object],
    resume: Callable[[Path], object],
    *,
    agents: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: int | None = None,
    out: Path | None = None,
    runs: Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Run the missing cells, resume the interrupted ones, leave the finished ones; return 0 if all finished, else 1.

    `train(cell, run)` makes the run folder, `resume(run)` goes on with it; both leave `status.json` there. A cell that
    fails with an `O2OError` is reported and the others still run; one whose status is "stopped" stops the suite.
    Raises `RunError` before the first one if a cell has results, or a run to go on with, of other settings.
    """
    suite = load_suite(suite) if isinstance(suite, str) else suite
    cells = suite.cells(agents, tasks, seeds)
    places = folders(out, runs)
    planned = jobs(suite, cells, *places)
    for job in planned:
        check_run(job)
    for number, job in enumerate(planned, start=1):
        place = f"[{number}/{len(planned)}] {job.cell.name}"
        if job.state in ("finished", "active"):
            say(f"{place}: {'finished already' if job.state == 'finished' else 'running in another process'}")
            continue
        if collect(job):
            say(f"{place}: results taken from {job.run}, which has the same settings")
        else:
            say(f"{place}: {'resuming' if job.state == 'interrupted' else 'starting'}")
            _run(job, train, resume, lambda text, place=place: say(f"{place}: {text}"))
        if (status_of(job.run) or {}).get("status") == "stopped":
            say(f"{place}: stopped; the same command goes on from here")
            break
    return int(any(job.state != "finished" for job in jobs(suite, cells, *places)))


def _run(
    job: Job, train: Callable[[Cell, Path], object], resume: Callable[[Path], object], say: Callable[[str], None]
) -> None:
    """Run one cell as far as it goes and keep its results if it finished."""
    job.record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(job.record, json.dumps(asdict(job.cell), indent=2) + "\n")
    try:
        if job.state == "interrupted":
            resume(job.run)
        else:
            train(job.cell, job.run)
    except O2OError as error:
        say(f"failed: {error}")
    collect(job)
