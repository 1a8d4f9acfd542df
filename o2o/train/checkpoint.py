"""Checkpoints of a run: agent, replay buffer, normaliser and loop state in one atomic step; orbax is known only here.

A step is written beside the others and renamed when whole: a kill or a full disk leaves the earlier ones as they were.
Only its score may come later, in a file of its own. Beside the arrays lie the checksums of all files, and nothing is
loaded that does not have them: 100 MB take 0.06 s when saved, and when first loaded.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from o2o.errors import CheckpointError
from o2o.files import write_atomically
from o2o.keys import is_key

_log = logging.getLogger(__name__)
_policies = ocp.training.preservation_policies
logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.ERROR or "orbax" not in record.pathname)
warnings.filterwarnings("ignore", module="orbax")  # it logs and warns at every checkpoint


LATE_SCORE = "score.json"
"""In a checkpoint's folder: its score, where that was not known when it was saved."""
CHECKSUMS = "checksums.json"
"""In a checkpoint's folder: the CRC-32 of every other file, but of a score that came later."""
ASIDE = "damaged"
"""Beside the folder of checkpoints: the damaged ones that a run which goes on has put out of its way."""
WHOLE = "_CHECKPOINT_METADATA"
"""In a checkpoint's folder: the file that orbax writes last. A folder without it is none of a checkpoint."""
UNFINISHED = "*.orbax-checkpoint-tmp"
"""Names of what orbax has not finished writing."""
SLOWEST = 5e6
"""Bytes per second of the slowest disk that a save waits for, beyond `PATIENCE_S`."""
PATIENCE_S = 60
"""Seconds after which the smallest checkpoint must be on the disk."""
REMEDIES = {
    r"No space left|os_error_code='28'": "no space left on the disk: free some, then resume",
    r"Disk quota|os_error_code='122'": "the disk quota is used up: free some space, then resume",
    r"Permission denied|os_error_code='13'": "this user has no right to it (permission denied): give it the right",
    r"Read-only file system|os_error_code='30'": "the file system is read-only: mount it for writing",
    r"Too many open files|os_error_code='24'": "too many files are open: raise `ulimit -n`, or close other programs",
    r"MemoryError|[Oo]ut of memory|Cannot allocate memory|failed to allocate|bad_alloc": "there is too little memory: "
    "end other programs, or use a machine with more",
}
"""What was wrong where the files themselves may be intact, by the words of the exception."""


class _Best:
    """Preserves the checkpoint of the highest score, no matter when that became known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Say of every checkpoint whether it stays."""
        best = _best(self.folder, checkpoints)
        return [entry.step == best for entry in checkpoints]


def _best(folder: Path, checkpoints: Sequence[Any]) -> int | None:
    scores = [(_score(folder, entry), entry.step) for entry in checkpoints]
    return max(((score, step) for score, step in scores if score is not None), default=(0.0, None))[1]


def _score(folder: Path, entry: Any) -> float | None:
    if entry.metrics:
        return entry.metrics["score"]
    try:
        late = json.loads((folder / str(entry.step) / LATE_SCORE).read_text())
        return float(late["score"]) if late["checksum"] == _checksum(repr(late["score"]).encode()) else None
    except (OSError, ValueError, KeyError, TypeError):  # not known yet, or a power cut left it by half
        return None


@contextlib.contextmanager
def _checkpointer(
    folder: Path, keep_last: int = 1, cleanup: bool = False, size: int = 0
) -> Iterator[ocp.training.Checkpointer]:
    """Open the checkpoints of a folder; `size` bytes are about to be written, if any.

    Fields without arrays (None) need not be the same: an agent may have got one since. `load_arrays` compares the rest.
    """
    policy: Any = _policies.AnyPreservationPolicy([_policies.LatestN(max(keep_last, 1)), _Best(folder)])
    limits = ocp.options.AsyncOptions(  # by default orbax waits 20 minutes for a folder that it could not make
        timeout_secs=PATIENCE_S + int(size / SLOWEST), create_directories_asynchronously=False
    )
    leaves = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with _silence(), _plain(folder.absolute()) as path, ocp.Context(async_options=limits, pytree_options=leaves):
        with ocp.training.Checkpointer(
            str(path), preservation_policy=policy, cleanup_tmp_directories=cleanup
        ) as checkpointer:
            yield checkpointer


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what orbax logs: it repeats one exception in hundreds of lines, and we say it in one."""
    logger, drop = logging.getLogger("absl"), lambda _: False
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


@contextlib.contextmanager
def _plain(folder: Path) -> Iterator[Path]:
    """Give a path to `folder` without special characters: `[`, `*`, `:` and others mean something else to orbax."""
    if re.fullmatch(r"[\w./=+,@~% -]+", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="o2o-") as home:
        link = Path(home) / "checkpoints"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _shapes(tree: Any) -> dict[str, str]:
    """Name every leaf's path, shape and type."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path): f"{np.shape(leaf)} {getattr(leaf, 'dtype', type(leaf).__name__)}"
        for path, leaf in leaves
    }


def save(
    folder: Path, step: int, arrays: Mapping[str, Any], state: Mapping[str, Any], score: float | None, keep_last: int
) -> None:
    """Write checkpoint `step`: `arrays` name -> pytree, `state` JSON-able.

    Keeps the last `keep_last`, at least one, and the best by `score`; a step not beyond the latest is not written.
    Raises `CheckpointError` if it cannot be written (no space left, say); what was there stays.
    """
    shapes = {name: _shapes(tree) for name, tree in arrays.items()}
    items = {name: jax.tree.map(_not_empty, tree) for name, tree in arrays.items()}
    items["state"] = {"json": json.dumps({"state": dict(state), "shapes": shapes})}
    metrics: Any = None if score is None else {"score": float(score)}
    try:
        known = steps(folder)
        if known and known[-1] >= step:
            return
        size = _ensure_room(folder, items)
        with _checkpointer(folder, keep_last, cleanup=True, size=size) as checkpointer:
            checkpointer.save_checkpointables(step, items, metrics=metrics)
        whole = folder / str(step)
        write_atomically(whole / CHECKSUMS, json.dumps(_checksums(whole, _files(whole))))
        _sync(folder, step)
        _prove(folder, step, items)
    except Exception as error:  # tensorstore reports a failed write as a ValueError
        for unfinished in folder.glob(UNFINISHED):
            shutil.rmtree(unfinished, ignore_errors=True)
        remedy, cause = _remedy(error)
        raise CheckpointError(
            f"cannot save checkpoint {step} in {folder}: {remedy or cause}; earlier checkpoints are intact"
        ) from error


def _files(whole: Path) -> list[str]:
    """Return the paths, within a checkpoint's folder, of the files that have checksums."""
    found = sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file())
    return [name for name in found if name not in (CHECKSUMS, LATE_SCORE)]


def _checksum(part: bytes, before: int = 0) -> int:
    return zlib.crc32(part, before)


def _checksums(whole: Path, names: Iterable[str]) -> dict[str, int | None]:
    """Return the checksums of files in a checkpoint's folder; None for one that is gone or on a bad disk.

    Raises `OSError` where the files may be intact: of missing rights, for example.
    """
    found: dict[str, int | None] = {}
    for name in names:
        value = 0
        try:
            with (whole / name).open("rb") as file:
                while part := file.read(2**20):
                    value = _checksum(part, value)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
                raise
            value = None
        found[name] = value
    return found


_seen: dict[Path, tuple[Any, str | None]] = {}
"""Folder of a checkpoint that was checked -> sizes and times of its files then, and the file that is damaged."""


def _damage(folder: Path, step: int) -> str | None:
    """Return the first file of checkpoint `step` that is not as it was written; None if all are.

    A checkpoint without checksums is of an older o2o, or a kill came before them: nothing is known of it. Raises
    `CheckpointError` if its files cannot be read, though they may be intact.
    """
    whole = (folder / str(step)).absolute()
    try:
        files = [path for path in sorted(whole.rglob("*")) if path.is_file()]
        stamp = [(path, (at := path.stat()).st_size, at.st_mtime_ns) for path in files]
        if whole not in _seen or _seen[whole][0] != stamp:
            _seen[whole] = stamp, _first_changed(whole)
    except OSError as error:
        raise _unreadable(folder, step, error) from error
    return _seen[whole][1]


def _first_changed(whole: Path, part: str = "") -> str | None:
    """Return the first file below `part` of a checkpoint's folder that has another checksum; None if there is none."""
    try:
        wanted = dict(json.loads((whole / CHECKSUMS).read_text()))
    except FileNotFoundError:
        return None if (whole / WHOLE).is_file() else WHOLE
    except (IsADirectoryError, ValueError, TypeError):
        return CHECKSUMS
    found = _checksums(whole, [name for name in wanted if name.startswith(part)])
    return next((name for name, value in found.items() if value != wanted[name]), None)


def latest_sound(folder: Path) -> int | None:
    """Return the latest step whose files are as they were written, None if there is no checkpoint.

    A warning names those that are passed over. Raises `CheckpointError` if all are damaged.
    """
    known, passed = sorted(step for step, _ in _numbered(folder)), ""
    for step in reversed(known):
        new = (folder / str(step)).absolute() not in _seen
        if (file := _damage(folder, step)) is None:
            return step
        passed = passed or _damaged(folder, step, file)
        if new and step != known[0]:
            _log.warning("%s; an earlier one is taken in its place", _damaged(folder, step, file))
    if passed:
        raise CheckpointError(f"{passed}, and there is no sound one before it: restore it from a copy")
    return None


def _damaged(folder: Path, step: int, file: str) -> str:
    return f"checkpoint {step} in {folder} is damaged: its file {file} is not as it was written"


def set_aside(folder: Path, step: int) -> None:
    """Move what is there of checkpoints after `step` beside the folder, so that a run can write them again."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.isdigit() and int(path.name) > step:
            aside = folder.parent / ASIDE
            aside.mkdir(exist_ok=True)
            count = sum(other.name.partition(".")[0] == path.name for other in aside.iterdir())
            path.rename(aside / (f"{path.name}.{count}" if count else path.name))


def _prove(folder: Path, step: int, items: Mapping[str, Any]) -> None:
    """Read the state and the smallest arrays of a new checkpoint back: what no path leads to is found out at once."""
    smallest = min((name for name in items if jax.tree.leaves(items[name])), key=lambda name: _bytes(items[name]))
    targets = {name: jax.tree.map(_abstract, items[name]) for name in {smallest} - {"state"}}
    with _checkpointer(folder) as checkpointer:
        found = checkpointer.load_checkpointables(step, {"state": None, **targets})
    if found["state"]["json"] != items["state"]["json"]:
        raise OSError(errno.EIO, "what was written is not what is read back")


def _sync(folder: Path, step: int) -> None:
    """Wait until a checkpoint, its files and their names, is on the disk; orbax waits for the arrays only."""
    if os.name != "posix":  # where a folder has no descriptor
        return
    from concurrent.futures import ThreadPoolExecutor  # not before orbax: that changes how a failed save ends

    whole = folder / str(step)
    with ThreadPoolExecutor(8) as pool:  # the disk takes together what is asked for together
        list(pool.map(_sync_one, (*whole.rglob("*"), whole, folder)))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # of folders some file systems do not know it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def add_score(folder: Path, step: int, score: float) -> None:
    """Give checkpoint `step` its score, later than it was saved; does nothing if there is no such checkpoint.

    Raises `CheckpointError` if it cannot be written.
    """
    late = folder / str(step) / LATE_SCORE
    if not late.parent.is_dir():
        return
    try:
        about = {"score": score, "checksum": _checksum(repr(score).encode())}
        write_atomically(late, json.dumps(about) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"cannot write the score of checkpoint {step} in {folder}: {error.strerror}; the checkpoint is intact, but "
            "cannot be the best; free space on the disk, or let this user write there"
        ) from error


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "itemsize"))


def _ensure_room(folder: Path, items: Mapping[str, Any]) -> int:
    """Refuse to begin a write that cannot fit or is not allowed; return its bytes."""
    size = _bytes(dict(items))
    folder.mkdir(parents=True, exist_ok=True)
    if strays := [path for step, path in _numbered(folder) if not (path / WHOLE).is_file()]:
        raise OSError(errno.EEXIST, f"{min(strays)} is in the way and no checkpoint: move it elsewhere")
    tempfile.TemporaryFile(dir=folder).close()
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if free < size:
        raise OSError(
            f"no space left: about {size / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free; free some and resume"
        )
    return size


def steps(folder: Path) -> list[int]:
    """Return the steps of all complete checkpoints, ascending. Raises `CheckpointError` if it may not look."""
    try:
        return sorted(step for step, path in _numbered(folder) if (path / WHOLE).is_file())
    except OSError as error:
        raise CheckpointError(f"cannot look into {folder}: {error.strerror}; give this user the right") from error


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return what has the name of a checkpoint in a folder, with its step."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    return [(int(path.name), path) for path in found if re.fullmatch(r"0|[1-9][0-9]*", path.name)]


def best_step(folder: Path) -> int | None:
    """Return the step with the highest score, the latest of equals, or `None` if no checkpoint has one."""
    if not (known := steps(folder)):
        return None
    try:
        with _checkpointer(folder) as checkpointer:
            found = [entry for entry in checkpointer.checkpoints if entry.step in known]
            return _best(folder, [entry for entry in found if not _first_changed(folder / str(entry.step), "metrics/")])
    except Exception as error:
        remedy, cause = _remedy(error)
        raise CheckpointError(f"the scores of the checkpoints in {folder} cannot be read: {remedy or cause}") from error


def load_state(folder: Path, step: int | None = None) -> tuple[int, dict[str, Any], dict[str, dict[str, str]]]:
    """Return (step, state, shapes of the saved arrays) of checkpoint `step` (`None`: the latest that is sound).

    Raises `CheckpointError` if there is none, or it cannot be read or is damaged.
    """
    known = steps(folder)
    found = latest_sound(folder) if step is None or not known else step
    if found is None:
        raise CheckpointError(
            f"no checkpoint in {folder}: the run was stopped before its first save; `o2o resume` begins it again"
        )
    step = found
    if step not in known:
        raise CheckpointError(f"no checkpoint {step} in {folder}; there are {', '.join(map(str, known))}")
    if file := _damage(folder, step):
        others = ", ".join(str(other) for other in known if other != step) or "none"
        raise CheckpointError(f"{_damaged(folder, step, file)}; restore it from a copy, or take another ({others})")
    try:
        with _checkpointer(folder) as checkpointer:
            text = checkpointer.load_checkpointables(step, {"state": None})["state"]["json"]
        saved = json.loads(text)
    except Exception as error:
        raise _unreadable(folder, step, error) from error
    return step, saved["state"], saved["shapes"]


def load_arrays(folder: Path, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Load the named pytrees of checkpoint `step` into the structure and shapes of `targets`.

    Raises `CheckpointError` naming the first difference if the checkpoint belongs to another agent or shape.
    """
    _, _, shapes = load_state(folder, step)
    for name, target in targets.items():
        _compare(folder, step, name, shapes.get(name), _shapes(target))
    abstract = {name: jax.tree.map(_abstract, target) for name, target in targets.items()}
    try:
        with _checkpointer(folder) as checkpointer:
            loaded = checkpointer.load_checkpointables(step, abstract)
    except Exception as error:
        raise _unreadable(folder, step, error) from error
    return {name: jax.tree.map(_as_target, target, loaded[name]) for name, target in targets.items()}


def _not_empty(leaf: Any) -> Any:
    """Return a leaf as it is saved: orbax refuses arrays of size 0, which some simulators' states hold."""
    return leaf if np.size(leaf) else np.zeros(1, leaf.dtype)


def _abstract(leaf: Any) -> Any:
    """Describe a leaf to load: onto the devices that `leaf` is committed to, whichever device wrote it.

    Any other leaf is loaded as one that was just computed. Orbax would commit it to a device, and JAX compiles a
    program again for committed arguments. A random key is described by its numbers: for a key orbax would trace a
    function anew, and JAX keeps each trace.
    """
    leaf = _not_empty(leaf)
    numbers = _numbers_of(leaf.shape, leaf.dtype) if is_key(leaf) else leaf
    if isinstance(leaf, jax.Array) and leaf.committed:
        return jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=leaf.sharding)
    return np.empty(np.shape(numbers), numbers.dtype)


@cache
def _numbers_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and type of the numbers of random keys."""
    return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))


def _as_target(target: Any, loaded: Any) -> jax.Array:
    """Return a `loaded` leaf as an array of JAX, and as a random key where `target` is one."""
    if not np.size(target):
        return jax.numpy.zeros(target.shape, target.dtype)
    return jax.random.wrap_key_data(loaded) if is_key(target) else jax.numpy.asarray(loaded)


def _first_cause(error: BaseException) -> str:
    """Return what first went wrong, in one line; orbax wraps an exception several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _remedy(error: BaseException) -> tuple[str | None, str]:
    """Return what to do where the files are not to blame (None: they may be), and the cause in short."""
    cause = _first_cause(error)
    found = (remedy for words, remedy in REMEDIES.items() if re.search(words, cause))
    return next(found, None), cause[:300]


def _unreadable(folder: Path, step: int, error: Exception) -> CheckpointError:
    remedy, cause = _remedy(error)
    if remedy is not None:
        return CheckpointError(f"checkpoint {step} in {folder} cannot be read: {remedy}; its files were not touched")
    return CheckpointError(
        f"checkpoint {step} in {folder} cannot be read ({cause}): if it was copied, copy it again; else move "
        f"{folder / str(step)} elsewhere and go on from an earlier checkpoint"
    )


def _compare(folder: Path, step: int, name: str, saved: dict[str, str] | None, wanted: dict[str, str]) -> None:
    if saved is None:
        raise CheckpointError(f"checkpoint {step} in {folder} holds no {name}")
    for path in [*wanted, *saved]:
        if saved.get(path) != wanted.get(path):
            raise CheckpointError(
                f"checkpoint {step} in {folder} belongs to another agent or shape: {name}{path} is "
                f"{saved.get(path, 'absent')} there, expected {wanted.get(path, 'absent')}"
            )
