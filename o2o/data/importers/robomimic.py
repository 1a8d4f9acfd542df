"""robomimic's HDF5 files: one group per demonstration, `data/demo_0` and so on, with its observations under `obs`.

`dones` mean success, the end of the demonstration or both, by how the file was made, so they are not read.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np

from o2o.data.importers.columns import is_hdf5, open_hdf5
from o2o.data.importers.source import (
    NUMBERS,
    Description,
    Field,
    Raw,
    Size,
    Source,
    array_field,
    channels_last,
    resized,
)
from o2o.errors import DatasetError


class RobomimicSource(Source):
    """An HDF5 file of robomimic, or of what writes alike (robosuite, MimicGen, LIBERO)."""

    name: ClassVar[str] = "robomimic"

    def __init__(self, path: Path, episode_steps: int | None = None) -> None:
        """Open the file. Raises `DatasetError`."""
        super().__init__(path, episode_steps)
        self._file = open_hdf5(path)
        data: Any = self._file.get("data")
        names = list(data) if isinstance(data, h5py.Group) else []
        numbered = {name: number for name in map(str, names) if (number := _number(name)) is not None}
        self._demos = sorted(numbered, key=lambda name: numbered[name])
        if not self._demos:
            raise DatasetError(f"{path} has no demonstration data/demo_0; it has {', '.join(self._file) or 'nothing'}")
        self._data: Any = data
        for name in self._demos:
            self._check(name)
        self._first: Any = data[self._demos[0]]
        self._fields = {name: _field(item) for name, item in _arrays(self._first) if _field(item) is not None}
        if episode_steps is not None:
            raise DatasetError(f"{path}: every demonstration is an episode, so `episode_steps` has no use")

    def _check(self, name: str) -> None:
        """Raise `DatasetError` unless a demonstration is a group with rows of actions."""
        group = self._data.get(name)
        if not isinstance(group, h5py.Group):
            raise DatasetError(f"{self.path}: {name} is no group of arrays but {group}; copy the file again")
        actions = group.get("actions")
        if not isinstance(actions, h5py.Dataset) or _field(actions) is None:
            raise DatasetError(f"{self.path}: {name} has no array of actions; it has {', '.join(group) or 'nothing'}")

    @classmethod
    def detect(cls, path: Path) -> bool:
        """Whether the file has a group of demonstrations."""
        if not is_hdf5(path):
            return False
        try:
            with open_hdf5(path) as file:
                data = file.get("data")
                return isinstance(data, h5py.Group) and any(_number(str(name)) is not None for name in data)
        except DatasetError:
            return False

    def describe(self) -> Description:
        """Return what the file holds; the rewards of all demonstrations decide whether they mean success."""
        fields = {name: field for name, field in self._fields.items() if field is not None}
        observations = {name: name.removeprefix("obs/") for name in fields if name.startswith("obs/")}
        if not observations:
            raise DatasetError(
                f"{self.path} has no observations, only {', '.join(fields)}: make them from its states with "
                "robomimic's dataset_states_to_obs.py, or name columns with `keys`"
            )
        lengths, values = [], set()
        for name in self._demos:
            group = self._data[name]
            lengths.append(len(group["actions"]))
            if "rewards" in group and len(values) <= 2:
                values.update(np.unique(group["rewards"][()]).tolist()[:3])
        sparse = "rewards" in fields and values <= {0.0, 1.0}
        rules = ["`dones` are not read: robomimic sets them at success, at the end of a demonstration, or at both"]
        if sparse:
            rules.append("all rewards are 0 or 1, so a step with reward 1 is a success")
        return Description(
            format="robomimic HDF5",
            episodes=len(self._demos),
            rows=sum(lengths),
            fields=fields,
            observations=observations,
            action="actions",
            reward="rewards" if "rewards" in fields else None,
            success="rewards" if sparse else None,
            rules=tuple(rules),
            details=self._environment(),
        )

    def _environment(self) -> dict[str, Any]:
        """Return what the file says of its environment."""
        text = self._data.attrs.get("env_args")
        try:
            return {} if text is None else {"env_args": json.loads(text)}
        except (TypeError, ValueError):
            return {"env_args": str(text)}

    def episodes(self, keys: Collection[str], sizes: Mapping[str, Size], start: int = 0) -> Iterator[Raw]:
        """Yield the demonstrations from number `start` on, in the order of their numbers."""
        for name in self._demos[start:]:
            group = self._data[name]
            missing = [key for key in keys if key not in group]
            if missing:
                raise DatasetError(
                    f"{self.path}: {name} has no {', '.join(missing)}, which {self._demos[0]} has; it has "
                    f"{', '.join(key for key, _ in _arrays(group))}"
                )
            nexts = {key: f"next_{key}" for key in keys if key.startswith("obs/")}
            last, steps = None, len(group["actions"])
            if steps and nexts and all(following in group for following in nexts.values()):
                for following in nexts.values():
                    if group[following].shape[:1] != (steps,):
                        raise DatasetError(
                            f"{self.path}: {name} has {following} of shape {group[following].shape} for {steps} "
                            "actions; expected one row per step"
                        )
                last = {key: _read(group[following], -1, sizes.get(key)) for key, following in nexts.items()}
            yield Raw({key: _read(group[key], None, sizes.get(key)) for key in keys}, last)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _number(name: str) -> int | None:
    found = re.fullmatch(r"(?:demo|episode)_?(\d+)", name)
    return int(found[1]) if found else None


def _arrays(group: Any) -> list[tuple[str, Any]]:
    """Return the arrays of a demonstration by name, without next observations."""
    found: list[tuple[str, Any]] = []
    group.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
    return [(name, item) for name, item in found if not name.startswith("next_obs/")]


def _field(item: Any) -> Field | None:
    return array_field(item.shape[1:], item.dtype) if item.ndim and item.dtype.kind in NUMBERS else None


def _read(item: Any, row: int | None, size: Size | None) -> np.ndarray:
    rows = np.asarray(item[()] if row is None else item[row])
    image = rows.dtype == np.uint8 and item.ndim == 4
    return resized(np.ascontiguousarray(channels_last(rows)), size) if image else rows
