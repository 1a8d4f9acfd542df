"""Cells of a suite as tasks of Ray: one task per cell, on this machine or on a cluster.

A task gets the CPU cores, GPUs and memory that were asked for. When its worker or its node dies, Ray starts it again
elsewhere, and it goes on from the run's last checkpoint. Runs and results lie in a folder that all nodes see, or at an
address (`o2o.runs.store`).
"""

import importlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from o2o.errors import ConfigError, O2OError, RunError
from o2o.files import cache_dir, read_rows
from o2o.report.jobs import BackEnd, Ended, Job, attempt, failed
from o2o.report.suite import status_of
from o2o.settings import Amount, NotNegative, Range, Settings
from o2o.startup import prepare_process

if TYPE_CHECKING:
    from o2o.runs.store import Store

HERE = "local"
"""Address that means: start Ray on this machine."""
STORE_BYTES = 100_000_000
"""Object store of a Ray that is started here: cells pass files, not objects."""
ANSWER_S = 5.0
"""Longest wait for an address to answer."""
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""An empty frame of settings: its length, its type (4), flags and stream."""
LOOK_S = 15.0
"""Seconds between two looks at how far cells are whose runs are at an address."""
STOP_S = 60.0
"""Longest wait for cells to save when the command is interrupted."""
PASSED = ("JAX_", "XLA_", "O2O_", "MINARI_", "MUJOCO_", "OPENBLAS_", "WANDB_", "PYTHONPATH")
"""Beginnings of the names of environment variables that tasks get from who started them."""


@dataclass(frozen=True)
class Resources(Settings):
    """What a cell is given."""

    cpus: Annotated[float, Range(above=0)] = 1.0
    """CPU cores."""
    gpus: NotNegative = 0.0
    """GPUs; 0.5: two cells share one."""
    memory_gb: NotNegative = 0.0
    """Memory in GiB that a node must have free; 0: not looked at."""
    retries: Amount = 3
    """How often a cell begins again, from its last checkpoint, after its worker or node died."""

    def options(self) -> dict[str, Any]:
        """Return the options of Ray's remote function; a process does one cell, which frees its memory for certain."""
        memory = {"memory": int(self.memory_gb * 2**30)} if self.memory_gb else {}
        given = {"num_cpus": self.cpus, "num_gpus": self.gpus, **memory}
        return {**given, "max_retries": self.retries, "retry_exceptions": [Preempted], "max_calls": 1}


class Preempted(Exception):
    """A cell was stopped by a signal that its node got, not by who started the suite: Ray begins it again."""


def on_ray(
    address: str | None,
    needs: Resources,
    say: Callable[[str], None],
    console: Console | None = None,
    store: "Store | None" = None,
) -> BackEnd:
    """Return the back end that works on cells as tasks of the Ray at `address`, host:port; runs go through `store`.

    None: the address in RAY_ADDRESS; without one, Ray is started on this machine. On a terminal `console` a table shows
    where cells stand and the time left. Raises `ConfigError` without Ray, or if nobody answers.
    """
    ray = _ray()
    place = address or os.environ.get("RAY_ADDRESS") or HERE
    if place != "auto" and place != HERE:
        check_answers(place)

    def work(todo: Sequence[Job]) -> Iterator[Ended]:
        began_here = not ray.is_initialized()
        if began_here:
            _connect(ray, place)
        try:
            _tell_if_too_large(ray, needs, say)
            yield from _work_on(ray, todo, needs, say, console, store)
        finally:
            if began_here:
                ray.shutdown()

    return work


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"`where` is ray, and Ray cannot be imported ({error}): pip install 'o2o[ray]'") from error


def check_answers(address: str, longest_s: float = ANSWER_S) -> None:
    """Raise `ConfigError` unless a server of Ray's protocol is at `address`, host:port or ray://host:port.

    Ray itself tries for minutes. It speaks HTTP/2 (RFC 9113), whose servers answer a client's first bytes with a frame
    of settings.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"the address of Ray is {address!r}; expected host:port, such as 10.0.0.1:6379, or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), longest_s) as server:
            server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS)
            speaks = os.environ.get("RAY_USE_TLS", "0") != "0" or server.recv(len(SETTINGS))[3:4] == SETTINGS[3:4]
    except OSError as error:
        raise ConfigError(
            f"nobody answers at the address of Ray, {address} ({error}): begin a cluster there with "
            f"`ray start --head --port {port}`, or leave `ray` and RAY_ADDRESS out for this machine alone"
        ) from error
    if not speaks:
        raise ConfigError(
            f"what answers at the address of Ray, {address}, is no Ray: give the address of its head node"
        )


def _connect(ray: Any, place: str) -> None:
    own = {"num_cpus": os.cpu_count(), "object_store_memory": STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(address=place, log_to_driver=False, logging_level="error", **(own if place == HERE else {}))
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise ConfigError(f"no Ray at {place}: {' '.join(str(error).split())}") from error


def _tell_if_too_large(ray: Any, needs: Resources, say: Callable[[str], None]) -> None:
    """Say so if no node has what a cell needs; a cluster may grow."""
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory_gb * 2**30}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        text = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        say(f"no node of the {len(nodes)} has {text}, which a cell needs: cells wait until one joins")


def _work_on(
    ray: Any,
    todo: Sequence[Job],
    needs: Resources,
    say: Callable[[str], None],
    console: Console | None,
    store: "Store | None",
) -> Iterator[Ended]:
    about, environment = _about(), {"env_vars": _passed()}
    remote = ray.remote(**needs.options(), runtime_env=environment)(_work)
    refs: dict[Any, Job] = {}
    for job in todo:
        first = [ref for ref, other in refs.items() if job.cell.needs(other.cell)]
        refs[remote.remote(job, about, str(Path.cwd()), store, *first)] = job
    board, waiting, looked = Board(todo), dict(refs), time.monotonic()
    shown = (
        Live(console=console, get_renderable=board, refresh_per_second=0.5)
        if console and console.is_terminal
        else nullcontext()
    )
    try:
        with shown:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=1.0)
                for ref in done:
                    job = waiting.pop(ref)
                    yield _end_of(ray, ref, job, store)
                if store and time.monotonic() - looked > LOOK_S:
                    for job in waiting.values():
                        store.fetch(job)
                    looked = time.monotonic()
    except KeyboardInterrupt:
        say("interrupted: the cells save and stop; the same command goes on from here")
    finally:
        for ref in waiting:
            ray.cancel(ref)  # a signal to the cell, which saves
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=STOP_S)


def _end_of(ray: Any, ref: Any, job: Job, store: "Store | None") -> Ended:
    try:
        ended = ray.get(ref)
        if store:
            store.fetch(job)
    except ray.exceptions.RayError as error:
        return failed(job, RunError(f"Ray gave the cell up ({type(error).__name__}: {error})"))
    status = (status_of(job.run) or {}).get("status")
    if not ended.error and status != "finished":
        lost = f"a node has done the cell, and {job.run} says {status}: is the folder the same on all nodes?"
        return failed(job, RunError(lost))
    return ended


def _passed() -> dict[str, str]:
    """Return the environment variables of tasks; compiled programs go to a place of each node's own."""
    found = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    if found.get("JAX_COMPILATION_CACHE_DIR", "").startswith(str(cache_dir())):
        del found["JAX_COMPILATION_CACHE_DIR"]
    return found


def _about() -> dict[str, str]:
    from o2o.runs.folder import versions

    return versions()


def _work(job: Job, about: Mapping[str, str], folder: str, store: "Store | None" = None, *_: Any) -> Ended:
    """Work on a cell, on whichever node this is; the last arguments are the cells that had to come first."""
    if os.path.isdir(folder):
        os.chdir(folder)
    prepare_process()
    from o2o.runs import session
    from o2o.runs.folder import wait_until_free

    train = lambda cell, path: session.train(session.cell_run(cell, path), path, quiet=True)  # noqa: E731
    resume = lambda path: session.resume(path, quiet=True)  # noqa: E731
    try:
        check_versions(about, _about())
        if not store and not job.record.exists():
            raise RunError(
                f"node {socket.gethostname()} does not see {job.record.parent}: give a folder that all nodes share, "
                "with `out`, or an address, with `store`"
            )
        if not store:
            wait_until_free(job.run)
    except O2OError as error:
        return failed(job, error)
    if store:
        ended, status = store.attempt(job, train, resume)
    else:
        ended = attempt(job, train, resume)
        status = (status_of(job.run) or {}).get("status")
    if not ended.error and status == "stopped":
        raise Preempted(job.cell.name)
    return ended


def check_versions(wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise `ConfigError` if what this node has of o2o and JAX differs from what who started the suite has."""
    names = [name for name in ("o2o", "commit", "jax") if name in wanted and name in found]
    if other := [name for name in names if wanted[name] != found[name]]:
        text = ", ".join(f"{name} {found[name]} for {wanted[name]}" for name in other)
        raise ConfigError(f"node {socket.gethostname()} has other versions: {text}; install the same on all nodes")


class Board:
    """The live table: which cells are being worked on, how far they are, and the time left."""

    def __init__(self, todo: Sequence[Job]) -> None:
        self.todo, self.began = todo, time.monotonic()
        self.before = sum(map(share_done, todo))

    def __call__(self) -> Group:
        """Return the table as it is now."""
        table, count = Table(), dict.fromkeys(("finished", "running", "failed"), 0)
        for column in ("cell", "node", "done"):
            table.add_column(column, overflow="fold")
        shares, missing = [share_done(job) for job in self.todo], 0.0
        for job, share in zip(self.todo, shares, strict=True):
            status = status_of(job.run) or {}
            state = str(status.get("status"))
            if job.failure.exists():
                count["failed"] += 1
                continue
            missing += 1 - share
            if state in count and state != "failed":  # one that failed before waits for its turn
                count[state] += 1
            if state == "running":
                table.add_row(job.cell.name, str(status.get("host", "")), f"{100 * share:.0f} %")
        rest = len(shares) - sum(count.values())
        left = time_left(time.monotonic() - self.began, sum(shares) - self.before, missing)
        words = ", ".join(f"{number} {state}" for state, number in {**count, "waiting": rest}.items())
        clock = "" if left is None else f"; about {timedelta(seconds=round(left))} left"
        return Group(table, Text(words + clock))


def time_left(elapsed_s: float, done: float, missing: float) -> float | None:
    """Return the seconds for the `missing` cells if those `done` took `elapsed_s`; None if it is too early to say."""
    return elapsed_s * missing / done if done > 0 else None


def share_done(job: Job) -> float:
    """Return which part of a cell's steps has been made, 0 to 1, by the last row of its metrics."""
    if (status_of(job.run) or {}).get("status") == "finished":
        return 1.0
    path, whole = job.run / "metrics.jsonl", job.cell.offline_steps + job.cell.online_steps
    rows = read_rows(path)[-1:] if path.exists() else []
    made = sum(min(row.get("gradient_steps", 0), job.cell.offline_steps) + row.get("env_steps", 0) for row in rows)
    return min(made / max(whole, 1), 1.0)
