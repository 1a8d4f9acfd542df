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
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from o2o import __version__
from o2o.config import FORMAT
from o2o.data.datasets import Dataset
from o2o.errors import BusyError, CheckpointError, ConfigError, DivergenceError, EnvironmentFaultError, RunError
from o2o.files import JsonLines, read_object, write_atomically
from o2o.replay.buffer import capacity_for
from o2o.train import checkpoint
from o2o.train.trainer import Trainer

_log = logging.getLogger(__name__)

LOCK = "lock"
"""File in a run folder that is locked while the run is trained."""
REPLAY = "replay"
"""Folder in a run folder for the rows of a replay on disk."""
NAME_BYTES, PATH_BYTES = 200, 3000
"""Longest name of a folder, longest path of a run folder. File systems take 255 and 4096, files inside need some."""
DATASET = "dataset.json"
"""File in a run folder: all that is known of its dataset but the rows, so that its policies act without it."""
FREE_S = 120.0
"""Longest wait for a process of a dead node to let go of its run."""
HANG_UP: int | None = getattr(signal, "SIGHUP", None)
"""The signal of a closed terminal or ssh session; None on systems without it."""


class StopFlag:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a flag that loops read. A second SIGINT interrupts at once.

    If SIGHUP is ignored already (nohup), it stays ignored. Whatever handlers environments install (simulators and
    robots' drivers do), reading the flag puts these back.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self.seen = 0
        self.forced = False
        """Whether a second SIGINT came: nothing more is to be saved."""
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
            self.forced = True
            raise KeyboardInterrupt
        self.seen = number

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        old, self._old = self._old, {}
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed by C code

    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        for number in self._old:
            signal.signal(number, self._handle)
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
        self.path, self.keep_last = path.absolute(), keep_last  # an environment may change the working folder
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.episodes = JsonLines(self.path / "episodes.jsonl")
        # no soft lock where the file system has none: its file would outlive a kill and block the resume
        self._lock = FileLock(self.path / LOCK, thread_local=False, fallback_to_soft=False)
        self._held: int | None = None
        """Descriptor of the folder, which is locked as well: whoever deletes the lock's file unlocks nothing."""

    def lock(self) -> Self:
        """Keep other processes from training this run until `close`; raises `BusyError` if one trains it now.

        On a file system without locks this does nothing. A second call changes nothing.
        """
        if self._held is not None or self._lock.is_locked:
            return self
        try:
            self._lock.acquire(blocking=False)
            if os.name == "posix":
                self._hold()
        except (Timeout, BlockingIOError) as error:
            self.close()
            raise BusyError(
                f"run {self.path} is being trained by another process; wait for its end, or stop it with Ctrl-C there"
            ) from error
        except PermissionError as error:
            raise RunError(f"cannot write {self._lock.lock_file}: {error.strerror}") from error
        except OSError as error:
            if error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR):
                raise RunError(f"cannot write {self._lock.lock_file}: {error.strerror}") from error
            _log.info("no lock on %s: %s", self.path, error)
        return self

    def _hold(self) -> None:
        import fcntl

        self._held = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some file systems know locks of files only
            _log.info("no lock on the folder %s: %s", self.path, error)

    def _check_place(self) -> None:
        """Raise `RunError` if the folder was deleted, or replaced by another, while the run was training in it."""
        if self._held is None:
            return
        try:
            same = os.path.samestat(os.fstat(self._held), self.path.stat())
        except OSError:
            same = False
        if not same:
            raise RunError(f"run folder {self.path} was moved, deleted or replaced meanwhile: nothing more is saved")

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], keep_last: int = 2) -> Self:
        """Make a new run folder, locked: of several processes one gets the name.

        Raises `RunError` if there are files in it, another process makes it, or it cannot be written.
        """
        check_path(path)
        try:
            if path.exists() and not path.is_dir():
                raise RunError(f"{path} is a file, where a run needs a folder: choose another `name`")
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, keep_last)
            try:
                run.lock()
                if any(entry.name != LOCK for entry in path.iterdir()):
                    raise RunError(
                        f"run folder {path} exists already: continue it with `o2o resume {path}`, or choose another "
                        "`name`"
                    )
                about = {"format": FORMAT, **config, "versions": versions()}
                write_atomically(path / "config.json", json.dumps(about, indent=2) + "\n")
                for rows in (run.metrics, run.episodes):
                    rows.path.touch()
            except BaseException:
                run.close()
                raise
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
        """Whether there is a checkpoint. Raises `CheckpointError` if all of them are damaged."""
        return checkpoint.latest_sound(self.checkpoints) is not None

    @property
    def online(self) -> bool:
        """Whether the latest checkpoint is one of the online phase."""
        return self.saved and checkpoint.load_state(self.checkpoints)[1]["counters"]["phase"] == "online"

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint of the whole run, with the current lengths of the row files; sync all files to disk."""
        self._check_place()
        trainer.check_finite()
        (arrays, state), counters = trainer.save(), trainer.counters  # save() may write the rows of an evaluation
        files = {"metrics": self.metrics, "episodes": self.episodes}
        state["files"] = {name: rows.offset() for name, rows in files.items()}
        state["rows"] = {name: rows.rows() for name, rows in files.items()}
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

        With `go_on`, training will continue: rows written after the checkpoint are cut off, and damaged checkpoints
        after it are put aside. If an unfinished run has no checkpoint, all rows are cut off, `trainer` stays new and
        the result is 0. Without `go_on`, no row is cut and no environment is made or moved.
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
            rows = state.get("rows", {})
            self.metrics.truncate(state["files"]["metrics"], rows.get("metrics"))
            self.episodes.truncate(state["files"]["episodes"], rows.get("episodes"))
            checkpoint.set_aside(self.checkpoints, step)
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
                f"({self.path / REPLAY}), cannot grow to {online_steps}: go on without `online_steps`, or begin a "
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
        """Write `status.json` atomically: running, finished, stopped or failed. On a full disk it is written over."""
        path, text = self.path / "status.json", json.dumps({"status": value, **extra}) + "\n"
        try:
            write_atomically(path, text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
                raise
            with path.open("r+b", buffering=0) as file:  # its block is there already
                file.write(text.encode()[:4096])
                file.truncate()

    def close(self) -> None:
        """Close the row files and release the lock."""
        self.metrics.close()
        self.episodes.close()
        self._lock.release()
        if self._held is not None:
            os.close(self._held)
            self._held = None


def wait_until_free(run: Path, longest_s: float = FREE_S) -> None:
    """Wait until no process trains in a run folder. Raises `BusyError` if one still does after `longest_s`."""
    end = time.monotonic() + longest_s
    while (run / "config.json").exists():
        try:
            RunFolder(run).lock().close()
            return
        except BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def check_name(name: str) -> None:
    """Raise `ConfigError` unless `name` stays inside the folder of runs (`a/b` does) and a folder can have it."""
    parts = Path(name).parts
    if not name.strip() or name != name.strip() or Path(name).is_absolute() or {"..", "~"} & {*parts} or not parts:
        raise ConfigError(f"the run's name {name!r} leaves the folder of runs, or is none: give one like my-run")
    check_path(Path(name))


def check_path(path: Path) -> None:
    """Raise `ConfigError` for a path that no run folder can have: too long, or with characters that print wrong."""
    text = str(path)
    if not text.isprintable():
        raise ConfigError(f"the run folder {text!r} has characters that cannot be printed: choose another name")
    longest = max(path.parts, key=lambda part: len(os.fsencode(part)), default="")
    if len(os.fsencode(longest)) > NAME_BYTES or len(os.fsencode(path.absolute())) > PATH_BYTES:
        raise ConfigError(
            f"the run folder {text[:60]}... is too long: at most {NAME_BYTES} bytes for a name and {PATH_BYTES} for "
            "the whole path"
        )


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's config.json. Raises `RunError` if `path` is no run folder or its format is not `FORMAT`."""
    try:
        there = (path / "config.json").exists()
    except OSError as error:
        raise RunError(f"{path / 'config.json'} cannot be read: {error.strerror}") from error
    if not there:
        near = sorted(p.parent.name for p in path.parent.glob("*/config.json")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near[:5])}" if near else ""
        raise RunError(f"{path} is no run folder: it has no config.json{hint}")
    values = read_object(path / "config.json")
    if values.get("format") != FORMAT:
        made = values.get("versions")
        made = made if isinstance(made, dict) else {}
        by = f"o2o {made.get('o2o', 'of an older version')}" + (f" ({made['commit']})" if "commit" in made else "")
        raise RunError(
            f"run {path} was made by {by} in format {values.get('format', 1)}, but o2o {__version__} opens format "
            f"{FORMAT} only: use that version for it, or train the run again"
        )
    return values


def tell_if_died(path: Path) -> None:
    """Log a warning if the process that trained the run in `path` ended without a word: nobody holds its lock."""
    if read_status(path) != "running" or os.name != "posix":
        return
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:  # it is trained now, or nobody can tell
        return
    _log.warning(
        "the process that trained run %s ended without a word (a kill, a power cut, an environment that ends it): what "
        "followed its last checkpoint is lost; `o2o resume` goes on from there",
        path,
    )


def read_status(path: Path) -> str | None:
    """Return the status of a run folder; None if it never started or its status.json says none."""
    try:
        value = read_object(path / "status.json").get("status")
    except RunError:
        return None
    return value if isinstance(value, str) else None


def guarded(
    run: RunFolder, trainer: Trainer, work: Callable[[], bool], forced: Callable[[], bool] = lambda: False
) -> bool:
    """Do `work` and write the run's status: finished, stopped by a signal, or failed.

    If `work` fails, a checkpoint is saved if that is possible, and the exception is raised again. The end of the
    process that an environment asks for (`sys.exit`) is such a failure, raised as `EnvironmentFaultError`; a
    KeyboardInterrupt is a stop, unless it is `forced`, which saves nothing. A full disk raises `RunError`.
    """
    run.status("running", pid=os.getpid(), host=socket.gethostname())
    try:
        finished = work()
    except KeyboardInterrupt:
        if forced():
            run.status("stopped")
            raise
        finished = False  # an environment that has taken Ctrl-C for itself raises this in its step
        _save_what_is(run, trainer)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk may have no room for the status
            run.status("failed", error=f"{type(error).__name__}: {error}")
        if isinstance(error, CheckpointError | DivergenceError):
            raise  # saving failed, or the state is of no use
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunError(
                f"no space left on the disk of {run.path}: free some and go on with `o2o resume {run.path}`"
            ) from error
        saved = _save_what_is(run, trainer)
        after = f"; the run is saved, go on with `o2o resume {run.path}`" if saved else ""
        if isinstance(error, EnvironmentFaultError):
            error.args = (f"{error}{after}",)
        if isinstance(error, Exception):
            raise
        raise EnvironmentFaultError(
            f"the environment, or a policy that acts in it, ended the process ({type(error).__name__}: {error}){after}"
        ) from error
    run.status("finished" if finished else "stopped")
    return finished


def _save_what_is(run: RunFolder, trainer: Trainer) -> bool:
    """Save the run after a failure; whether that was possible."""
    with contextlib.suppress(Exception):  # save even if an evaluation in progress fails too
        trainer.take_evaluations(wait=True)
    try:
        run.save(trainer)
    except Exception as second:
        _log.warning("the state could not be saved either: %s", second)
        return False
    return True
