"""Results and runs of cells at an address of fsspec, such as s3://bucket/tried: for machines that share no folder.

A cell is trained in a scratch folder of the machine that does it. Its run goes to the address after every checkpoint
and at its end. Whoever does the cell next takes it from there. A run is whole there once its list of files is: the list
is written last, and files that no list names any more are removed after it. The layout is that of a folder of results:
`<suite>/` with the scores, `runs/<suite>/<cell>/` and `<cell>.json`.
"""

import contextlib
import json
import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from o2o.errors import ConfigError, RunError
from o2o.files import cache_dir, whole_folder, write_atomically
from o2o.report.jobs import BackEnd, Ended, Job, attempt, failed
from o2o.report.scores import CELLS, SCORES, merge
from o2o.report.suite import Cell, status_of
from o2o.runs.folder import LOCK, wait_until_free

_log = logging.getLogger(__name__)

FILES = "files.json"
"""List of a run's files at the address."""
SMALL = ("status.json", "config.json", "metrics.jsonl", "episodes.jsonl")
"""Files of a run that who started the cells looks at."""
LOOK_S = 1.0
"""Seconds between two looks for a new checkpoint."""
TELL_S = 15.0
"""Seconds between two reports of how far a cell is."""
EXTRA = "pip install 'o2o[cloud]'"


@dataclass(frozen=True)
class Store:
    """An address, a URL of fsspec or a folder; it can be sent to other machines."""

    address: str

    @classmethod
    def checked(cls, address: str) -> Self:
        """Return the store at an address that can be written, read and listed. Raises `ConfigError`."""
        place = address.rstrip("/")
        if not place or place.endswith(":"):
            raise ConfigError(f"the store {address!r} names no place; expected one like s3://bucket/folder")
        if "://" not in place:
            place = str(Path(place).absolute())  # an environment may change the working folder
        store, key, text = cls(place), f"o2o-{uuid.uuid4().hex}.tmp", b"o2o"
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe")
            probe.write_bytes(text)
            try:
                store.put(probe, key)
                store.get(key, probe)
                listed = key in store.names("")
                store.remove([key])
            except (RunError, OSError) as error:
                raise ConfigError(f"{error}; give another `store`") from error
            if not listed or probe.read_bytes() != text:
                raise ConfigError(f"the store {address} does not give back what is written to it; give another `store`")
        return store

    def _files(self) -> tuple[Any, str]:
        """Return the file system and the path in it."""
        try:
            from fsspec.core import url_to_fs

            s3 = self.address.startswith(("s3:", "s3a:"))
            options: dict[str, Any] = {"config_kwargs": {"connect_timeout": 10}} if s3 else {}
            files, root = url_to_fs(self.address, **options)
        except ImportError as error:
            raise RunError(f"the store {self.address} needs a package ({error}): {EXTRA}") from error
        except ValueError as error:
            raise RunError(f"the store {self.address} is no address of fsspec ({error})") from error
        return files, str(root).rstrip("/")

    @contextlib.contextmanager
    def _at(self) -> Iterator[tuple[Any, str]]:
        """Give the file system and the path in it; whatever fails becomes a `RunError` of one line."""
        found = self._files()
        try:
            yield found
        except (FileNotFoundError, RunError):
            raise
        except Exception as error:  # each file system has classes of its own
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(f"the store {self.address} cannot be used ({said})") from error

    def put(self, path: Path, key: str) -> None:
        """Copy a file to the address, where it appears whole. Raises `RunError`, or `FileNotFoundError` without it."""
        try:
            with self._at() as (files, root):
                if "file" not in files.protocol:
                    files.put_file(str(path), f"{root}/{key}")
                    return
                target = Path(root, key)
                with path.open("rb") as source:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(target, lambda file: shutil.copyfileobj(source, file))
        except FileNotFoundError as error:
            if path.exists():  # then what is missing is at the address, such as the bucket
                raise RunError(f"the store {self.address} cannot be used ({error})") from error
            raise

    def get(self, key: str, path: Path) -> bool:
        """Copy a file from the address, and return whether there is one. Raises `RunError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with self._at() as (files, root):
                files.get_file(f"{root}/{key}", str(part))
            part.replace(path)
        except FileNotFoundError:
            return False
        finally:
            part.unlink(missing_ok=True)
        return True

    def names(self, key: str) -> set[str]:
        """Return the files below `key`, as paths relative to it. Raises `RunError`."""
        with self._at() as (files, root):
            files.invalidate_cache()
            base = f"{root}/{key}".rstrip("/")
            try:
                found = files.find(base)
            except FileNotFoundError:
                return set()
        return {str(name)[len(base) :].lstrip("/") for name in found if str(name).startswith(base)}

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files. Raises `RunError`."""
        with self._at() as (files, root):
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    files.rm_file(f"{root}/{key}")

    # Runs.

    def push(self, run: Path, key: str, known: dict[str, tuple[int, int]] | None = None) -> None:
        """Bring a run folder to the address as it is now; `known` says what is there already, and is kept up to date.

        Raises `RunError`, and `FileNotFoundError` if a file went away meanwhile.
        """
        known = {} if known is None else known
        found = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if _kept(path, run)}
        order = sorted(found, key=lambda name: not name.startswith("checkpoints/"))  # rows only grow after these
        for name in order:
            stat = found[name].stat()
            if known.get(name) != (stat.st_size, stat.st_mtime_ns):
                self.put(found[name], f"{key}/{name}")
                known[name] = stat.st_size, stat.st_mtime_ns
        with tempfile.TemporaryDirectory() as folder:
            listed = Path(folder, FILES)
            listed.write_text(json.dumps(sorted(found)))
            self.put(listed, f"{key}/{FILES}")
        gone = self.names(key) - found.keys() - {FILES}
        for name in gone:
            known.pop(name, None)
        self.remove(f"{key}/{name}" for name in gone)

    def pull(self, key: str, run: Path) -> bool:
        """Fill a new run folder from the address, and return whether there is a run. Raises `RunError`."""
        with tempfile.TemporaryDirectory() as folder:
            listed = Path(folder, FILES)
            if not self.get(f"{key}/{FILES}", listed):
                return False
            names = json.loads(listed.read_text())
        for name in names:
            if not self.get(f"{key}/{name}", run / name):
                raise RunError(f"the store {self.address} has no {key}/{name}, which the run's list names")
        return True

    @contextlib.contextmanager
    def following(self, run: Path, key: str) -> Iterator[None]:
        """Bring the run to the address after every checkpoint, in a thread, and at the end of the block."""
        over, known = threading.Event(), dict[str, tuple[int, int]]()
        thread = threading.Thread(target=self._follow, args=(run, key, known, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if run.exists():
            self.push(run, key, known)

    def _follow(self, run: Path, key: str, known: dict[str, tuple[int, int]], over: threading.Event) -> None:
        seen, told = set[str](), time.monotonic()
        while not over.wait(LOOK_S):
            saved = _checkpoints(run)
            try:
                if saved != seen:
                    self.push(run, key, known)
                    seen, told = saved, time.monotonic()
                elif time.monotonic() - told > TELL_S:
                    for name in SMALL[:-1]:
                        self.put(run / name, f"{key}/{name}")
                    told = time.monotonic()
            except FileNotFoundError:  # a checkpoint that was replaced meanwhile: the next look takes the new one
                continue
            except RunError as error:
                _log.warning("%s; the next checkpoint tries again", error)
                seen = saved

    # Cells.

    def attempt(
        self, job: Job, train: Callable[[Cell, Path], object], resume: Callable[[Path], object]
    ) -> tuple[Ended, str | None]:
        """Work on a cell from where it stands at the address; return how that ended, and the run's status."""
        run = scratch(self.address) / job.cell.suite / job.cell.name
        try:
            wait_until_free(run)
            shutil.rmtree(run, ignore_errors=True)
            for key, folder in self._before(job.cell, run):
                self._take(key, folder)
            self.pull(run_key(job.cell), run)
            with self.following(run, run_key(job.cell)):
                ended = attempt(replace(job, run=run), train, resume)
            status = (status_of(run) or {}).get("status")
        except Exception as error:
            return failed(job, error), None
        shutil.rmtree(run, ignore_errors=True)
        return replace(ended, job=job), status

    def _before(self, cell: Cell, run: Path) -> list[tuple[str, Path]]:
        """Return key and scratch folder of the finished runs that a cell starts from or corrects."""
        found = []
        for text in {cell.starts_from, cell.base} - {None}:
            suite, _, label = str(text).rpartition("/")
            if suite.startswith((".", "/")) or ":" in str(text):
                continue
            stem, folder = replace(cell, label=label).stem, suite or cell.suite
            names = {name.partition("/")[0] for name in self.names(f"runs/{folder}")}
            found += [
                (f"runs/{folder}/{name}", run.parents[1] / folder / name)
                for name in names
                if name.startswith(f"{stem}--seeds") and not name.endswith((".json", ".txt"))
            ]
        return found

    def _take(self, key: str, folder: Path) -> None:
        """Fill a scratch folder that several cells read, unless it holds that run already."""
        with tempfile.TemporaryDirectory() as place:
            config = Path(place, "config.json")
            if not self.get(f"{key}/config.json", config):
                return
            if (folder / "config.json").exists() and (folder / "config.json").read_bytes() == config.read_bytes():
                return
        with whole_folder(folder, replace=True) as fresh:
            self.pull(key, fresh)

    def fetch(self, job: Job) -> None:
        """Bring what is looked at of a cell's run from the address to its folder here. Raises `RunError`."""
        for name in SMALL:
            self.get(f"{run_key(job.cell)}/{name}", job.run / name)

    def here(self, job: Job, train: Callable[[Cell, Path], object], resume: Callable[[Path], object]) -> Ended:
        """Work on a cell on this machine, and bring what is looked at of its run to its folder."""
        ended, _ = self.attempt(job, train, resume)
        self.fetch(job)
        return ended

    # Suites.

    def mirror(self, suite: str, results: Path, runs: Path) -> None:
        """Bring results, and what is looked at of runs, from the address here, before cells are planned.

        Results of cells that are only here stay. Raises `RunError` for runs that were trained here without a store.
        """
        for path in (runs / suite).glob("*/checkpoints"):
            raise RunError(
                f"{path.parent} was trained without the store {self.address}: give another folder with `out`, or leave "
                "`store` out"
            )
        with tempfile.TemporaryDirectory() as folder:
            if all([self.get(f"{suite}/{name}", Path(folder, name)) for name in (SCORES, CELLS)]):
                merge(results / suite, Path(folder))
        for name in self.names(f"runs/{suite}"):
            depth, last = name.count("/"), name.rpartition("/")[2]
            if (depth == 0 and last.endswith((".json", ".txt"))) or (depth == 1 and last in SMALL):
                self.get(f"runs/{suite}/{name}", runs / suite / name)

    def keep(self, results: Path) -> None:
        """Bring a suite's results to the address. Raises `RunError`."""
        for path in (results / SCORES, results / CELLS):  # a cell counts once its line is there
            if path.exists():
                self.put(path, f"{results.name}/{path.name}")

    def around(self, work: BackEnd) -> BackEnd:
        """Return `work` with its bookkeeping at the address: what a cell begins as, its failure, the results."""

        def stored(todo: Sequence[Job]) -> Iterator[Ended]:
            for job in todo:
                self.put(job.record, f"runs/{job.cell.suite}/{job.record.name}")
                self.remove([f"runs/{job.cell.suite}/{job.failure.name}"])
            for ended in work(todo):
                yield ended
                if ended.job.failure.exists():
                    self.put(ended.job.failure, f"runs/{ended.job.cell.suite}/{ended.job.failure.name}")
                self.keep(ended.job.results)

        return stored


def run_key(cell: Cell) -> str:
    """Return where a cell's run is below the address."""
    return f"runs/{cell.suite}/{cell.name}"


def scratch(address: str) -> Path:
    """Return the folder on this machine for runs whose place is `address`."""
    return cache_dir() / "cells" / uuid.uuid5(uuid.NAMESPACE_URL, address).hex


def _checkpoints(run: Path) -> set[str]:
    folder = run / "checkpoints"
    return {entry.name for entry in folder.iterdir() if entry.name.isdigit()} if folder.is_dir() else set()


def _kept(path: Path, run: Path) -> bool:
    """Whether a file belongs to the run; what is being written does not."""
    parts = path.relative_to(run).parts
    return path.is_file() and path.name != LOCK and not any(part.startswith(".") or "tmp" in part for part in parts)
