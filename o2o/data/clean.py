"""A dataset without its faulty episodes, as a new dataset; the old one is only read."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from o2o.data import files
from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.errors import DatasetError
from o2o.files import whole_folder

DATA = "main_data.hdf5"


@dataclass(frozen=True)
class Cleaned:
    """What was kept, and the first problem of every episode that was left out."""

    folder: Path
    episodes: int
    problems: tuple[str, ...]

    @property
    def dropped(self) -> int:
        """Return how many episodes were left out."""
        return len(self.problems)


def without_bad(dataset: str | Path, out: str | None = None, root: str | Path | None = None) -> Cleaned:
    """Write the sound episodes of a dataset, byte for byte, as the new dataset `out` (default: ID with `-checked`).

    An episode is faulty if training would refuse it, actions out of bounds included. Raises `DatasetError` if there is
    no such dataset, `out` exists, or no episode is sound.
    """
    folder = files.locate(dataset, root)
    about = files.read_info(folder)
    name = out or re.sub(r"(-v\d+)?$", lambda version: f"-checked{version[0] or '-v0'}", about.ids[0], count=1)
    target = files.check_new(name, root)
    if about.metadata["data_format"] != "hdf5":
        raise DatasetError(f"dataset {about.name} has data_format {about.metadata['data_format']!r}, expected hdf5")
    problems = [_problem(folder, about, number) for number in range(about.episodes)]
    sound = [number for number, problem in enumerate(problems) if problem is None]
    found = tuple(problem for problem in problems if problem is not None)
    if not sound:
        raise DatasetError(f"dataset {about.name}: none of its {about.episodes} episodes is sound; {found[:1]}")
    try:
        with whole_folder(target) as scratch:
            (data := scratch / "data").mkdir()
            steps = _copy(folder / DATA, data / DATA, sound)
            size = round((data / DATA).stat().st_size / 1e6, 1)
            counts = {"total_episodes": len(sound), "total_steps": steps, "dataset_size": size}
            own: dict[str, Any] = {"dataset_id": name, "checked_from": about.name, "dropped_episodes": len(found)}
            (data / "metadata.json").write_text(json.dumps({**about.metadata, **counts, **own}))
    except OSError as error:
        raise DatasetError(f"dataset {name} could not be written to {target}: {error}") from error
    return Cleaned(target, len(sound), found)


def _problem(folder: Path, about: files.DatasetInfo, number: int) -> str | None:
    """Return the first problem of an episode, None for a sound one."""
    spec, actions = ObservationSpec.from_space(about.observation_space, True), ActionMap.from_space(about.action_space)
    try:
        episode = next(files.read_episodes(files.open_storage(folder, about.metadata), about.name, number))
    except DatasetError as error:
        return str(error)
    return next(files.problems(episode, number, spec, actions), None)


def _copy(source: Path, target: Path, numbers: list[int]) -> int:
    """Copy these episodes and number them anew; return how many steps they hold."""
    steps = 0
    with h5py.File(source, "r") as old, h5py.File(target, "w", track_order=True) as new:
        for number, before in enumerate(numbers):
            old.copy(f"episode_{before}", new, f"episode_{number}")
            group: Any = new[f"episode_{number}"]
            group.attrs["id"] = number
            steps += len(group["rewards"])
    return steps
