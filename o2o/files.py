"""Where files go, and how they are written so that they survive a kill or a power cut."""

import contextlib
import errno
import glob
import json
import logging
import math
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from platformdirs import user_cache_path

from o2o.errors import RunError

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Return the folder O2O_CACHE if that is set, else `o2o` in the user's cache folder (platformdirs)."""
    return Path(os.environ.get("O2O_CACHE") or user_cache_path("o2o", appauthor=False))


def alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def write_atomically(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file so that it appears whole or not at all, even in a power cut; an old one stays until then.

    `content` is text (stored as UTF-8), bytes, or a function that writes to the open binary file. Several processes may
    write the same path: each uses a temporary file of its own in the same folder. Raises `OSError`.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


EARLIER = ".earlier"
"""At the end of a scratch folder's name: it holds the folder that is being replaced."""


@contextlib.contextmanager
def whole_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `target` when the block ends, and goes away if that raises.

    With `replace`, it takes the place of an earlier `target`, which stays until then. What writers that were killed on
    this machine have left is removed, and what one was replacing is put back. Raises `OSError`.
    """
    beside = target.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    scratch = Path(tempfile.mkdtemp(prefix=_scratch(target, os.getpid()), dir=beside))
    try:
        yield scratch
        scratch.chmod(0o755)
        if replace and target.exists():
            os.replace(target, earlier := Path(f"{scratch}{EARLIER}"))
            os.replace(scratch, target)
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(target: Path, process: int) -> str:
    """Return how the names of a process's scratch folders beside a folder begin."""
    return f".{target.name}-{platform.node()}-{process}-"


def _sweep(target: Path) -> None:
    """Remove what writers of a folder that were killed on this machine have left; put back what one had replaced."""
    for path in target.absolute().parent.glob(f".{glob.escape(target.name)}-{glob.escape(platform.node())}-*"):
        process = path.name.removeprefix(_scratch(target, 0).removesuffix("0-")).partition("-")[0]
        if not process.isdigit() or alive(int(process)):
            continue
        if path.name.endswith(EARLIER) and not target.exists():
            path.rename(target)
        shutil.rmtree(path, ignore_errors=True)


def parse_json(text: str) -> Any:
    """Return what a JSON text says. Raises `ValueError` or `RecursionError`, also for half characters in its texts.

    Those (`\\ud800` alone) are valid JSON, but can be neither printed nor written.
    """
    value = json.loads(text)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `RunError` if it cannot be read, or if something else is in it."""
    try:
        value = parse_json(path.read_bytes().decode())
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is no UTF-8 text (byte {error.start}): restore it from a copy") from error
    except UnicodeEncodeError as error:
        raise RunError(f"{path} has half a character in a text ({error.object[error.start]!r}): restore it") from error
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not valid JSON (line {error.lineno}): restore it from a copy") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
        raise RunError(f"{path} is not valid JSON ({error}): restore it from a copy") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object: restore it from a copy")
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a jsonl file. A last line that a kill cut off is left out. Raises `RunError`."""
    try:
        lines = path.read_bytes().decode().splitlines()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; expected a run folder with evaluation rows") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is no UTF-8 text (byte {error.start}): restore it from a copy") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise RunError(f"{path}, line {number}: not JSON ({error}); restore the file, or mend that line") from error
        if not isinstance(row, dict):
            raise RunError(f"{path}, line {number}: no JSON object; restore the file, or delete that line")
        rows.append(row)
    return rows


class JsonLines:
    """A file of JSON rows to append to.

    Every row is written at once, so a kill loses none. A power cut loses none of the rows before the last `offset`.
    """

    def __init__(self, path: Path) -> None:
        """Append to `path`. The file is opened by the first write, so reading a run needs no right to write."""
        self.path = path
        self._opened: IO[bytes] | None = None

    @property
    def _file(self) -> IO[bytes]:
        """The open file. Raises `RunError` if it cannot be opened."""
        if self._opened is None:
            try:
                self._opened = self.path.open("a+b", buffering=0)
            except OSError as error:
                raise RunError(f"cannot write {self.path}: {error.strerror}") from error
        return self._opened

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. NaN and infinity are written as null. Raises `RunError` or `OSError`."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = (json.dumps(clean) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def offset(self) -> int:
        """Sync the file to disk and return its length in bytes. A file that was deleted meanwhile begins anew."""
        if self._opened is not None and not self.path.exists():
            _log.warning("%s was deleted while the run was writing it: it begins anew", self.path)
            self.close()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def rows(self, end: int | None = None) -> int:
        """Return how many rows lie before byte `end`; None: in the whole file."""
        with self.path.open("rb") as file:
            return file.read(-1 if end is None else end).count(b"\n")

    def truncate(self, offset: int, rows: int | None = None) -> None:
        """Cut off what follows byte `offset`, the end of row `rows`; a resumed run writes those rows again.

        If that row ends elsewhere (an edit), log a warning and cut behind it. If there are fewer rows, log a warning
        and cut off an incomplete last line. Raises `RunError` if the file cannot be read or cut.
        """
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror}") from error
        before, found = content[:offset].count(b"\n"), content.count(b"\n")
        known, end = before if rows is None else rows, offset
        if len(content) < offset or before != known or (offset and content[offset - 1 : offset] != b"\n"):
            if found < known or (rows is None and len(content) < offset):
                _log.warning(
                    "%s has %d bytes but its checkpoint was taken at %d: rows are missing (a power cut, or an "
                    "incomplete copy); the run continues without them",
                    self.path,
                    len(content),
                    offset,
                )
                known = found
            else:
                _log.warning("%s was edited after its checkpoint: the run goes on behind row %d", self.path, known)
            end = sum(map(len, content.splitlines(keepends=True)[:known]))
        if end < len(content):
            self._file.truncate(end)

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
