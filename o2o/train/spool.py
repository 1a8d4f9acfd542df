"""A file queue that survives a kill: what a robot has recorded, until the learner has saved it.

Entries are numbered 1, 2, ... and never change. They lie in segments, files that are appended to; a segment is deleted
when all of its entries were dropped. A kill can tear the last entry only, which is cut off when the spool is opened.
"""

import json
import os
import struct
import threading
import uuid
import zlib
from array import array
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from o2o.errors import RunError
from o2o.files import read_object, write_atomically

HEAD = struct.Struct("<QII")
"""Before each entry: its number, its length in bytes and its CRC-32."""
ABOUT, LOCK = "spool.json", "lock"
SEGMENT = 1000
"""Entries of a segment."""
LIMIT = 1_000_000
"""Entries of a spool; a robot that records for hours without a learner stops there."""


class _Segment:
    """One file, and where its entries begin."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.first, self.begins, self.size = path, first, array("Q"), 0
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        content = os.pread(self.file, os.fstat(self.file).st_size, 0)
        while self.size + HEAD.size <= len(content):
            number, length, crc = HEAD.unpack_from(content, self.size)
            entry = content[self.size + HEAD.size : self.size + HEAD.size + length]
            if number != first + len(self.begins) or len(entry) != length or zlib.crc32(entry) != crc:
                break
            self.begins.append(self.size)
            self.size += HEAD.size + length
        os.ftruncate(self.file, self.size)

    @property
    def last(self) -> int:
        return self.first + len(self.begins) - 1

    def append(self, entry: bytes) -> None:
        whole = HEAD.pack(self.last + 1, len(entry), zlib.crc32(entry)) + entry
        if (written := os.pwrite(self.file, whole, self.size)) != len(whole):
            raise OSError(f"{written} of {len(whole)} bytes could be written to {self.path}")
        self.begins.append(self.size)
        self.size += len(whole)

    def read(self, number: int) -> bytes:
        begin = self.begins[number - self.first]
        _, length, _ = HEAD.unpack(os.pread(self.file, HEAD.size, begin))
        return os.pread(self.file, length, begin + HEAD.size)


class Spool:
    """Entries of bytes on disk, numbered from 1. One thread may append while another reads and drops."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        """Open or make the spool in `folder`. Raises `RunError` if it cannot be written or is in use."""
        self.folder, self.limit = folder.absolute(), limit
        self._mutex = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / LOCK)
            self._lock.acquire(timeout=0)
            if not (self.folder / ABOUT).exists():
                write_atomically(self.folder / ABOUT, json.dumps({"actor": uuid.uuid4().hex, "run": None}))
            self.about: dict[str, Any] = read_object(self.folder / ABOUT)
            paths = sorted(self.folder.glob("rows-*.bin"), key=_first)
            self._segments = [_Segment(path, _first(path)) for path in paths] or [self._segment(1)]
        except Timeout as error:
            raise RunError(f"spool {folder} is in use by another actor: give another folder") from error
        except OSError as error:
            raise RunError(f"spool {folder} cannot be written: {error.strerror}; give another folder") from error

    def _segment(self, first: int) -> _Segment:
        return _Segment(self.folder / f"rows-{first}.bin", first)

    @property
    def first(self) -> int:
        """The number of the first entry that is kept, or of the next one if there is none."""
        return self._segments[0].first

    @property
    def last(self) -> int:
        """The number of the newest entry; 0 before the first."""
        return self._segments[-1].last

    def append(self, entry: bytes) -> int:
        """Write an entry and return its number. A kill of this process does not lose it; a power cut may.

        Raises `RunError` if the spool is full or cannot be written.
        """
        if self.last - self.first + 1 >= self.limit:
            raise RunError(
                f"spool {self.folder} is full: {self.limit} transitions wait for the learner; start it again, and go on"
            )
        try:
            with self._mutex:
                if len(self._segments[-1].begins) >= SEGMENT:
                    self._segments.append(self._segment(self.last + 1))
                self._segments[-1].append(entry)
        except OSError as error:
            raise RunError(f"spool {self.folder} cannot be written: {error}; what was recorded is kept") from error
        return self.last

    def read(self, after: int, count: int) -> list[bytes]:
        """Return up to `count` entries that follow number `after`, synced to the disk.

        So a number that another machine has seen is never given to another entry, whatever happens to this one.
        """
        with self._mutex:
            found = [
                segment.read(number)
                for segment in self._segments
                for number in range(max(segment.first, after + 1), min(segment.last, after + count) + 1)
            ]
            files = [os.dup(segment.file) for segment in self._segments if segment.last > after] if found else []
        for file in files:
            os.fsync(file)
            os.close(file)
        return found

    def drop(self, until: int) -> None:
        """Forget entries up to number `until`, as far as they fill whole segments. The last segment stays."""
        done: list[_Segment] = []
        with self._mutex:
            while len(self._segments) > 1 and self._segments[0].last <= until:
                done.append(self._segments.pop(0))
        for segment in done:
            os.close(segment.file)
            segment.path.unlink()

    def belong(self, run: str) -> None:
        """Note whose entries these are. Raises `RunError` if they are another run's."""
        if self.about["run"] == run:
            return
        if self.about["run"] is not None and self.last:
            raise RunError(
                f"spool {self.folder} holds transitions for another run: give another folder, or start that learner"
            )
        self.about["run"] = run
        write_atomically(self.folder / ABOUT, json.dumps(self.about))

    def close(self) -> None:
        """Sync and close the files."""
        for segment in self._segments:
            os.fsync(segment.file)
            os.close(segment.file)
        self._segments = []
        self._lock.release()


def _first(path: Path) -> int:
    return int(path.stem.partition("-")[2])
