"""Where files go, and how they are written so that they survive a kill or a power cut."""

import json
import logging
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from platformdirs import user_cache_path

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


class JsonLines:
    """A file of JSON rows to append to.

    Every row is flushed, so a kill loses none. A power cut loses none of the rows before the last `offset`.
    """

    def __init__(self, path: Path) -> None:
        """Append to `path`. The file is opened by the first write, so reading a run needs no right to write."""
        self.path = path
        self._opened: IO[str] | None = None

    @property
    def _file(self) -> IO[str]:
        if self._opened is None:
            self._opened = self.path.open("a", encoding="utf-8")
        return self._opened

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. NaN and infinity are written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def offset(self) -> int:
        """Sync the file to disk and return its length in bytes."""
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def truncate(self, offset: int) -> None:
        """Cut off what follows byte `offset`; a resumed run writes those rows again.

        If the file is shorter than `offset`, log a warning and cut off an incomplete last line.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < offset:
            whole = self.path.read_bytes().rfind(b"\n") + 1 if size else 0
            _log.warning(
                "%s has %d bytes but its checkpoint was taken at %d: rows are missing (a power cut, or an incomplete "
                "copy); the run continues without them",
                self.path,
                size,
                offset,
            )
            offset = whole
        if size > offset:
            self._file.truncate(offset)

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            self._opened.close()
