"""Files that a kill or a power cut leaves whole: text written at once, rows appended one by one."""

import json
import math
import os
import sys
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all, in a power cut too; what was there stays until then."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
