"""What `benchmarks/gpu.sh` does with OGBench: makes the data, runs the cells until the time is over, takes the rows.

    python benchmarks/gpu_parts.py data --root ROOT --seconds S [--processes N] [--smoke]
    python benchmarks/gpu_parts.py cells --root ROOT --out RESULTS --seconds S [--workers W] [--seeds N] [--smoke]
    python benchmarks/gpu_parts.py take FOLDER

`data` makes `ogbench/scene-play` as the authors did, 1,000 episodes. If the time is over before, it makes the set of
the episodes that are there. `cells` runs the six methods of the suite `ogbench` that learn offline from chunks, on
tasks 1 and 4 of the scene, to 50,000 updates: each in a process of its own, W at a time, task 1 first. Whatever time is
left goes into the same cells up to `LONGER` updates; a longer cell goes on from the checkpoint of the shorter one. When
the time is over, each saves and stops, and the same command goes on. With a smaller set the suite is `ogbench_part`,
which has no published figures beside it. `take` adds the rows of a folder of results to `benchmarks/results`.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

SCENE, WHOLE = "ogbench/scene-play", 1000
TASKS = tuple(f"{SCENE}-singletask-task{number}-sparse-v0" for number in (1, 4))
METHODS = ("ifql", "rebrac", "fql", "expo", "dsrl", "qam")
"""The cheapest first."""
LONGER = (100_000, 200_000, 500_000, 1_000_000)
SAVE_S, END_S = 30.0, 15.0
"""Seconds before the end at which runs are told to stop, and at which those that have not are killed."""
PATIENCE_S = 20.0
"""Longest wait for a process that was told to end."""
REST_S = 90.0
"""Longest time for the validation episodes, and for writing the set, once the time for the data is over."""
POLL_S = 0.5
LAST_WORDS = 3


# The data.


def made(root: Path) -> int:
    """Return how many episodes the set for training has; 0 if there is none."""
    from o2o.data import files
    from o2o.errors import O2OError

    try:
        return int(files.info(f"{SCENE}-v0", root).metadata["recipe"]["episodes"])
    except (O2OError, KeyError):
        return 0


def begun(root: Path) -> int:
    """Return how many episodes for training an unfinished `o2o data make` has made, without a gap from the first."""
    names = {path.name for path in root.glob("ogbench/.scene-play-v0.making/*.npz")}
    count = 0
    while f"0-{count:06d}.npz" in names:
        count += 1
    return count


def make_data(root: Path, seconds: float, processes: int, smoke: bool) -> int:
    """Make the set, whole or as far as the time goes; return the exit code."""
    if not made(root):
        steps = 60 if smoke else 1000 * WHOLE
        if not _make(root, steps, processes, seconds) and (count := begun(root)):
            print(f"the time for the data is over: a set of {count} episodes", flush=True)
            _make(root, 1000 * count, processes, REST_S)
    count = made(root)
    if count:
        read_once(root)
    print(f"{SCENE}: {count} episodes of {WHOLE}", flush=True)
    return int(not count)


def _make(root: Path, steps: int, processes: int, seconds: float) -> bool:
    command = [sys.executable, "-m", "o2o", "data", "make", SCENE, "--root", str(root), "--steps", str(steps)]
    child = subprocess.Popen([*command, "--processes", str(processes)])
    for number in (signal.SIGTERM, signal.SIGKILL):  # the processes that it started end behind their episode
        try:
            return child.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            child.send_signal(number)
            seconds = PATIENCE_S
    child.wait()
    return False


def read_once(root: Path) -> None:
    """Read the tasks once, so that all processes find the rows in the cache."""
    from o2o import envs
    from o2o.data import datasets

    os.environ["MINARI_DATASETS_PATH"] = str(root)
    for task in TASKS:
        datasets.load(task, task=envs.run_task(datasets.info(task)))


# The cells.


def suite_of(updates: int, whole: bool, smoke: bool) -> Any:
    """Return the suite to so many updates, of the two tasks and six methods alone."""
    from o2o.report.suite import BenchTask
    from o2o.user_code import run_file

    table = run_file(HERE / "suites.py")
    name = "ogbench" if updates == 50_000 else f"ogbench_{updates // 1000}k"
    suite = table.SUITES[name if whole else f"{name}_part"]
    variants = tuple(next(v for v in suite.variants if v.label == label) for label in METHODS)
    suite = dataclasses.replace(suite, tasks=tuple(BenchTask(task) for task in TASKS), variants=variants)
    if not smoke:
        return suite
    tiny = (("episode_limit", 10), ("loop.eval_envs", 1), ("loop.updates_per_dispatch", 5))
    return dataclasses.replace(
        suite,
        preset="small",
        offline_steps=10 * updates // 50_000,
        offline_eval_every=10,
        eval_episodes=1,
        variants=tuple(dataclasses.replace(v, fields=(*tiny, ("config.batch_size", 8))) for v in variants),
    )


def cell_of(suite: Any, label: str, dataset: str, first: int, seeds: int) -> Any:
    """Return one cell of a suite, of `seeds` seeds from `first` on."""
    (cell,) = suite.cells([label], [dataset], seeds)
    return dataclasses.replace(cell, seed=first)


def run_cell(suite: Any, cell: Any, out: Path, before: str | None) -> int:
    """Run a cell, or go on with it; return the exit code. `before`: the suite of the same cell with fewer updates."""
    from o2o.report import jobs
    from o2o.runs import session

    results, runs = jobs.folders(out)
    planned = jobs.jobs(suite, [cell], results, runs)
    if before:
        go_on_from(planned[0], runs / before / cell.name)
        planned = jobs.jobs(suite, [cell], results, runs)
    for job in planned:
        jobs.check_run(job)
    train = lambda cell, path: session.train(session.cell_run(cell, path), path, quiet=True)  # noqa: E731
    work = jobs.in_turn(train, lambda path: session.resume(path, quiet=True), lambda text: print(text, flush=True))
    return jobs.run_jobs(planned, work, lambda text: print(text, flush=True))


def go_on_from(job: Any, shorter: Path) -> None:
    """Make a cell's run of the finished one with fewer updates: the same run, interrupted there.

    No setting of these methods depends on how many updates are planned, so a run from the start would be the same.
    """
    from o2o.report.suite import status_of
    from o2o.runs.folder import RunFolder

    if job.state != "missing" or (status_of(shorter) or {}).get("status") != "finished":
        return
    part = job.run.with_name(f".{job.run.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(shorter, part)
    folder = RunFolder.open(part)
    folder.change(offline_steps=job.cell.offline_steps)
    folder.status("stopped")
    job.record.write_text(json.dumps(dataclasses.asdict(job.cell), indent=2) + "\n")
    part.rename(job.run)


def plan(updates: Sequence[int]) -> Iterator[tuple[int, str, str]]:
    """Yield updates, method and task of every cell, in the order in which they are wanted."""
    for count in updates:
        for task in TASKS:
            for label in METHODS:
                yield count, label, task


class Cells:
    """The cells that run at the same time, each in a process of its own that writes a log."""

    def __init__(self, args: argparse.Namespace, whole: bool) -> None:
        """Take the arguments of `cells`."""
        self.args, self.whole, self.failed = args, whole, 0
        self.running: dict[tuple[int, str, str], subprocess.Popen[bytes]] = {}
        self.done: set[tuple[int, str, str]] = set()
        self.waiting = list(plan((50_000, *LONGER)))
        if args.smoke:  # two of them show that a second task and more updates work
            self.waiting = [*self.waiting[: len(METHODS) + 1], (100_000, METHODS[0], TASKS[0])]

    def log(self, key: tuple[int, str, str]) -> Path:
        """Return the log of a cell."""
        return self.args.out / "logs" / f"{key[1]}-{TASKS.index(key[2]) + 1}-{key[0] // 1000}k.log"

    def start(self) -> bool:
        """Start the next cell that can begin; return whether there was one."""
        for key in self.waiting:
            shorter = [other for other in plan((50_000, *LONGER)) if other[1:] == key[1:] and other[0] < key[0]]
            if shorter and shorter[-1] not in self.done:
                continue
            self.waiting.remove(key)
            about = {"updates": key[0], "label": key[1], "task": key[2], "whole": self.whole, "smoke": self.args.smoke}
            about |= {"first": self.args.first_seed, "seeds": self.args.seeds, "out": str(self.args.out)}
            about |= {"before": shorter[-1][0] if shorter else None}
            self.log(key).parent.mkdir(parents=True, exist_ok=True)
            with self.log(key).open("ab") as log:
                command = [sys.executable, str(Path(__file__).resolve()), "one", json.dumps(about)]
                self.running[key] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            return True
        return False

    def look(self) -> None:
        """Take note of the cells that have ended."""
        for key, process in list(self.running.items()):
            if (code := process.poll()) is None:
                continue
            del self.running[key]
            name = self.log(key).stem
            if code == 0:
                self.done.add(key)
                print(f"{name}: finished", flush=True)
            else:
                self.failed = 1
                said = self.log(key).read_text(errors="replace").strip().splitlines()[-LAST_WORDS:]
                print(f"{name}: not finished ({code})", *said, sep="\n    ", flush=True)

    def work(self, until: float) -> None:
        """Run what there is until the time is over; then let everything save."""
        while time.monotonic() < until - SAVE_S and (self.running or self.waiting):
            while len(self.running) < self.args.workers and self.start():
                pass
            if not self.running:
                break
            time.sleep(POLL_S)
            self.look()
        for process in self.running.values():
            process.terminate()
        while self.running and time.monotonic() < until - END_S:
            time.sleep(POLL_S)
            self.look()
        for process in self.running.values():
            process.kill()
            process.wait()
        self.look()


def run_cells(args: argparse.Namespace) -> int:
    """Run the cells until the time is over, then write the reports; return the exit code."""
    until, episodes = time.monotonic() + args.seconds, made(args.root)
    if not episodes:
        print(f"{args.root} has no {SCENE}: nothing to learn from", flush=True)
        return 1
    whole = episodes >= WHOLE
    os.environ["MINARI_DATASETS_PATH"] = str(args.root)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"set": SCENE, "episodes": episodes, "episodes_of_authors": WHOLE, "seeds": args.seeds}
    (args.out / "data.json").write_text(json.dumps(about, indent=2) + "\n")
    cells = Cells(args, whole)
    cells.work(until)
    return cells.failed


def report(args: argparse.Namespace) -> int:
    """Write the report of every suite that has rows."""
    from o2o.report.suite_report import write_report

    for count in (50_000, *LONGER):
        for whole in (True, False):
            suite = suite_of(count, whole, args.smoke)
            if (args.out / suite.name / "scores.csv").exists():
                suite = dataclasses.replace(suite, seeds=args.seeds)
                print(f"wrote {write_report(suite, args.out)}", flush=True)
    return 0


def take(folder: Path, into: Path = HERE / "results") -> int:
    """Add the finished cells of a folder of results to `into`, in place of what it has of the same seeds."""
    from o2o.report import scores

    for source in sorted(path.parent for path in folder.glob(f"*/{scores.CELLS}")):
        target, new, rows = into / source.name, scores.read_cells(source), scores.read_scores(source)
        taken = {(*cell.method, seed) for cell in new for seed in range(cell.seeds[0], cell.seeds[1] + 1)}
        of_cell = lambda cell: {(*cell.method, seed) for seed in range(cell.seeds[0], cell.seeds[1] + 1)}  # noqa: E731
        kept = [cell for cell in scores.read_cells(target) if not taken & of_cell(cell)]
        there = {key for cell in kept for key in of_cell(cell)}
        old = [row for row in scores.read_scores(target) if (row["dataset"], row["method"], row["seed"]) in there]
        target.mkdir(parents=True, exist_ok=True)
        scores.write(target, [*kept, *new], [*old, *rows])
        print(f"{target}: {len(new)} cells taken; now `o2o bench report {source.name}`", flush=True)
    return 0


def one(about: dict[str, Any]) -> int:
    """Run one cell in this process; return the exit code."""
    from o2o.startup import prepare_process

    prepare_process()
    suite = suite_of(about["updates"], about["whole"], about["smoke"])
    cell = cell_of(suite, about["label"], about["task"], about["first"], about["seeds"])
    before = suite_of(about["before"], about["whole"], about["smoke"]).name if about["before"] else None
    return run_cell(suite, cell, Path(about["out"]), before)


def main(args: list[str]) -> int:
    """Do what the arguments say; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data, cells = commands.add_parser("data"), commands.add_parser("cells")
    reports, taking, single = commands.add_parser("report"), commands.add_parser("take"), commands.add_parser("one")
    for each in (data, cells):
        each.add_argument("--root", type=Path, required=True)
        each.add_argument("--seconds", type=float, required=True)
    data.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    cells.add_argument("--workers", type=int, default=6, help="cells that learn at the same time")
    cells.add_argument("--first-seed", type=int, default=1, help="seed 0 is what a CPU has time for")
    for each in (cells, reports):
        each.add_argument("--out", type=Path, required=True)
        each.add_argument("--seeds", type=int, default=2, help="seeds side by side in one program")
    for each in (data, cells, reports):
        each.add_argument("--smoke", action="store_true")
    taking.add_argument("folder", type=Path)
    single.add_argument("about", type=json.loads)
    given = parser.parse_args(args)
    if given.command == "data":
        return make_data(given.root.absolute(), given.seconds, given.processes, given.smoke)
    if given.command == "take":
        return take(given.folder)
    if given.command == "one":
        return one(given.about)
    given.out = given.out.absolute()
    return report(given) if given.command == "report" else run_cells(given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
