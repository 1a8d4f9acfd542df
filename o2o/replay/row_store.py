"""Rows of observations in files that are mapped into memory: what a run sees, where it does not fit the device."""

import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o.errors import CheckpointError, ConfigError, RunError

ON_HOST = ("observations", "next_observations")
"""What of a transition is kept here."""
Handles = np.ndarray
"""int32 `[S, ...]`: -1 - i is row i of the dataset, n the n-th transition of the run itself."""


def begin_reading(array: np.ndarray, *index: np.ndarray) -> None:
    """Let the system begin to read the rows `array[index]`, all of them at once, where `array` is mapped from a file.

    Read one after the other each would wait for the disk, and bring much of its neighbourhood along. Rows smaller than
    a page of memory are left to that.
    """
    row = array.itemsize * math.prod(array.shape[len(index) :])
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    known = hasattr(mmap, "MADV_WILLNEED") and isinstance(base, mmap.mmap) and array.flags.c_contiguous
    if not known or row < mmap.PAGESIZE:
        return
    begin = array.ctypes.data - np.frombuffer(base, np.uint8, 1).ctypes.data
    rows = np.ravel_multi_index(np.broadcast_arrays(*index), array.shape[: len(index)])
    for at in (begin + row * np.unique(rows)).tolist():
        within = at % mmap.PAGESIZE
        base.madvise(mmap.MADV_WILLNEED, at - within, row + within)


class RowStore:
    """The observations of a run's own transitions, all seeds, in files that are mapped into memory.

    A ring of `capacity` + `slack` rows: a checkpoint is whole while not more than `slack` rows were written behind it,
    even after a power cut if `sync` came before it. Files of a killed run are used again, those of another size
    refused; a row that is not there any more is refused, never replaced by another. Nothing is changed by opening them.
    """

    def __init__(self, folder: Path | None, example: Mapping[str, Any], capacity: int, slack: int) -> None:
        """Open or make the files in `folder` (None: a temporary one) for rows like `example`, leaves `[S, ...]`.

        Raises `ConfigError` if the disk cannot hold them, `RunError` if those there are of another size.
        """
        self.places, self.total = capacity + slack, 0
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="o2o-replay-"))
            self._remove = weakref.finalize(self, shutil.rmtree, folder, True)
        self.folder = folder
        leaves = jax.tree_util.tree_leaves_with_path({key: example[key] for key in ON_HOST})
        names = [jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".") for path, _ in leaves]
        arrays = [np.asarray(leaf) for _, leaf in leaves]
        self._tree = jax.tree.structure({key: example[key] for key in ON_HOST})
        self.seeds = len(arrays[0])
        folder.mkdir(parents=True, exist_ok=True)
        self._check_space(folder, self.places * (8 + sum(array.nbytes for array in arrays)))
        self._maps = [self._map(folder / f"{n}.bin", a.shape, a.dtype) for n, a in zip(names, arrays, strict=True)]
        self._serials = self._map(folder / "serials.bin", (), np.dtype(np.int64))

    def _check_space(self, folder: Path, size: int) -> None:
        used = sum(path.stat().st_blocks * 512 for path in folder.glob("*.bin"))
        free = shutil.disk_usage(folder).free
        if free + used < size:
            raise ConfigError(
                f"the replay buffer needs {size / 2**30:.1f} GiB in {folder}, there are {(free + used) / 2**30:.1f}; "
                "lower loop.replay_capacity, or put the runs on a larger disk"
            )

    def _map(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, int]:
        """Return the mapped array `[places, *shape]` of a file and its descriptor."""
        row = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        may_write = os.access(path if path.exists() else path.parent, os.W_OK)
        flags = os.O_RDWR | os.O_CREAT if may_write else os.O_RDONLY  # who only looks needs no right to write
        descriptor = os.open(path, flags, 0o644)
        weakref.finalize(self, os.close, descriptor)
        found = os.fstat(descriptor).st_size
        if found not in (0, self.places * row):
            raise RunError(
                f"{path} has room for {found / row:g} transitions, expected {self.places}: online_steps, "
                "loop.replay_capacity, loop.checkpoint_every or a camera changed since; put it back, or delete "
                f"{path.parent} if the online phase may begin anew"
            )
        if not found:
            os.ftruncate(descriptor, self.places * row)
        return np.memmap(path, dtype, "r", shape=(self.places, *shape)), descriptor

    def _write(self, mapped: tuple[np.ndarray, int], place: int, value: np.ndarray) -> None:
        """Write one row: through the file, so that a full disk is an error and not a signal."""
        array, descriptor = mapped
        data = np.ascontiguousarray(value, array.dtype).tobytes()
        try:
            if os.pwrite(descriptor, data, place * len(data)) != len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise RunError(f"cannot store a transition ({error.strerror}): free some space and resume") from error

    def add(self, rows: Mapping[str, Any]) -> np.ndarray:
        """Store one transition of every seed, leaves `[S, ...]`; returns its handles `[S]` int32."""
        place = self.total % self.places
        self._write(self._serials, place, np.asarray(0))
        for mapped, leaf in zip(self._maps, jax.tree.leaves({key: rows[key] for key in ON_HOST}), strict=True):
            self._write(mapped, place, np.asarray(leaf))
        self._write(self._serials, place, np.asarray(self.total + 1))
        self.total += 1
        return np.full(self.seeds, self.total - 1, np.int32)

    def sync(self) -> None:
        """Wait until all rows are on the disk; their numbers, by which `read` knows them, go there last."""
        try:
            for _, descriptor in (*self._maps, self._serials):
                os.fsync(descriptor)
        except OSError as error:
            raise RunError(f"cannot store transitions in {self.folder} ({error.strerror}): resume the run") from error

    def read(self, handles: Handles, dataset: Mapping[str, Any], until: int) -> dict[str, Any]:
        """Return the rows of `handles [S, ...]`, leaves `[S, ..., *row]`; those from `until` on are not there yet.

        `dataset` has the rows of negative handles, leaves `[N, *row]`. Raises `CheckpointError` for a row that was
        overwritten since.
        """
        own = handles >= 0
        stored = handles[own & (handles < until)]
        if np.any(self._serials[0][stored % self.places] != stored + 1):
            raise CheckpointError(
                f"the replay rows in {self.folder} are not those of this checkpoint, the run went on too far: "
                "resume from the latest checkpoint"
            )
        seed = np.broadcast_to(np.arange(len(handles)).reshape(-1, *(1,) * (handles.ndim - 1)), handles.shape)
        out = []
        leaves = jax.tree.leaves({key: dataset[key] for key in ON_HOST})
        for (mapped, _), given in zip(self._maps, leaves, strict=True):
            begin_reading(given, -1 - handles[~own])
            begin_reading(mapped, handles[own] % self.places, seed[own])
        for (mapped, _), given in zip(self._maps, leaves, strict=True):
            rows = np.empty((*handles.shape, *given.shape[1:]), mapped.dtype)
            rows[~own] = given[-1 - handles[~own]]
            rows[own] = mapped[handles[own] % self.places, seed[own]]
            out.append(rows)
        return jax.tree.unflatten(self._tree, out)
