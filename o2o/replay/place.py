"""Where dataset and replay lie: on the device if they fit, else observations in host memory and on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o.data.rows import Indexed
from o2o.replay.buffer import TRANSITION_KEYS, OfflineData, capacity_for, one_row
from o2o.replay.device import DeviceReplay
from o2o.replay.host import HostData, HostReplay

CPU_BYTES = 8 * 2**30
Replay = DeviceReplay | HostReplay
"""A dataset and rings. `Rollout` has the methods of the online loop only."""


@dataclass(frozen=True)
class Place:
    """Decides whether dataset and replay lie on the device or in host memory."""

    device_bytes: int | None = None
    """Bytes of the device; None: half its memory, 8 GiB on a CPU."""
    most: int = 2_000_000
    """Transitions of its own that a run keeps."""
    folder: Path | None = None
    """Folder of rows on disk; None: a temporary one."""
    slack: int = 1
    """Spare rows on disk. A checkpoint stays readable until that many newer rows were written."""

    def limit(self) -> int:
        """Return the bytes that dataset and replay may take of the device."""
        if self.device_bytes is not None:
            return self.device_bytes
        stats = jax.devices()[0].memory_stats() or {}
        return stats["bytes_limit"] // 2 if "bytes_limit" in stats else CPU_BYTES

    def dataset(
        self, rows: Mapping[str, Any], keys: Sequence[str], sources: Sequence[tuple[int, int, float]], seeds: int
    ) -> Replay:
        """Return the replay of a dataset with `rows`, leaves `[N, ...]`: on the device if it fits there.

        `keys`: batch keys beyond the usual five. `sources`: (start, size, weight) of each part.
        Raises `DatasetError` if a needed key is absent.
        """
        needed = {key: rows[key] for key in (*TRANSITION_KEYS, *keys) if key in rows}
        if bytes_of(needed) > self.limit():
            return self._host(HostData.create(rows, keys, sources), seeds)
        return DeviceReplay(OfflineData.create(rows, keys, sources), seeds, self.most)

    def online(self, replay: Replay, steps: int, appended: int, kind: str | None = None) -> Replay:
        """Return `replay`, its dataset taken off the device if rings for `steps` steps do not fit beside it.

        `appended`: dataset rows that each ring begins with. `kind` "device" or "host" decides where not None: a
        checkpoint goes on as it was begun.
        """
        if isinstance(replay, HostReplay):
            return replay
        own = (capacity_for(steps, self.most) + appended) * replay.seeds
        large = bytes_of(replay.data.rows) + row_bytes(replay.data.rows) * own > self.limit()
        wanted = large if kind is None else kind == "host"
        return self._host(HostData.take(replay.data), replay.seeds) if wanted else replay

    def _host(self, data: HostData, seeds: int) -> HostReplay:
        return HostReplay(data, seeds, self.most, self.folder, self.slack)


def row_bytes(rows: Mapping[str, Any]) -> int:
    """Return the bytes of one row of `rows`, leaves `[N, ...]`, stored by itself."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(one_row(rows)))


def bytes_of(rows: Mapping[str, Any]) -> int:
    """Return the bytes of a dataset's rows, frames that several entries share counted once."""
    held: dict[int, int] = {}
    for leaf in jax.tree.leaves(dict(rows)):  # of `Frames` too
        if isinstance(leaf, Indexed):
            held[leaf.frames.ctypes.data] = leaf.frames.nbytes
        place = leaf.ctypes.data if isinstance(leaf, np.ndarray) else id(leaf)
        held[place] = max(leaf.nbytes, held.get(place, 0))
    return sum(held.values())
