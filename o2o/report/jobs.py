"""The bookkeeping of benchmark suites: where every cell stands, and running each once.

A cell's run folder, with the checkpoints, stands under `runs/bench/<suite>/`, or under `<out>/runs/<suite>/` where the
results go to another folder `out` than the committed ones: what is measured again starts with no earlier run. Beside it
`<cell>.json` says with which settings it began. A finished run's raw rows are copied to `<results>/<suite>/<cell>/`.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from o2o.errors import O2OError, RunError
from o2o.files import write_atomically
from o2o.report.suite import Cell, Suite, covered, load_suite, split, status_of

State = Literal["missing", "interrupted", "active", "finished"]
KEPT = ("config.json", "episodes.jsonl", "metrics.jsonl", "status.json")
"""Files of a finished run that are copied to the results."""
CELL_FILE = "cell.json"
RESULTS = Path("benchmarks/results")
RUNS = Path("runs/bench")


@dataclass(frozen=True)
class Job:
    """A cell with where it stands."""

    cell: Cell
    state: State
    run: Path
    results: Path

    @property
    def record(self) -> Path:
        """File beside the run folder with the cell as it was when its run began."""
        return self.run.with_name(f"{self.run.name}.json")


def folders(out: Path | None = None, runs: Path | None = None) -> tuple[Path, Path]:
    """Return the folders of results and of runs: those given, else the committed results, and the runs that go there.

    Results in another folder have their own runs, `out/runs`.
    """
    results = out or RESULTS
    return results, runs or (RUNS if results.resolve() == RESULTS.resolve() else results / "runs")


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
    finished = status_of(results)
    if finished is not None and finished.get("status") == "finished":
        return "finished"
    status = status_of(run)
    if status is None:
        return "interrupted" if (run / "config.json").exists() else "missing"
    if status.get("status") == "running" and _alive(status):
        return "active"
    return "interrupted"


def jobs(suite: Suite, cells: Sequence[Cell], results_dir: Path, runs_dir: Path) -> list[Job]:
    """Return where every cell stands; seeds beyond those of an earlier run become cells of their own.

    Raises `RunError` if a cell's results are of other settings than the suite now has: such rows are never mixed.
    """
    found = []
    for planned in cells:
        results_root, runs_root = results_dir / suite.name, runs_dir / suite.name
        blocks = covered(results_root, planned.stem) | covered(runs_root, planned.stem)
        for cell in split(planned, blocks):
            run, results = runs_root / cell.name, results_root / cell.name
            changed = changed_settings(cell, results / CELL_FILE)
            if changed:
                raise RunError(f"{results} has other settings ({changed}); restore them, or remove it and {run}")
            found.append(Job(cell, state_of(run, results), run, results))
    return found


def changed_settings(cell: Cell, path: Path) -> str:
    """Describe how the settings in file `path` differ from the cell's; empty if they do not, or without the file."""
    if not path.exists():
        return ""
    stored, now = json.loads(path.read_text()), cell.settings()
    keys = [key for key in now | stored if stored.get(key) != now.get(key) and key not in ("seed", "seeds")]
    return ", ".join(f"{key}: {stored.get(key)} then, {now.get(key)} now" for key in keys)


def check_run(job: Job) -> None:
    """Raise `RunError` if the cell's rows would come from a run of other settings, or of settings not on record."""
    if job.state in ("finished", "missing"):
        return
    record = job.record if job.record.exists() else job.results / CELL_FILE
    if not record.exists():
        raise RunError(f"{job.run} was begun with settings that are not on record ({job.record.name}); remove it")
    changed = changed_settings(job.cell, record)
    if changed:
        raise RunError(f"{job.run} was begun with other settings ({changed}); restore them, or remove it")


def pending(suite: Suite, results_dir: Path = RESULTS, runs_dir: Path = RUNS) -> list[Job]:
    """Return the suite's cells that are not finished."""
    return [job for job in jobs(suite, suite.cells(), results_dir, runs_dir) if job.state != "finished"]


def collect(job: Job) -> bool:
    """Copy the raw rows of a run that has finished to the results; return whether it has."""
    status = status_of(job.run)
    if status is None or status.get("status") != "finished":
        return False
    _write_cell(job.cell, job.results / CELL_FILE)
    for name in KEPT:
        if not (job.run / name).exists():
            raise RunError(f"{job.run} is marked finished but has no {name}; resume or delete it")
        write_atomically(job.results / name, (job.run / name).read_bytes())
    return True


def _write_cell(cell: Cell, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(cell), indent=2) + "\n")


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
    planned = jobs(suite, suite.cells(agents, tasks, seeds), *folders(out, runs))
    for job in planned:
        check_run(job)
    for number, job in enumerate(planned, start=1):
        place = f"[{number}/{len(planned)}] {job.cell.name}"
        if job.state in ("finished", "active"):
            say(f"{place}: {'finished already' if job.state == 'finished' else 'running in another process'}")
            continue
        if collect(job):
            say(f"{place}: copied from {job.run}, which has the same settings")
        else:
            say(f"{place}: {'resuming' if job.state == 'interrupted' else 'starting'}")
            _run(job, train, resume, lambda text, place=place: say(f"{place}: {text}"))
        if (status_of(job.run) or {}).get("status") == "stopped":
            say(f"{place}: stopped; the same command goes on from here")
            break
    return int(any(state_of(job.run, job.results) != "finished" for job in planned))


def _run(
    job: Job, train: Callable[[Cell, Path], object], resume: Callable[[Path], object], say: Callable[[str], None]
) -> None:
    """Run one cell as far as it goes and keep its rows if it finished."""
    _write_cell(job.cell, job.record)
    try:
        if job.state == "interrupted":
            resume(job.run)
        else:
            train(job.cell, job.run)
    except O2OError as error:
        say(f"failed: {error}")
    collect(job)
