"""Run folders: settings, what is known of the dataset, rows of metrics and episodes, `status.json`, `checkpoints/`.

A run that was killed continues from its last checkpoint. Rows written after it are cut off and written again, the same.
A run that gets a signal (SIGINT, SIGTERM, SIGHUP) saves a checkpoint and stops.
"""

import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from o2o import __version__
from o2o.config import FORMAT
from o2o.data.datasets import Dataset
from o2o.errors import CheckpointError, ConfigError, DivergenceError, EnvironmentFaultError, RunError
from o2o.files import JsonLines, write_atomically
from o2o.replay.buffer import capacity_for
from o2o.train import checkpoint
from o2o.train.trainer import Trainer

_log = logging.getLogger(__name__)

REPLAY = "replay"
"""Folder in a run folder for the rows of a replay on disk."""
DATASET = "dataset.json"
"""File in a run folder: all that is known of its dataset but the rows, so that its policies act without it."""
HANG_UP: int | None = getattr(signal, "SIGHUP", None)
"""The signal of a closed terminal or ssh session; None on systems without it."""


class StopFlag:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a flag that loops read. A second SIGINT interrupts at once.

    If SIGHUP is ignored already (nohup), it stays ignored.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self.seen = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers. Outside the main thread this does nothing and the flag stays False."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
            if HANG_UP is not None and signal.getsignal(HANG_UP) is not signal.SIG_IGN:
                self._old[HANG_UP] = signal.signal(HANG_UP, self._handle)
        except ValueError:
            self._old = {}
        return self

    def _handle(self, number: int, _: Any) -> None:
        if self.seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = number

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        return bool(self.seen)


def _commit() -> str:
    """Return the commit of this checkout, with `-dirty` if files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """Return the versions that a result depends on; in a checkout of o2o also its commit."""
    names = ("jax", "flax", "optax", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} x {os.cpu_count()}"}
    found["o2o"] = __version__
    if commit := _commit():
        found["commit"] = commit
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path, keep_last: int = 2) -> None:
        """Open `path`, an existing run folder."""
        self.path, self.keep_last = path, keep_last
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.episodes = JsonLines(path / "episodes.jsonl")
        # no soft lock where the file system has none: its file would outlive a kill and block the resume
        self._lock = FileLock(path / "lock", thread_local=False, fallback_to_soft=False)

    def lock(self) -> Self:
        """Keep other processes from training this run until `close`; raises `RunError` if one trains it now.

        On a file system without locks this does nothing.
        """
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            self.close()
            raise RunError(
                f"run {self.path} is being trained by another process; wait for its end, or stop it with Ctrl-C there"
            ) from error
        except PermissionError as error:
            raise RunError(f"cannot write {self._lock.lock_file}: {error.strerror}") from error
        except OSError as error:
            _log.info("no lock on %s: %s", self.path, error)
        return self

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], keep_last: int = 2) -> Self:
        """Make a new run folder. Raises `RunError` if it exists with files in it, or cannot be written."""
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file, where a run needs a folder: choose another --name")
        if path.exists() and any(path.iterdir()):
            raise RunError(
                f"run folder {path} exists already: continue it with `o2o resume {path}`, or choose another --name"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            about = {"format": FORMAT, **config, "versions": versions()}
            write_atomically(path / "config.json", json.dumps(about, indent=2) + "\n")
            run = cls(path, keep_last)
            for rows in (run.metrics, run.episodes):
                rows.path.touch()
        except OSError as error:
            raise RunError(f"cannot write run folder {path}: {error.strerror}") from error
        return run

    @classmethod
    def open(cls, path: Path, keep_last: int = 2) -> Self:
        """Open a run folder. Raises `RunError` if there is none, or if its format is not `FORMAT`."""
        read_config(path)
        return cls(path, keep_last)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def saved(self) -> bool:
        """Whether there is a checkpoint."""
        return bool(checkpoint.steps(self.checkpoints))

    @property
    def online(self) -> bool:
        """Whether the latest checkpoint is one of the online phase."""
        return self.saved and checkpoint.load_state(self.checkpoints)[1]["counters"]["phase"] == "online"

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint of the whole run, with the current lengths of the row files; sync all files to disk."""
        (arrays, state), counters = trainer.save(), trainer.counters  # save() may write the rows of an evaluation
        state["files"] = {"metrics": self.metrics.offset(), "episodes": self.episodes.offset()}
        trainer.replay.sync()
        score = counters.score if counters.scored_at == counters.point else None  # an older score is of another policy
        checkpoint.save(self.checkpoints, counters.point, arrays, state, score, self.keep_last)

    def scored(self, step: int, score: float) -> None:
        """Add the score of an evaluation to checkpoint `step`, which was saved before the evaluation ended."""
        try:
            checkpoint.add_score(self.checkpoints, step, score)
        except CheckpointError as error:  # the run can go on without it
            _log.warning("%s", error)

    def load(self, trainer: Trainer, online_steps: int, step: int | None = None, go_on: bool = True) -> int:
        """Restore `trainer` from checkpoint `step` (None: the latest) and return its step.

        With `go_on`, training will continue: rows written after the checkpoint are cut off. If an unfinished run has no
        checkpoint, all rows are cut off, `trainer` stays new and the result is 0. Without `go_on`, no row is cut and no
        environment is made or moved.
        """
        if go_on and not self.saved and read_status(self.path) != "finished":
            shutil.rmtree(self.path / REPLAY, ignore_errors=True)
            self.metrics.truncate(0)
            self.episodes.truncate(0)
            return 0
        step, state, _ = checkpoint.load_state(self.checkpoints, step)
        if go_on and state["counters"]["phase"] == "offline":  # rows of an online phase that will start again
            shutil.rmtree(self.path / REPLAY, ignore_errors=True)
        load = lambda targets: checkpoint.load_arrays(self.checkpoints, step, targets)  # noqa: E731
        trainer.load(state, load, online_steps, play=go_on)
        if go_on:
            self.metrics.truncate(state["files"]["metrics"])
            self.episodes.truncate(state["files"]["episodes"])
        return step

    def check_steps(self, online_steps: int, replay_capacity: int) -> None:
        """Raise `ConfigError` if the run cannot continue from its latest checkpoint to `online_steps`."""
        if not self.saved:
            return
        state = checkpoint.load_state(self.checkpoints)[1]
        replay = state.get("replay", {})
        made, planned = state["counters"]["env_steps"], replay.get("planned")
        if online_steps < made:
            raise ConfigError(
                f"run {self.path} has made {made} environment steps; give online_steps of at least {made}"
            )
        short = planned and capacity_for(planned, replay_capacity) < capacity_for(online_steps, replay_capacity)
        if replay.get("kind") == "host" and short:
            raise ConfigError(
                f"run {self.path} was begun for {planned} environment steps, and its replay, which is on disk "
                f"({self.path / REPLAY}), cannot grow to {online_steps}: go on without --online-steps, or begin a "
                "new run for as many"
            )

    def describe(self, data: Dataset, rate: float | None) -> None:
        """Keep what acting needs of the dataset, and the environment's steps per second if they are known."""
        text = json.dumps({"rate": rate, "dataset": data.to_json()}, indent=2)
        write_atomically(self.path / DATASET, text + "\n")

    def change(self, **settings: Any) -> None:
        """Change settings in `config.json`, atomically."""
        write_atomically(self.path / "config.json", json.dumps({**read_config(self.path), **settings}, indent=2) + "\n")

    def status(self, value: str, **extra: Any) -> None:
        """Write `status.json` atomically: running, finished, stopped or failed."""
        write_atomically(self.path / "status.json", json.dumps({"status": value, **extra}) + "\n")

    def close(self) -> None:
        """Close the row files and release the lock."""
        self.metrics.close()
        self.episodes.close()
        self._lock.release()


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's config.json. Raises `RunError` if `path` is no run folder or its format is not `FORMAT`."""
    try:
        values = json.loads((path / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        near = sorted(p.parent.name for p in path.parent.glob("*/config.json")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near[:5])}" if near else ""
        raise RunError(f"{path} is no run folder: it has no config.json{hint}") from None
    except OSError as error:
        raise RunError(f"{path / 'config.json'} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise RunError(
            f"{path / 'config.json'} is not valid JSON (line {error.lineno}): restore it from a copy"
        ) from error
    if not isinstance(values, dict):
        raise RunError(f"{path / 'config.json'} holds no JSON object: restore it from a copy")
    if values.get("format") != FORMAT:
        made = values.get("versions") or {}
        by = f"o2o {made.get('o2o', 'of an older version')}" + (f" ({made['commit']})" if "commit" in made else "")
        raise RunError(
            f"run {path} was made by {by} in format {values.get('format', 1)}, but o2o {__version__} opens format "
            f"{FORMAT} only: use that version for it, or train the run again"
        )
    return values


def read_status(path: Path) -> str | None:
    """Return the status of a run folder; None if it never started."""
    try:
        return json.loads((path / "status.json").read_text())["status"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None


def guarded(run: RunFolder, trainer: Trainer, work: Callable[[], bool]) -> bool:
    """Do `work` and write the run's status: finished, stopped by a signal, or failed.

    If `work` fails, a checkpoint is saved if that is possible, and the exception is raised again. A full disk raises
    `RunError`.
    """
    run.status("running", pid=os.getpid())
    try:
        finished = work()
    except KeyboardInterrupt:
        run.status("stopped")
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk may have no room for the status
            run.status("failed", error=f"{type(error).__name__}: {error}")
        if isinstance(error, CheckpointError | DivergenceError):
            raise  # saving failed, or the state is of no use
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunError(
                f"no space left on the disk of {run.path}: free some and go on with `o2o resume {run.path}`"
            ) from error
        with contextlib.suppress(Exception):  # save even if an evaluation in progress fails too
            trainer.take_evaluations(wait=True)
        try:
            run.save(trainer)
            if isinstance(error, EnvironmentFaultError):
                error.args = (f"{error}; the run is saved, go on with `o2o resume {run.path}`",)
        except Exception as second:
            _log.warning("the state could not be saved either: %s", second)
        raise
    run.status("finished" if finished else "stopped")
    return finished
