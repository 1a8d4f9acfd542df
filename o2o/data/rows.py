"""Rows of a dataset in memory: observations once, next observations by index; and what their numbers give away."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from o2o.data.spaces import ObservationSpec

Rows = dict[str, np.ndarray]
ALIGNMENT = 64
"""Bytes; arrays that begin at a multiple of it are taken over by JAX on a CPU as they are."""
BLOCK = 2**15
"""Rows that are converted together."""
LARGE = 4096.0
"""Numbers up to this size keep a resolution of 0.0005 in float32."""


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array that JAX on a CPU can use as it lies in memory, without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    at = -raw.ctypes.data % ALIGNMENT
    return raw[at : at + size].view(dtype).reshape(shape)


class Columns:
    """Arrays that grow row by row. Room for `sizes` rows, by name, is kept free, so that nothing is copied."""

    def __init__(self) -> None:
        """Begin without columns."""
        self._arrays: Rows = {}
        self._used: dict[str, int] = {}

    def add(self, key: str, values: np.ndarray, room: int) -> None:
        """Append `values` `[n, ...]` to a column, which begins with room for `room` rows."""
        used = self._used.get(key, 0)
        end = used + len(values)
        if key not in self._arrays:
            try:
                self._arrays[key] = empty((max(room, end), *values.shape[1:]), values.dtype)
            except (ValueError, MemoryError):  # `room` is what a file says of itself
                self._arrays[key] = empty((end, *values.shape[1:]), values.dtype)
        held = self._arrays[key]
        kind = np.result_type(held, values)
        if end > len(held) or kind != held.dtype:
            wider = empty((max(end + end // 4, len(held)), *held.shape[1:]), kind)
            wider[:used] = held[:used]
            self._arrays[key] = held = wider
        held[used:end] = values
        self._used[key] = end

    def take(self, key: str) -> np.ndarray:
        """Return a column `[n, ...]`, which is forgotten here."""
        return self._arrays.pop(key)[: self._used.pop(key)]

    def joined(self, first: str, second: str) -> np.ndarray:
        """Return the rows of two columns, one behind the other, without a copy where the first has room for both."""
        used, tail = self._used.pop(first), self.take(second)
        held = self._arrays.pop(first)
        if len(held) < used + len(tail):
            return np.concatenate([held[:used], tail])
        held[used : used + len(tail)] = tail
        return held[: used + len(tail)]

    def __contains__(self, key: str) -> bool:
        """Whether there is a column of this name."""
        return key in self._arrays

    def __iter__(self) -> Any:
        """Iterate over the names of the columns."""
        return iter(list(self._arrays))


class Indexed:
    """The rows `frames[index]` `[N, ...]` of an array `[F, ...]`. They are copied only where they are read.

    Reads like an array: `shape`, `dtype`, `len`, `x[...]`, and NumPy's functions.
    """

    def __init__(self, frames: np.ndarray, index: np.ndarray) -> None:
        """Point to the rows `index` `[N]` of `frames`."""
        self.frames, self.index = frames, index

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows `[N, ...]`."""
        return (len(self.index), *self.frames.shape[1:])

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.frames.ndim

    @property
    def dtype(self) -> np.dtype:
        """The type of the numbers."""
        return self.frames.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.frames.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that are held beside the frames, which are the observations' as well."""
        return self.index.nbytes

    def __len__(self) -> int:
        """Return the number of rows N."""
        return len(self.index)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Return a copy of rows, by any key of NumPy's whose first part, new axes aside, chooses rows."""
        parts = key if isinstance(key, tuple) else (key,)
        new = next((i for i, part in enumerate(parts) if part is not None), len(parts))
        parts = parts[new:]
        if not parts or parts[0] is Ellipsis:
            rows = np.asarray(self)[parts]
        else:
            rows = self.frames[(self.index[parts[0]], *parts[1:])]
        return rows[(None,) * new] if new else rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all rows as an array of their own."""
        return np.asarray(self.frames[self.index], dtype)

    def heads(self, rows: Any) -> bool:
        """Whether `rows` are the first of these frames, as the observations of a dataset are."""
        return isinstance(rows, np.ndarray) and rows.ctypes.data == self.frames.ctypes.data and rows.ndim == self.ndim

    def map(self, function: Any) -> Self:
        """Return the rows with `function` applied to all frames `[F, ...]`, some at a time."""
        made = empty(self.frames.shape, self.dtype)
        for start in range(0, len(made), BLOCK):
            made[start : start + BLOCK] = function(self.frames[start : start + BLOCK])
        return type(self)(made, self.index)


def contiguous(frames: np.ndarray, now: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, Indexed]:
    """Return the observations `frames[now]` and the next ones `frames[after]`, `[N, ...]`, of one array.

    The observations are the first N of its frames, and a frame that is in both is kept once. Nothing is copied where
    `now` is `0, 1, ... N - 1` already.
    """
    size = len(now)
    if not np.array_equal(now, np.arange(size)):
        place = np.full(len(frames), -1)
        place[now] = np.arange(size)
        rest = np.unique(after[place[after] < 0])
        place[rest] = size + np.arange(len(rest))
        frames, after = frames[np.concatenate([now, rest])], place[after]
    return frames[:size], Indexed(frames, after.astype(np.int32))


def concatenated(parts: Sequence[tuple[np.ndarray, Indexed]]) -> tuple[np.ndarray, Indexed]:
    """Return observations and next observations of several datasets as those of one."""
    if len(parts) == 1:
        return parts[0]
    sizes = [len(now) for now, _ in parts]
    starts, behind, index = np.concatenate([[0], np.cumsum(sizes)]), sum(sizes), []
    for (_, after), size, start in zip(parts, sizes, starts, strict=False):
        index.append(np.where(after.index < size, after.index + start, after.index - size + behind))
        behind += len(after.frames) - size
    frames = np.concatenate([now for now, _ in parts] + [after.frames[len(now) :] for now, after in parts])
    return frames[: sum(sizes)], Indexed(frames, np.concatenate(index).astype(np.int32))


class Watch:
    """Looks at the numbers of all episodes for what the flat float32 observations would lose."""

    def __init__(self, spec: ObservationSpec, whole: ObservationSpec) -> None:
        """Compare observations of `spec` with those of `whole`, which leaves nothing out."""
        self._kept = [leaf for leaf in spec.leaves if not leaf.image]
        self._left_out = [leaf for leaf in whole.leaves if not leaf.image and leaf not in spec.leaves]
        self._columns: dict[str, Mapping[str, np.ndarray]] = {}
        self._moments: dict[str, Any] | None = None

    def episode(self, observations: Any) -> None:
        """Look at one episode's observations, leaves `[T + 1, ...]`."""
        flat = {leaf.name: _flat(leaf.of(observations)) for leaf in self._kept}
        for name, values in flat.items():
            if values.dtype.itemsize > 2 and values.dtype != np.float32:
                self._digits(name, values.astype(np.float64))
        if self._left_out:
            goals = np.concatenate([_flat(leaf.of(observations)) for leaf in self._left_out], axis=1)
            self._correlate(np.concatenate(list(flat.values()), axis=1).astype(np.float64), goals.astype(np.float64))

    def _digits(self, name: str, values: np.ndarray) -> None:
        found = {
            "low": values.min(axis=0),
            "high": values.max(axis=0),
            "lost": ((values - values.astype(np.float32)) ** 2).mean(axis=0),
            "moved": (np.diff(values, axis=0) ** 2).mean(axis=0),
        }
        held = self._columns.get(name)
        merge = {"low": np.minimum, "high": np.maximum, "lost": np.add, "moved": np.add}
        self._columns[name] = found if held is None else {key: merge[key](held[key], found[key]) for key in found}

    def lost_digits(self) -> list[tuple[str, int, float]]:
        """Return (entry, column, resolution) of numbers whose steps vanish in float32, such as time stamps."""
        found = []
        for name, column in self._columns.items():
            size = np.maximum(np.abs(column["low"]), np.abs(column["high"]))
            varies, blurred = column["low"] < column["high"], column["lost"] > 0.01 * column["moved"]
            lost = np.flatnonzero((size > LARGE) & varies & blurred)
            found += [(name, int(i), float(np.spacing(np.float32(size[i])))) for i in lost]
        return found

    def _correlate(self, states: np.ndarray, goals: np.ndarray) -> None:
        if self._moments is None:
            self._origin = states[0].copy(), goals[0].copy()
        states, goals = states - self._origin[0], goals - self._origin[1]
        found = {
            "n": len(states), "s": states.sum(0), "g": goals.sum(0),
            "ss": (states**2).sum(0), "gg": (goals**2).sum(0), "gs": goals.T @ states,
        }  # fmt: skip
        held = self._moments
        self._moments = found if held is None else {key: held[key] + value for key, value in found.items()}

    def unseen(self) -> list[str]:
        """Return the entries that are left out and that no number of the observations follows.

        A number follows another if their correlation over all episodes is above 0.95 in size.
        """
        if self._moments is None:
            return []
        m = self._moments
        n = m["n"]
        states, goals = m["ss"] - m["s"] ** 2 / n, m["gg"] - m["g"] ** 2 / n
        both = m["gs"] - np.outer(m["g"], m["s"]) / n
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = np.nan_to_num(both**2 / np.outer(goals, states)).max(axis=1, initial=0.0)
        hidden = (goals > 1e-8 * n) & (explained < 0.95**2)
        widths = [int(np.prod(leaf.shape)) for leaf in self._left_out]
        ends = np.cumsum(widths)
        return [
            leaf.name
            for leaf, end, width in zip(self._left_out, ends, widths, strict=True)
            if hidden[end - width : end].any()
        ]


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)
