"""Files of arrays with one row per step, read by the row: HDF5 datasets, and an npz without loading it whole."""

import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from o2o.data.importers.source import (
    NUMBERS,
    UNREADABLE,
    Field,
    Raw,
    Size,
    array_field,
    channels_last,
    refuse_pickle,
    resized,
)
from o2o.errors import DatasetError

BLOCK = 2**20
"""Rows of flags that are looked at together."""


class Columns(Protocol):
    """Arrays of one length by name."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start : stop` of an array. Forward reading is fast."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class Hdf5Columns:
    """The datasets of an HDF5 file by their paths, such as `infos/qpos`."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises `DatasetError`."""
        self._file = open_hdf5(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.ndim:
                self.shapes[name], self.dtypes[name] = item.shape, item.dtype

        self._file.visititems(visit)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start : stop` of a dataset."""
        return np.asarray(self._file[name][start:stop])  # pyright: ignore[reportIndexIssue]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NpzColumns:
    """The arrays of an npz by name. Each is decompressed as it is read, never whole, and only forwards."""

    def __init__(self, path: Path) -> None:
        """Read the headers of all arrays. Raises `DatasetError`."""
        self._path, self._streams = path, {}
        self._by_columns: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        try:
            self._zip = zipfile.ZipFile(path)
            for member in self._zip.namelist():
                if member.endswith(".npy"):
                    with self._zip.open(member) as stream:
                        shape, fortran, dtype = _header(stream)
                    if min(shape, default=0) < 0:
                        raise ValueError(f"{member} has the shape {shape}")
                    if not shape:
                        continue
                    name = member.removesuffix(".npy")
                    self.shapes[name], self.dtypes[name] = shape, dtype
                    if fortran and len(shape) > 1:
                        self._by_columns.add(name)
        except UNREADABLE as error:
            raise DatasetError(
                f"{path} cannot be read as npz ({reason(error)}): truncated, or of another kind"
            ) from error

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start : stop`; raises `DatasetError` for pickled objects, and for arrays stored by columns."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        if dtype.hasobject:
            raise DatasetError(
                f"{self._path}: array {name!r} holds pickled Python objects, which are not read (unpickling runs any "
                "code in the file): save it as an array of numbers"
            )
        if name in self._by_columns:
            raise DatasetError(
                f"{self._path}: array {name!r} is stored column after column (Fortran order), so its rows cannot be "
                "read one after the other: save numpy.ascontiguousarray of it"
            )
        stream, at = self._streams.get(name, (None, 0))
        if stream is None or start < at:
            if stream is not None:
                stream.close()
            stream, at = self._zip.open(f"{name}.npy"), 0
            _header(stream)
        row = int(np.prod(shape[1:])) * dtype.itemsize
        while at < start:  # decompressed and thrown away
            step = min(start - at, max(1, 2**24 // max(row, 1)))
            stream.read(step * row)
            at += step
        count = min(stop, shape[0]) - start
        data = stream.read(count * row)
        self._streams[name] = (stream, start + count)
        if len(data) < count * row:
            raise EOFError(f"array {name!r} ends early")
        return np.frombuffer(data, dtype).reshape(count, *shape[1:])

    def close(self) -> None:
        """Close the file."""
        for stream, _ in self._streams.values():
            stream.close()
        self._zip.close()


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an array in npy format: shape, whether columns come first, type."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def reason(error: BaseException) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading. Raises `DatasetError`."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path} cannot be read as HDF5 ({reason(error)}): truncated, or of another kind") from error


def columns_of(path: Path) -> Columns:
    """Return the arrays of an HDF5 or npz file, by its first bytes. Raises `DatasetError`."""
    refuse_pickle(path)
    return Hdf5Columns(path) if is_hdf5(path) else NpzColumns(path)


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 does."""
    return path.is_file() and _begins(path, b"\x89HDF\r\n\x1a\n")


def is_npz(path: Path) -> bool:
    """Whether a file begins as a zip file does."""
    return path.is_file() and _begins(path, b"PK\x03\x04")


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def names_in(path: Path) -> list[str]:
    """Return the names of the arrays in a file; none if it cannot be read."""
    try:
        columns = columns_of(path)
    except DatasetError:
        return []
    names = sorted(columns.shapes)
    columns.close()
    return names


def fields_of(columns: Columns, rows: int) -> dict[str, Field]:
    """Return the fields of all numeric arrays with `rows` rows."""
    return {
        name: array_field(shape[1:], columns.dtypes[name])
        for name, shape in columns.shapes.items()
        if shape[0] == rows and columns.dtypes[name].kind in NUMBERS
    }


def check_rows(path: Path, columns: Columns, names: Collection[str], rows: int, of: str) -> None:
    """Raise `DatasetError` for an array in `names` that has no numbers, or another number of rows than `of`."""
    for name in names:
        if name not in columns.shapes:
            continue
        check_numbers(path, columns, name)
        if columns.shapes[name][0] != rows:
            raise DatasetError(
                f"{path}: {name!r} has {columns.shapes[name][0]} rows and {of!r} {rows}; expected one row per step in "
                "each"
            )


def check_numbers(path: Path, columns: Columns, name: str) -> None:
    """Raise `DatasetError` for an array that does not hold numbers, or whose rows cannot be read."""
    columns.read(name, 0, 0)  # says why, for pickled objects
    if columns.dtypes[name].kind not in NUMBERS:
        raise DatasetError(f"{path}: {name!r} is {columns.dtypes[name]}, expected numbers")


def flagged(path: Path, columns: Columns, name: str | None, rows: int) -> np.ndarray:
    """Return the rows whose flag is set, `[k]`; empty for no flags. Raises `DatasetError` for what is no flag."""
    if name is None:
        return np.empty(0, np.int64)
    shape, found = columns.shapes[name], [np.empty(0, np.int64)]
    if int(np.prod(shape[1:])) != 1:
        raise DatasetError(f"{path}: {name!r} is an array of shape {shape}, expected one flag per step")
    for start in range(0, rows, BLOCK):
        flags = columns.read(name, start, min(start + BLOCK, rows)).reshape(-1)
        if len(odd := np.flatnonzero((flags != 0) & (flags != 1))):
            raise DatasetError(f"{path}: {name!r} is {flags[odd[0]]} in row {start + odd[0]}, expected 0 or 1")
        found.append(start + np.flatnonzero(flags))
    return np.concatenate(found)


def read_spans(
    columns: Columns,
    spans: Sequence[tuple[int, int, bool | None]],
    keys: Collection[str],
    sizes: Mapping[str, Size],
    last_of: Mapping[str, str] | None,
    last_is_row: bool = False,
) -> Iterator[Raw]:
    """Yield the episodes of rows `start : stop` of arrays, from `spans` of (start, stop, terminated).

    `last_of`: for each observation the array of next observations, which knows the last one. `last_is_row`: the last
    row of a span is the observation after the last step, and its action and reward are of no use.
    """

    def read(name: str, start: int, stop: int, as_key: str) -> np.ndarray:
        rows = columns.read(name, start, stop)
        image = rows.dtype == np.uint8 and rows.ndim == 4
        return resized(np.ascontiguousarray(channels_last(rows)), sizes.get(as_key)) if image else rows

    for start, stop, terminated in spans:
        rows = {key: read(key, start, stop, key) for key in keys}
        last = None
        if last_is_row:
            last = {key: value[-1] for key, value in rows.items()}
            rows = {key: value[:-1] for key, value in rows.items()}
        elif last_of:
            last = {key: read(name, stop - 1, stop, key)[0] for key, name in last_of.items() if key in rows}
        yield Raw(rows, last, terminated)
