"""Minari datasets as flat float32 transitions: actions in [-1, 1], the task's rewards, Monte-Carlo returns.

An episode of T steps has T+1 observations, so the last next-observation is the true final one. masks = 1 - terminated.
What a task says of success changes the data as it changes the environment: a successful step of a task that terminates
on success has mask 0 and ends its sequence; with a binary reward the episode is also cut after its last success
(arXiv 2412.07762, released code).
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.serialization import deserialize_space, serialize_space

from o2o.data import files
from o2o.data.cache import cached
from o2o.data.demonstrations import record
from o2o.data.files import EMBEDDED_PREFIX, DatasetInfo, Episode, check_new, default_root, info
from o2o.data.files import write_dataset as write
from o2o.data.spaces import ACTION_LIMIT, STATE, ActionMap, ObservationSpec
from o2o.data.task import Task
from o2o.errors import ConfigError, DatasetError, EnvironmentMismatchError

log = logging.getLogger("o2o")

CACHE_VERSION = 2
ORIGIN = ("algorithm_name", "author", "description", "code_permalink", "license", "source_fingerprint")
"""Entries of metadata.json that `describe` repeats."""
RETURN_ROWS = 2**16
"""Rows whose returns-to-go are computed together: as Python numbers they take many times their bytes."""
Rows = dict[str, np.ndarray]
ActionRange = Literal["space", "data"]

__all__ = [
    "EMBEDDED_PREFIX",
    "Dataset",
    "DatasetInfo",
    "Episode",
    "Source",
    "check",
    "default_root",
    "describe",
    "info",
    "list_datasets",
    "load",
]
__all__ += ["check_new", "environment_entries", "monte_carlo_returns", "read_environment", "record", "write"]


@dataclass(frozen=True)
class Source:
    """Rows `start : start + size` come from one dataset, and a draw comes from it with probability `weight`."""

    start: int
    size: int
    weight: float


@dataclass(frozen=True, eq=False)
class Dataset:
    """Flat transitions of N rows.

    `arrays`: float32 observations and next_observations `[N, D]` (or dicts with uint8 images), actions `[N, A]`,
    rewards, masks and, unless loaded without a discount, mc_returns `[N]`, and boolean ends `[N]`.
    """

    arrays: dict[str, Any]
    info: DatasetInfo
    fingerprint: str
    """sha256 of the data before any task transform; the same on every machine."""
    sources: tuple[Source, ...]
    observation_spec: ObservationSpec
    action_map: ActionMap
    task: Task

    @property
    def size(self) -> int:
        """Return the number of rows N."""
        return len(self.arrays["rewards"])

    def without_rows(self) -> "Dataset":
        """Return all that is known of it but the rows."""

        def empty(entry: Any) -> Any:
            return {k: empty(v) for k, v in entry.items()} if isinstance(entry, dict) else entry[:0].copy()

        return replace(self, arrays=empty(self.arrays))


def _converters(about: DatasetInfo, achieved_goal: bool) -> tuple[ObservationSpec, ActionMap]:
    try:
        spec = ObservationSpec.from_space(about.observation_space, achieved_goal)
        return spec, ActionMap.from_space(about.action_space)
    except EnvironmentMismatchError as error:
        raise DatasetError(f"dataset {about.name}: {error}") from error


def _read_rows(data: Path, about: DatasetInfo, spec: ObservationSpec, actions: ActionMap, clip: bool) -> Rows:
    """Read one dataset: `observation/<key>` `[N + episodes, ...]`, `lengths` `[episodes]`, all else `[N, ...]`."""
    columns: dict[str, list[Any]] = {}
    for i, episode in enumerate(files.read_episodes(files.open_storage(data, about.metadata), about.name)):
        for problem in files.problems(episode, i, spec, actions, clip):
            raise DatasetError(f"dataset {about.name}: {problem}")
        flat = spec.flatten(episode.observations)
        row = {
            f"observation/{key}": value for key, value in (flat if isinstance(flat, dict) else {STATE: flat}).items()
        }
        row |= {
            "actions": np.clip(actions.from_env(episode.actions), -ACTION_LIMIT, ACTION_LIMIT),
            "rewards": episode.rewards.astype(np.float64).reshape(-1),
            "terminated": episode.terminations,
            "truncated": episode.truncations,
            "lengths": np.asarray([len(episode.rewards)]),
        }
        if episode.success is not None:
            row["success"] = episode.success
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    if "success" in columns and len(columns["success"]) != len(columns["lengths"]):
        del columns["success"]
    return {key: np.concatenate(value) for key, value in columns.items()}


def _digest(rows: Rows) -> str:
    digest = hashlib.sha256()
    for key in sorted(rows):
        digest.update(f"{key} {rows[key].dtype.str} {rows[key].shape}".encode())
        digest.update(np.ascontiguousarray(rows[key]).data)
    return digest.hexdigest()


def _cached_rows(
    data: Path, about: DatasetInfo, spec: ObservationSpec, actions: ActionMap, clip: bool, cache: bool
) -> Rows:
    """Read through the cache, keyed by the files' digest and all that shapes the rows."""
    if not cache:
        return _read_rows(data, about, spec, actions, clip)
    key = [CACHE_VERSION, np.__version__, files.file_digest(data), str(spec), clip]
    return cached(key, lambda: _read_rows(data, about, spec, actions, clip))


def monte_carlo_returns(
    rewards: np.ndarray, masks: np.ndarray, ends: np.ndarray, discount: float, failure_reward: float | None = None
) -> np.ndarray:
    """Return float32 G `[N]`: G_t = r_t + discount * m_t * G_{t+1}, 0 after each end (arXiv 2303.05479).

    Rewards are the transformed ones. With a `failure_reward` (sparse tasks), every row of a trajectory whose rewards
    all equal it has r / (1 - discount); raises `ConfigError` if discount is 1 then.
    """
    if failure_reward is not None and discount >= 1:
        raise ConfigError(f"discount is {discount}: the return of a failed sparse trajectory needs a discount below 1")
    rewards = np.asarray(rewards, np.float32)
    stop = np.asarray(ends, bool).copy()
    if len(stop):
        stop[-1] = True
    factors = np.where(stop, 0.0, discount * np.asarray(masks, np.float64))
    result, value = np.empty(len(rewards), np.float32), 0.0
    for end in range(len(rewards), 0, -RETURN_ROWS):
        part = slice(max(end - RETURN_ROWS, 0), end)
        values, following = rewards[part].astype(np.float64).tolist(), factors[part].tolist()
        for i in range(len(values) - 1, -1, -1):
            value = values[i] + following[i] * value
            values[i] = value
        result[part] = values
    if failure_reward is not None and len(rewards):
        starts = np.flatnonzero(np.concatenate([[True], stop[:-1]]))
        failed = np.logical_and.reduceat(rewards == np.float32(failure_reward), starts)
        lengths = np.diff(np.append(starts, len(rewards)))
        result[np.repeat(failed, lengths)] = failure_reward / (1.0 - discount)
    return result


def _transitions(
    rows: Rows, task: Task, discount: float | None, name: str
) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
    """Return the arrays of one dataset under a task, with raw returns and success of all its episodes."""
    lengths, success = rows["lengths"], task.success(rows["rewards"], rows.get("success"))
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    episode = np.repeat(np.arange(len(lengths)), lengths)
    if task.binary and success is None:
        raise DatasetError(
            f"dataset {name}: a binary reward needs infos['success'] in every episode; use the dense reward"
        )
    for row in task.strange_failures(rows["rewards"], rows.get("success"))[:1]:
        raise DatasetError(
            f"dataset {name}: episode {episode[row]}, step {row - first[episode[row]]} is no success and has the raw "
            f"reward {float(rows['rewards'][row])}, but the sparse task {task.name} declares "
            f"{task.raw_failure_reward} for such steps; set raw_failure_reward of its Task, or sparse to False"
        )
    returns = np.add.reduceat(rows["rewards"], first)
    solved = None if success is None else np.logical_or.reduceat(success, first)
    terminated, ends = rows["terminated"].copy(), rows["terminated"] | rows["truncated"]
    ends[first + lengths - 1] = True
    keep = np.ones(len(episode), bool)
    if task.terminate_on_success and success is not None and solved is not None:
        terminated, ends = terminated | success, ends | success
        if task.binary:
            positions = np.where(success, np.arange(len(episode)), -1)
            last = np.maximum.reduceat(positions, first)
            keep &= (np.arange(len(episode)) <= last[episode]) | ~solved[episode]
    if task.only_successes:
        if solved is None:
            raise DatasetError(
                f"dataset {name}: the task keeps only episodes that succeed, and which do is not known (there is no "
                "infos['success']); set only_successes to False (--task.only-successes False)"
            )
        keep &= solved[episode]
        if not keep.any():
            raise DatasetError(f"dataset {name}: no episode succeeds, and the task keeps only those that do")
    now = np.flatnonzero(keep) + episode[keep]
    rewards, masks = task.rewards(rows["rewards"], success)[keep], (~terminated[keep]).astype(np.float32)
    states = {key.removeprefix("observation/"): value for key, value in rows.items() if key.startswith("observation/")}

    def take(index: np.ndarray) -> Any:
        return states[STATE][index] if set(states) == {STATE} else {key: value[index] for key, value in states.items()}

    arrays = {
        "observations": take(now),
        "actions": rows["actions"][keep],
        "rewards": rewards,
        "masks": masks,
        "next_observations": take(now + 1),
        "ends": ends[keep],
    }
    if discount is not None:
        arrays["mc_returns"] = monte_carlo_returns(rewards, masks, ends[keep], discount, task.failure_reward)
    return arrays, returns, solved


def _concatenate(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: _concatenate([part[key] for part in parts]) for key in parts[0]}
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _weights(sizes: Sequence[int], weights: Sequence[float] | None) -> list[float]:
    values = list(map(float, sizes if weights is None else weights))
    if len(values) != len(sizes) or min(values) < 0 or sum(values) <= 0:
        raise DatasetError(f"weights {weights} do not fit {len(sizes)} dataset(s): give one non-negative number each")
    return [value / sum(values) for value in values]


def _merged(infos: Sequence[DatasetInfo], returns: list[np.ndarray], solved: list[np.ndarray | None]) -> DatasetInfo:
    head = infos[0]
    for other in infos[1:]:
        for key in ("observation_space", "action_space"):
            if getattr(other, key) != getattr(head, key):
                raise DatasetError(
                    f"datasets {head.name} and {other.name} cannot be mixed: "
                    f"{key} {getattr(head, key)} against {getattr(other, key)}"
                )
        if other.env_id != head.env_id:
            log.warning(
                "datasets %s (%s) and %s (%s) are mixed although they were recorded in different environments; "
                "the task is that of the first",
                head.name, head.env_id, other.name, other.env_id,
            )  # fmt: skip
    known = [flags for flags in solved if flags is not None]
    fields: dict[str, Any] = {key: getattr(head, key) for key in head.__dataclass_fields__}
    fields |= {
        "ids": tuple(i for about in infos for i in about.ids),
        "episodes": sum(map(len, returns)),
        "steps": sum(about.steps for about in infos),
        "episode_returns": np.concatenate(returns),
        "episode_success": np.concatenate(known) if len(known) == len(solved) else None,
    }
    return DatasetInfo(**fields)


def load(
    ids: str | Path | Sequence[str | Path],
    *,
    task: Task | None = None,
    weights: Sequence[float] | None = None,
    discount: float | None = 0.99,
    achieved_goal: bool = False,
    root: str | Path | None = None,
    cache: bool = True,
    clip_actions: bool = False,
    download: bool = False,
    action_range: ActionRange = "space",
    action_margin: float = 0.0,
) -> Dataset:
    """Load one dataset, or a mixture of several, by id or path.

    `weights` are the probabilities of drawing from each (default: by size). `clip_actions` accepts actions outside the
    bounds, `download` fetches an id that is not there. Without a task, rewards are the dataset's own; with the discount
    None, there are no mc_returns. With the `action_range` "data", [-1, 1] is the range of the dataset's actions,
    1 + `action_margin` times as wide (`ActionMap.fitted`), in place of the action space.
    Raises `DatasetError`, naming episode and step where there is one.
    """
    names = [ids] if isinstance(ids, str | Path) else list(ids)
    if not names:
        raise DatasetError("no dataset given: name at least one")
    folders = [files.locate(name, root, download) for name in names]
    infos = [files.read_info(folder) for folder in folders]
    if task is None:
        task = Task(infos[0].env_id or infos[0].name, has_success=True)
    spec, actions = _converters(infos[0], achieved_goal)
    parts, returns, solved, digests = [], [], [], []
    for folder, about in zip(folders, infos, strict=True):
        own_spec, own_actions = _converters(about, achieved_goal)
        rows = _cached_rows(folder, about, own_spec, own_actions, clip_actions, cache)
        arrays, episode_returns, episode_success = _transitions(rows, task, discount, about.name)
        parts.append(arrays)
        returns.append(episode_returns)
        solved.append(episode_success)
        digests.append(_digest(rows))
    merged = _merged(infos, returns, solved)
    if action_range == "data":
        own = [actions.to_env(part["actions"]) for part in parts]
        actions = actions.fitted(np.concatenate(own), action_margin)
        for part, executed in zip(parts, own, strict=True):
            part["actions"] = np.clip(actions.from_env(executed), -ACTION_LIMIT, ACTION_LIMIT)
    sizes = [len(part["rewards"]) for part in parts]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
    return Dataset(
        info=merged,
        arrays=_concatenate(parts),
        fingerprint=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        sources=tuple(map(Source, starts, sizes, _weights(sizes, weights))),
        observation_spec=spec,
        action_map=actions,
        task=task,
    )


def environment_entries(observation_space: gym.Space, action_space: gym.Space, spec: EnvSpec | None) -> dict[str, Any]:
    """Return an environment's spaces and specification as metadata.json has them; no spec if it has no JSON form."""
    entries: dict[str, Any] = {"env_spec": None}
    entries |= {"observation_space": serialize_space(observation_space), "action_space": serialize_space(action_space)}
    if (kept := files.storable(spec)) is not None:
        entries["env_spec"] = kept.to_json()
    return entries


def read_environment(entries: dict[str, Any], where: str) -> tuple[gym.Space, gym.Space, EnvSpec | None]:
    """Undo `environment_entries`; raises `DatasetError` naming `where` if the specification does not parse."""
    spaces = [deserialize_space(entries[key]) for key in ("observation_space", "action_space")]
    return spaces[0], spaces[1], files.env_spec({**entries, "dataset_id": where})


def list_datasets(root: str | Path | None = None) -> list[str]:
    """Return the ids of the datasets under a root (None: MINARI_DATASETS_PATH, else Minari's own), sorted."""
    return files.local_ids(root)


def describe(dataset: str | Path, root: str | Path | None = None) -> dict[str, Any]:
    """Return what there is to say of a dataset, as plain values: sizes, spaces, returns, success, scores, origin."""
    data = load(dataset, root=root, clip_actions=True)
    about, spec = data.info, data.info.eval_env_spec or data.info.env_spec
    returns, success = about.episode_returns, about.episode_success
    assert returns is not None
    row: dict[str, Any] = {
        "id": about.name,
        "env": about.env_id,
        "time_limit": spec.max_episode_steps if spec else None,
        "episodes": about.episodes,
        "steps": data.size,
        "episode_length": data.size / about.episodes,
        "observations": str(data.observation_spec),
        "actions": str(about.action_space),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "success": None if success is None else float(success.mean()),
        "terminated": float((data.arrays["masks"] == 0).sum() / about.episodes),
        "ref_min_score": about.ref_min_score,
        "ref_max_score": about.ref_max_score,
        "fingerprint": data.fingerprint,
    }
    return row | {key: about.metadata.get(key) for key in ORIGIN}


def check(dataset: str | Path, root: str | Path | None = None) -> list[str]:
    """Return all problems of a dataset, one line each, none for a sound one; raises `DatasetError` if there is none."""
    folder, found = files.locate(dataset, root), []
    episodes = steps = 0
    try:
        about = files.read_info(folder)
        spec, actions = _converters(about, True)
        for episode in files.read_episodes(files.open_storage(folder, about.metadata), about.name):
            found += files.problems(episode, episodes, spec, actions)
            episodes, steps = episodes + 1, steps + len(episode.rewards)
    except DatasetError as error:
        return [*found, str(error)]
    for key, counted in (("episodes", episodes), ("steps", steps)):
        if getattr(about, key) != counted:
            found.append(f"metadata.json says {getattr(about, key)} {key}, the data has {counted}")
    if about.env_spec is None:
        found.append(
            "no env_spec: the environment cannot be recovered, give one with --env ID, or train on the data alone with "
            "--online-steps 0"
        )
    return found
