"""Record the training episodes of a run, so that they can serve as offline data later.

Every finished episode is one file under `RUN/episodes`, in the environment's own units: observations (Dict too), the
executed actions, which of them were a human's, and raw rewards. A file is written atomically, named by run seed,
stream, environment and episode, and never overwritten. A resumed run first deletes the episodes that it will play again
(`forget`); those of a robot stay. `export` makes a Minari dataset of the files at any time.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o.data import datasets
from o2o.data.datasets import Episode
from o2o.data.rollout import executed_action
from o2o.data.task import Task, flags_of, success_of
from o2o.errors import RunError
from o2o.files import write_atomically

EPISODES, HEADER, RECORDED = "episodes", "environment.json", "recorded"
"""In a run folder: the episodes, the description of their environment, the root of the exported dataset."""
STATES = "states/"
"""Prefix of the simulator's states among the arrays of an episode's file."""
DISCARD = "discard"
"""Entry of the infos that is true where a human throws the episode away that has just ended: it is not recorded."""
Name = tuple[int, ...]
"""Seed, stream, environment; the last entry is the number of the episode."""


class Recorder(gym.Wrapper):
    """Write each episode to `folder` when it ends.

    An unfinished episode is dropped, since a resumed run plays it again; in an environment that cannot be replayed it
    is written as truncated. The wrapper belongs inside those that change observations, actions or rewards. If the
    `task` ends an episode at success, the environment itself does not, and the end is recorded as a truncation.
    """

    def __init__(self, env: gym.Env, folder: Path, task: Task, metadata: Mapping[str, Any] | None = None) -> None:
        """Record `env`. `metadata` (JSON-able) goes into the exported dataset. Raises `RunError` if writing fails."""
        super().__init__(env)
        self.folder, self.task = folder, task
        self._name: Name | None = None
        self._next: Name | None = None
        self._observations: list[dict[str, np.ndarray]] = []
        self._rows: list[tuple[np.ndarray, float, bool, bool, bool | None, bool]] = []
        self._seed: int | None = None
        header = datasets.environment_entries(env.observation_space, env.action_space, env.spec)
        self._replayable = bool(env.metadata.get("replayable", True))
        known = {} if task.success_key is None else {"success_key": task.success_key}
        text = json.dumps(
            {**header, "metadata": {**known, **(metadata or {})}, "replayable": self._replayable}, indent=2
        )
        _write(folder / HEADER, text + "\n")

    def name_episode(self, name: Name) -> None:
        """Set the name of the episode that starts at the next reset; default: the next free number."""
        self._next = name

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset. An unfinished episode is dropped, or written if it cannot be played again."""
        self._break_off()
        observation, info = self.env.reset(seed=seed, options=options)
        self._name, self._next = self._next, None
        self._observations, self._rows, self._seed = [self._copy(observation)], [], seed
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step. The last step of an episode writes its file."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        executed = np.array(executed_action(info, action))
        flag = success_of(info, self.task.success_key)
        self._observations.append(self._copy(observation))
        human = "intervene_action" in info
        self._rows.append((executed, float(reward), bool(terminated), bool(truncated), flag, human))
        cut = self.task.terminate_on_success and bool(self.task.success(float(reward), flag))
        if info.get(DISCARD):
            self._rows = []
        elif terminated or truncated or cut:
            self._finish()
        return observation, reward, bool(terminated), bool(truncated), info

    def close(self) -> None:
        """Close the environment. An unfinished episode is treated as in `reset`."""
        try:
            self._break_off()
        finally:
            super().close()

    def _break_off(self) -> None:
        try:
            if self._rows and not self._replayable:
                self._finish()
        finally:
            self._rows = []

    def _copy(self, observation: Any) -> dict[str, np.ndarray]:
        return {key: np.array(value) for key, value in _entries(self.env.observation_space, observation)}

    def _finish(self) -> None:
        actions, rewards, terminations, truncations, success, human = zip(*self._rows, strict=True)
        arrays = {key: np.stack([row[key] for row in self._observations]) for key in self._observations[0]}
        arrays |= {
            "actions": np.stack(actions),
            "rewards": np.asarray(rewards, np.float64),
            "terminations": np.asarray(terminations),
            "truncations": np.asarray((*truncations[:-1], not terminations[-1] or truncations[-1])),
            "intervened": np.asarray(human),
        }
        if (flags := flags_of(success)) is not None:
            arrays["success"] = flags
        if self._seed is not None:
            arrays["seed"] = np.asarray(self._seed)
        name = self._name or (0,)
        if self._path(name).exists() or not self._name:
            name = (*name[:-1], next_number(self.folder, name[:-1]))
        _write(self._path(name), lambda file: np.savez_compressed(file, **arrays))  # pyright: ignore[reportArgumentType]
        self._name, self._rows = None, []

    def _path(self, name: Name) -> Path:
        return self.folder / f"{'-'.join(map(str, name))}.npz"


def _entries(space: gym.Space, observation: Any, prefix: str = "observations") -> Iterator[tuple[str, Any]]:
    """Yield the paths and the leaves of an observation."""
    if isinstance(space, spaces.Dict):
        for key, sub in space.spaces.items():
            yield from _entries(sub, observation[key], f"{prefix}/{key}")
    elif isinstance(space, spaces.Tuple):
        for i, sub in enumerate(space.spaces):
            yield from _entries(sub, observation[i], f"{prefix}/{i}")
    else:
        yield prefix, observation


def _nested(space: gym.Space, arrays: Mapping[str, np.ndarray], prefix: str = "observations") -> Any:
    """Return the nested observation of the leaves that `_entries` yields."""
    if isinstance(space, spaces.Dict):
        return {key: _nested(sub, arrays, f"{prefix}/{key}") for key, sub in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_nested(sub, arrays, f"{prefix}/{i}") for i, sub in enumerate(space.spaces))
    return arrays[prefix]


def _write(path: Path, content: str | Callable[[IO[bytes]], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise RunError(f"cannot record to {path}: {error.strerror}; free some space and resume") from error


def _files(folder: Path) -> dict[Name, Path]:
    """Return the recorded episodes of a folder, sorted by seed and environment, then by time; other files are none."""
    files = [path for path in folder.glob("*.npz") if re.fullmatch(r"[0-9]+(-[0-9]+)*", path.stem) and path.is_file()]
    return dict(sorted((tuple(int(part) for part in path.stem.split("-")), path) for path in files))


def _header(folder: Path) -> dict[str, Any]:
    """Return the description of the environment in a folder of episodes. Raises `RunError` if it cannot be read."""
    try:
        header = json.loads((folder / HEADER).read_text())
        if not isinstance(header, dict) or not isinstance(header.get("metadata"), dict):
            raise ValueError("it describes no environment")
        return header
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{folder / HEADER} cannot be read ({error}): `o2o resume {folder.parent}` writes it again, or "
            "copy the file of another recorded run in the same environment"
        ) from error


def recorded(run: Path) -> int:
    """Return the number of episodes that a run has recorded."""
    return len(_files(run / EPISODES))


def next_number(folder: Path, prefix: Name) -> int:
    """Return the number after those of all recorded episodes of `prefix` (seed, stream, environment)."""
    return 1 + max((name[-1] for name in _files(folder) if name[:-1] == prefix), default=-1)


def forget(run: Path, going_on: Mapping[Name, int]) -> None:
    """Delete the episodes that a resumed run will play again; none if the environment cannot be replayed.

    `going_on` maps (seed, stream, environment) to the number of the current episode. All episodes of other environments
    are deleted.
    """
    if (run / EPISODES / HEADER).exists() and not _header(run / EPISODES).get("replayable", True):
        return
    for name, path in _files(run / EPISODES).items():
        if name[-1] >= going_on.get(name[:-1], 0):
            path.unlink()


def write_episode(path: Path, space: gym.Space, episode: Episode) -> None:
    """Write an episode with observations of `space` as one file, whole or not at all. Raises `OSError`."""
    arrays = {key: np.asarray(value) for key, value in _entries(space, episode.observations)}
    arrays |= {f"{STATES}{key}": np.asarray(value) for key, value in (episode.states or {}).items()}
    rest = {key: value for key, value in vars(episode).items() if key not in ("observations", "states")}
    arrays |= {key: np.asarray(value) for key, value in rest.items() if value is not None}
    write_atomically(path, lambda file: np.savez(file, **arrays))  # pyright: ignore[reportArgumentType]


def read_episode(path: Path, space: gym.Space, actions: gym.Space) -> Episode:
    """Return the episode of a file. Raises `RunError` if it cannot be read, or its arrays do not fit the spaces."""
    try:
        with np.load(path) as stored:
            arrays = {key: stored[key] for key in stored.files}
        rest = {key: arrays[key] for key in ("actions", "rewards", "terminations", "truncations")}
        seed = int(arrays["seed"]) if "seed" in arrays else None
        rest |= {key: arrays.get(key) for key in ("success", "intervened")}
        states = {key.removeprefix(STATES): arrays[key] for key in arrays if key.startswith(STATES)}
        episode = Episode(observations=_nested(space, arrays), seed=seed, states=states or None, **rest)
        steps = len(episode.rewards)
        wanted = {key: (steps, *(actions.shape or ())) if key == "actions" else (steps,) for key in rest}
        wanted |= {key: (steps + 1, *shape) for key, shape in _shapes(space)}
        wrong = [key for key, shape in wanted.items() if arrays.get(key) is not None and arrays[key].shape != shape]
        if wrong or not steps or any(array.dtype.kind not in "biuf" for array in arrays.values()):
            raise ValueError(f"{wrong[0]} has shape {arrays[wrong[0]].shape}" if wrong else "it holds no numbers")
    except Exception as error:  # of a damaged file: of zipfile, zlib, numpy or Python
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(
            f"recorded episode {path} cannot be read ({reason}): restore it from a copy, or move it away"
        ) from error
    return episode


def _shapes(space: gym.Space, prefix: str = "observations") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the paths of `_entries` and the shapes of the leaves."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        below = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, sub in below:
            yield from _shapes(sub, f"{prefix}/{key}")
    else:
        yield prefix, space.shape or ()


def export(run: Path, dataset_id: str | None = None, root: Path | None = None) -> Path:
    """Make a Minari dataset of a run's recorded episodes and return its folder. The run may still be going on.

    By default it is `NAME-v0` under `RUN/recorded`, replacing an earlier one. Raises `RunError` if nothing is recorded,
    `DatasetError` if the id is malformed, or exists already in another root.
    """
    if not run.is_dir():
        raise RunError(f"{run} is no run folder: there is no such folder")
    files = _files(run / EPISODES)
    if not files:
        raise RunError(f"{run} has no recorded episode: train with `record` until one episode of the online phase ends")
    header = _header(run / EPISODES)
    observation_space, action_space, spec = datasets.read_environment(header, str(run / EPISODES / HEADER))
    name = dataset_id or f"{re.sub(r'[^A-Za-z0-9_-]+', '-', run.resolve().name)}-v0"
    base = root or run / RECORDED
    own = base.resolve() == (run / RECORDED).resolve()
    metadata = {"author": {"o2o"}, "description": f"Recorded by o2o in run {run.resolve().name}.", **header["metadata"]}
    metadata |= {"vouched": header["vouched"]} if "vouched" in header else {}
    return datasets.write(
        name,
        (read_episode(path, observation_space, action_space) for path in files.values()),
        observation_space=observation_space,
        action_space=action_space,
        spec=spec,
        eval_spec=spec,
        root=base,
        metadata=metadata,
        overwrite=dataset_id is None and own,
    )
