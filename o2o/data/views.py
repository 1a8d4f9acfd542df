"""The tasks of a stored set: one set of rows, read with the environment, rewards and masks of one of several tasks.

The metadata of such a set have the entry `tasks`: what follows the set's name, such as `singletask-task1`, and the
task's environment and goal. `ogbench/scene-play-singletask-task1-v0`, or without the `-v0`, is then a dataset's name:
the rows of `ogbench/scene-play-v0`, judged by that goal. With `-sparse` behind the task, the reward is 0 where all of
the goal holds and -1 elsewhere.
"""

import re
from collections.abc import Mapping
from typing import Any

from o2o.data.task import Part
from o2o.errors import DatasetError, suggest

SPARSE = "-sparse"
VERSION = re.compile(r"-v\d+$")


def _split(name: str) -> tuple[str, str]:
    """Return a name without its version, and the version, "" if it has none."""
    found = VERSION.search(name)
    return (name[: found.start()], found[0]) if found else (name, "")


def candidates(name: str) -> list[str]:
    """Return the ids of the sets that a name may be a task of, the longest first."""
    stem, version = _split(name)
    words, own = stem.split("-"), [stem] if not version else []
    found = [*own, *("-".join(words[:count]) for count in range(len(words) - 1, 0, -1))]
    return [f"{head}{version or '-v0'}" for head in found]


def set_of(name: str) -> str:
    """Return the name of a set, without version, that a name of one of its tasks seems to begin with."""
    return re.sub(r"(-val)?(-singletask.*)?$", "", _split(name)[0])


def columns(metadata: Mapping[str, Any]) -> list[str]:
    """Return the states that the tasks of a set are judged by."""
    goals = (task["goal"] for task in tasks(metadata).values())
    return sorted({part["column"] for goal in goals for part in goal})


def tasks(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tasks of a set by name; none for most sets. Raises `DatasetError` for entries of no sense."""
    found = metadata.get("tasks", {})
    try:
        for task in found.values():
            _ = [Part.from_json(part) for part in task["goal"]], str(task["env_spec"]), int(task["goal_rows"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"dataset {metadata['dataset_id']}: `tasks` in its metadata cannot be read ({error!r}); make it again"
        ) from error
    return found


def viewed(metadata: dict[str, Any], folder: str, name: str) -> dict[str, Any]:
    """Return the metadata of the task that `name` (id or path) stands for, those of the set itself if it names none.

    `folder` is the name of the set's folder. Raises `DatasetError` for a task that the set does not have.
    """
    known, last = tasks(metadata), _split(name.rpartition("/")[2])[0]
    before = f"{_split(folder)[0]}-"
    if not known or not last.startswith(before):
        return metadata
    (stem, version), full = _split(metadata["dataset_id"]), last.removeprefix(before)
    task = full.removesuffix(SPARSE)
    if task not in known:
        hint = suggest(full, [*known, *(f"{other}{SPARSE}" for other in known)])
        raise DatasetError(f"dataset {metadata['dataset_id']} has no task {full!r}; {hint}")
    spec = str(known[task]["env_spec"])
    goal = {"parts": known[task]["goal"], "sparse": full != task, "rows": known[task]["goal_rows"]}
    return {**metadata, "dataset_id": f"{stem}-{full}{version}", "env_spec": spec, "eval_env_spec": spec, "goal": goal}
