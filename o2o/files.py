"""Files that survive a kill or a power cut: written whole or not at all, or appended row by row."""

import json
import math
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


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
    """Append rows to a file; every row is flushed, so a kill loses none, nor a power cut one before an `offset`."""

    def __init__(self, path: Path) -> None:
        """Append to `path`, which is opened by the first change: who only looks needs no right to write."""
        self.path = path
        self._opened: IO[str] | None = None

    @property
    def _file(self) -> IO[str]:
        if self._opened is None:
            self._opened = self.path.open("a", encoding="utf-8")
        return self._opened

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; NaN and infinity are written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def offset(self) -> int:
        """Return the file's length in bytes, all of which are on the disk then."""
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def truncate(self, offset: int) -> None:
        """Forget what was written behind `offset`: a resumed run writes it again.

        Of a file that is shorter the last line stays only if it is whole, and standard error has a line about it.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < offset:
            whole = self.path.read_bytes().rfind(b"\n") + 1 if size else 0
            print(
                f"o2o: {self.path} has {size} bytes, its checkpoint was taken at {offset}: rows are missing from it (a "
                "power cut, or a copy by half); the run goes on without them",
                file=sys.stderr,
            )
            offset = whole
        if size > offset:
            self._file.truncate(offset)

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            self._opened.close()
