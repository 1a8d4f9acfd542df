"""Minari datasets as flat float32 transitions: actions in [-1, 1], the task's rewards, Monte-Carlo returns.

An episode of T steps has T+1 observations, so the last next-observation is the true final one. masks = 1 - terminated.
What a task says of success changes the data as it changes the environment: a successful step of a task that terminates
on success has mask 0 and ends its sequence; with a binary reward the episode is also cut after its last success
(arXiv 2412.07762, released code).
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.serialization import serialize_space

from o2o.data import files, views
from o2o.data.cache import cached
from o2o.data.demonstrations import record
from o2o.data.files import EMBEDDED_PREFIX, DatasetInfo, Episode, check_new, default_root, info, write_dataset as write
from o2o.data.rows import Columns, Rows, Watch, concatenated, contiguous
from o2o.data.spaces import ACTION_LIMIT, STATE, ActionMap, Leaf, ObservationSpec
from o2o.data.task import Part, Task, judge
from o2o.errors import ConfigError, DatasetError, EnvironmentMismatchError

CACHE_VERSION = 4
ORIGIN = ("algorithm_name", "author", "description", "code_permalink", "license", "source_fingerprint")
"""Entries of metadata.json that `describe` repeats."""
RETURN_ROWS = 2**16
"""Rows whose returns-to-go are computed together: as Python numbers they take many times their bytes."""
ActionRange = Literal["space", "data"]
STATE_PREFIX = "state/"
NOTES = "notes/"
"""Prefix of the rows' entries that say what was noticed while they were read."""
PICTURES = ("render_mode", "width", "height", "camera_id", "camera_name", "default_camera_config")
"""Arguments of environments that decide only what is drawn."""
log = logging.getLogger("o2o")

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
    rewards, masks and, unless loaded without a discount, mc_returns `[N]`, and boolean ends `[N]`. The next
    observations are held by index (`o2o.data.rows.Indexed`): `np.asarray` makes an array of them.
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
            return {k: empty(v) for k, v in entry.items()} if isinstance(entry, dict) else np.array(entry[:0])

        return replace(self, arrays=empty(self.arrays))

    def to_json(self) -> dict[str, Any]:
        """Return all that is known of it but the rows, as JSON types; `from_json` reads it."""

        def layout(entry: Any) -> Any:
            if isinstance(entry, dict):
                return {key: layout(value) for key, value in entry.items()}
            return {"dtype": entry.dtype.name, "shape": list(entry.shape[1:])}

        about = self.info
        spaces = environment_entries(about.observation_space, about.action_space, None)
        return {
            "metadata": {**about.metadata, **{key: spaces[key] for key in ("observation_space", "action_space")}},
            "ids": list(about.ids),
            "episodes": about.episodes,
            "steps": about.steps,
            "fingerprint": self.fingerprint,
            "observation": [[list(leaf.path), list(leaf.shape), leaf.image] for leaf in self.observation_spec.leaves],
            "action": asdict(self.action_map),
            "task": asdict(self.task),
            "rows": layout(self.arrays),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], folder: Path) -> Self:
        """Return the dataset without rows that `to_json` wrote to a file in `folder`."""

        def rows(entry: Any) -> Any:
            if isinstance(entry.get("dtype"), str):
                return np.zeros((0, *entry["shape"]), entry["dtype"])
            return {key: rows(value) for key, value in entry.items()}

        about = files.info_of(values["metadata"], folder, values["metadata"].__getitem__)
        leaves = (Leaf(tuple(path), tuple(shape), image) for path, shape, image in values["observation"])
        task = {**values["task"], "env_kwargs": tuple((key, value) for key, value in values["task"]["env_kwargs"])}
        return cls(
            arrays=rows(values["rows"]),
            info=replace(about, ids=tuple(values["ids"]), episodes=values["episodes"], steps=values["steps"]),
            fingerprint=values["fingerprint"],
            sources=(),
            observation_spec=ObservationSpec(tuple(leaves)),
            action_map=ActionMap(**{key: tuple(value) for key, value in values["action"].items()}),
            task=Task(**{**task, "goal": tuple(map(Part.from_json, task.get("goal", ())))}),
        )


def _converters(about: DatasetInfo, achieved_goal: bool, bounded: bool = True) -> tuple[ObservationSpec, ActionMap]:
    try:
        spec = ObservationSpec.from_space(about.observation_space, achieved_goal)
        bounds = ActionMap.bounds_of(about.action_space)
        return spec, bounds.useful() if bounded else bounds
    except EnvironmentMismatchError as error:
        raise DatasetError(f"dataset {about.name}: {error}") from error


@dataclass(frozen=True)
class _Reading:
    """One dataset on disk, and how its rows are read."""

    folder: Path
    about: DatasetInfo
    spec: ObservationSpec
    actions: ActionMap
    clip: bool
    """Accept actions outside the bounds."""
    skip: bool
    """Leave faulty episodes out."""
    success_key: str | None

    def rows(self, cache: bool) -> Rows:
        """Read them, with `cache` through the cache, keyed by the files' digest and all that shapes the rows."""
        if not cache:
            return _read_rows(self)
        key = [CACHE_VERSION, np.__version__, files.file_digest(self.folder), str(self.spec), self.clip, self.skip]
        key += [] if self.success_key is None else [self.success_key]
        return cached(key, lambda: _read_rows(self))


def _read_rows(how: _Reading) -> Rows:
    """Read one dataset: `observation/<key>` `[N + episodes, ...]`, `lengths` `[episodes]`, all else `[N, ...]`.

    The episodes' last observations are behind all others. `state/<key>` are the simulator's, by which tasks are judged.
    Actions are flat, in the environment's units. `notes/*` are texts: episodes that were left out, columns that lose
    digits, entries that are not seen.
    """
    about, spec = how.about, how.spec
    columns, watch = Columns(), Watch(spec, ObservationSpec.from_space(about.observation_space, True))
    skipped: list[str] = []
    rows, frames = about.steps, about.steps + about.episodes
    storage = files.open_storage(how.folder, about.metadata)
    states = views.columns(about.metadata)
    for i, raw in enumerate(files.read_episodes(storage, about.name, named=how.success_key, states=states)):
        if problem := next(files.problems(raw, i, spec, how.actions, how.clip), None):
            _refuse(about.name, problem, how.skip)
            skipped.append(problem)
            continue
        episode = files.tidy(raw)
        watch.episode(episode.observations)
        flat = spec.flatten(episode.observations)
        for key, value in (flat if isinstance(flat, dict) else {STATE: flat}).items():
            columns.add(f"observation/{key}", value[:-1], frames)
            columns.add(f"last/{key}", value[-1:], about.episodes)
        steps = len(episode.rewards)
        unknown = np.full(steps, -1, np.int8)
        for key, value in {
            "actions": episode.actions.reshape(steps, -1).astype(np.float32),
            "rewards": episode.rewards.astype(np.float64),
            "terminated": episode.terminations,
            "truncated": episode.truncations,
            "success": unknown if episode.success is None else episode.success.astype(np.int8),
        }.items():
            columns.add(key, value, rows)
        for key in states:
            if episode.states is None or key not in episode.states:
                raise DatasetError(
                    f"dataset {about.name}: episode {i} has no infos/{key}, which its tasks are judged by"
                )
            columns.add(f"{STATE_PREFIX}{key}", episode.states[key][:-1], rows)
        columns.add("lengths", np.asarray([steps]), about.episodes)
    if "lengths" not in columns:
        raise DatasetError(f"dataset {about.name}: no episode is sound; the first: {skipped[0]}")
    names = [name.removeprefix("last/") for name in columns if name.startswith("last/")]
    found = {f"observation/{name}": columns.joined(f"observation/{name}", f"last/{name}") for name in names}
    found |= {name: columns.take(name) for name in columns}
    known = found["success"] >= 0
    if not known.any():
        del found["success"]
    elif not known.all():
        first = np.concatenate([[0], np.cumsum(found["lengths"])[:-1]])
        without = np.flatnonzero(~known[first])
        problem = (
            f"{len(without)} of {len(first)} episodes, sound episode {without[0]} the first, have no infos/success, "
            "and the others do: add the flags"
        )
        _refuse(about.name, problem, how.skip)
        skipped += [problem] * len(without)
    notes = {"skipped": skipped, "unseen": watch.unseen()}
    notes["digits"] = [f"{name}[{i}] (there in steps of {step:g})" for name, i, step in watch.lost_digits()]
    return found | {NOTES + key: np.asarray(texts, str) for key, texts in notes.items()}


def _refuse(name: str, problem: str, skip: bool) -> None:
    if not skip:
        raise DatasetError(f"dataset {name}: {problem}; or set `skip_bad_episodes` to leave such episodes out")


def tell_versions(about: DatasetInfo) -> None:
    """Log a warning if the packages that a dataset was made with are here in other versions."""
    made = about.metadata.get("made_with")
    changed = []
    for package, number in (made if isinstance(made, dict) else {}).items():
        try:
            here = version(package)
        except PackageNotFoundError:
            here = "none"
        if here != number:
            changed.append(f"{package} {number} (here {here})")
    if changed:
        log.warning(
            "dataset %s was made with %s: contacts, and when a step counts as a success, may differ between its rows "
            "and the environment here; install those versions, or make it again, to compare figures",
            about.name,
            ", ".join(changed),
        )


def _tell(rows: Rows, about: DatasetInfo, achieved_goal: bool | None) -> None:
    """Log what was noticed while the rows were read."""
    tell_versions(about)
    if (known := views.tasks(about.metadata)) and "goal" not in about.metadata:
        log.warning(
            "dataset %s holds several tasks and none is named, so every reward is 0: name one, such as %s-%s",
            about.name,
            views.set_of(about.name),
            next(iter(known)),
        )
    skipped, digits, unseen = (rows[NOTES + key].tolist() for key in ("skipped", "digits", "unseen"))
    if skipped:
        log.warning("dataset %s: %d episodes are left out, the first since %s", about.name, len(skipped), skipped[0])
    if digits:
        log.warning(
            "dataset %s: observation entries %s are so large that their steps vanish in float32 (time stamps? places "
            "far from the origin?): the agent sees constants; subtract an offset from them, in the environment "
            "(gymnasium.wrappers.TransformObservation) and in the dataset, or leave them out",
            about.name,
            ", ".join(digits[:8]),
        )
    if unseen and achieved_goal is None:
        log.warning(
            "dataset %s: %s is left out of the observations, and no other entry follows it: the policy cannot see it. "
            "Set `task.achieved_goal` to True to keep it, or to False to say no more of it",
            about.name,
            ", ".join(unseen),
        )


def _digest(rows: Rows) -> str:
    digest = hashlib.sha256()
    for key in sorted(key for key in rows if not key.startswith(NOTES)):
        digest.update(f"{key} {rows[key].dtype.str} {rows[key].shape}".encode())
        digest.update(np.ascontiguousarray(rows[key]).data)
    return digest.hexdigest()


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


def _judged(rows: Rows, task: Task, name: str) -> tuple[Rows, np.ndarray]:
    """Return the rows with rewards and success by the task's goal, and where all of it holds `[N]`.

    Without a goal they are the dataset's own, and it holds nowhere.
    """
    if not task.goal:
        return rows, np.zeros(len(rows["rewards"]), bool)
    states = {key.removeprefix(STATE_PREFIX): rows[key] for key in rows if key.startswith(STATE_PREFIX)}
    if lacking := {part.column for part in task.goal} - states.keys():
        raise DatasetError(f"dataset {name} has no states {sorted(lacking)}, by which its task is judged")
    rewards, reached = judge(task.goal, states)
    return {**rows, "rewards": rewards, "success": reached.astype(np.int8)}, reached


def _transitions(
    rows: Rows, task: Task, discount: float | None, name: str
) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
    """Return the arrays of one dataset under a task, with raw returns and success of all its episodes."""
    rows, reached = _judged(rows, task, name)
    lengths, flags = rows["lengths"], rows.get("success")
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    episode = np.repeat(np.arange(len(lengths)), lengths)
    keep = np.ones(len(episode), bool) if flags is None else flags >= 0
    used = keep[first]  # episodes
    success = task.success(rows["rewards"], None if flags is None else flags > 0)
    if task.binary and success is None:
        raise DatasetError(
            f"dataset {name}: a binary reward needs infos['success'] in every episode; use the dense reward"
        )
    for row in task.strange_failures(rows["rewards"], success)[:1]:
        raise DatasetError(
            f"dataset {name}: episode {episode[row]}, step {row - first[episode[row]]} is no success and has the raw "
            f"reward {float(rows['rewards'][row])}, but the sparse task {task.name} declares "
            f"{task.raw_failure_reward} for such steps; set raw_failure_reward of its Task, or sparse to False"
        )
    returns = np.add.reduceat(rows["rewards"], first)
    solved = None if success is None else np.logical_or.reduceat(success, first)
    terminated, ends = rows["terminated"] | reached, rows["terminated"] | rows["truncated"]
    ends[first + lengths - 1] = True
    if task.terminate_on_success and success is not None and solved is not None:
        terminated, ends = terminated | success, ends | success
        if task.binary:
            positions = np.where(success, np.arange(len(episode)), -1)
            last = np.maximum.reduceat(positions, first)
            keep &= (np.arange(len(episode)) <= last[episode]) | ~solved[episode]
    if task.data_share < 1.0:
        keep &= episode < max(int(task.data_share * len(lengths)), 1)
    if task.only_successes:
        if solved is None:
            raise DatasetError(
                f"dataset {name}: the task keeps only episodes that succeed, and which do is not known (there is no "
                "infos['success']); set `task.only_successes` to False"
            )
        keep &= solved[episode]
        if not keep.any():
            raise DatasetError(f"dataset {name}: no episode succeeds, and the task keeps only those that do")
    now, size = np.flatnonzero(keep), len(episode)
    after = np.where(now == (first + lengths - 1)[episode[keep]], size + episode[keep], now + 1)
    rewards, masks = task.rewards(rows["rewards"], success)[keep], (~terminated[keep]).astype(np.float32)
    states = {
        key.removeprefix("observation/"): contiguous(frames, now, after)
        for key, frames in rows.items()
        if key.startswith("observation/")
    }
    observed, following = (
        states[STATE][i] if set(states) == {STATE} else {key: pair[i] for key, pair in states.items()} for i in (0, 1)
    )
    arrays = {
        "observations": observed,
        "actions": rows["actions"][keep],
        "rewards": rewards,
        "masks": masks,
        "next_observations": following,
        "ends": ends[keep],
    }
    if discount is not None:
        arrays["mc_returns"] = monte_carlo_returns(rewards, masks, ends[keep], discount, task.failure_reward)
    return arrays, returns[used], None if solved is None else solved[used]


def _concatenate(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the arrays of several datasets as those of one."""
    if len(parts) == 1:
        return parts[0]
    pairs = [(part.pop("observations"), part.pop("next_observations")) for part in parts]
    both = ("observations", "next_observations")
    if isinstance(pairs[0][0], dict):
        found = {key: concatenated([(now[key], after[key]) for now, after in pairs]) for key in pairs[0][0]}
        observed = {name: {key: pair[i] for key, pair in found.items()} for i, name in enumerate(both)}
    else:
        observed = dict(zip(both, concatenated(pairs), strict=True))
    return observed | {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _weights(sizes: Sequence[int], weights: Sequence[float] | None) -> list[float]:
    values = list(map(float, sizes if weights is None else weights))
    if len(values) != len(sizes) or min(values) < 0 or not 0 < sum(values) < np.inf:
        raise DatasetError(f"weights {weights} do not fit {len(sizes)} dataset(s): give one non-negative number each")
    return [value / sum(values) for value in values]


def named_first(infos: Sequence[DatasetInfo]) -> DatasetInfo:
    """Return the dataset of a mixture whose environment counts: the first that names one, or else the first."""
    return next((about for about in infos if about.env_spec is not None or about.eval_env_spec is not None), infos[0])


FEW = 64
"""A reward of at most so many values is told by them; one of more is dense."""


def _conventions(about: DatasetInfo, rewards: np.ndarray | None) -> dict[str, Any]:
    """Return what is known of how a dataset's numbers are meant; `rewards` None: they do not count."""
    values = None if rewards is None else np.unique(rewards)
    return {
        "steps per second": files.rate_of(about),
        "robot": files.said(about, "robot_type"),
        "environment of the source": files.said(about, "env_args", "env_name"),
        "controller": files.said(about, "env_args", "env_kwargs", "controller_configs"),
        "names of entries": files.said(about, "names"),
        "rewards": None if values is None else values[:FEW].tolist() if len(values) <= FEW else "dense",
    }


def _tell_differences(infos: Sequence[DatasetInfo], known: Sequence[dict[str, Any]]) -> None:
    """Log what the datasets of a mixture say differently of how their numbers are meant.

    Rewards differ if the two values of one set are none of the other's.
    """
    for about, theirs in zip(infos[1:], known[1:], strict=True):
        found = []
        for key, ours in known[0].items():
            pair = (ours, theirs[key])
            if key == "rewards":
                fewer, more = sorted(pair, key=lambda values: FEW + 1 if values == "dense" else len(values or ()))
                differ = fewer is not None and len(fewer) == 2 and (more == "dense" or not {*fewer} <= {*more})
            else:
                differ = None not in pair and pair[0] != pair[1]
            if differ:
                found.append(f"{key} {' against '.join(str(value)[:60] for value in pair)}")
        if found:
            log.warning(
                "datasets %s and %s are mixed and differ: %s; make sure that their actions, observations and rewards "
                "mean the same",
                infos[0].name,
                about.name,
                "; ".join(found),
            )


def _check_one_environment(infos: Sequence[DatasetInfo]) -> None:
    """Raise `DatasetError` if datasets name different environments, or one environment with other arguments."""

    def named(about: DatasetInfo) -> str | None:
        if about.env_spec is None:
            return None
        kwargs = {key: value for key, value in about.env_spec.kwargs.items() if key not in PICTURES}
        return f"{about.env_spec.id} {json.dumps(kwargs, sort_keys=True, default=str)}"

    known = [(about.name, name) for about in infos if (name := named(about)) is not None]
    for name, environment in known[1:]:
        if environment != known[0][1]:
            raise DatasetError(
                f"datasets {known[0][0]} and {name} cannot be mixed as they are: they name different environments, "
                f"{known[0][1][:120]} and {environment[:120]}; give the one to train in as `env`, or mix "
                "datasets of one"
            )


def _merged(
    infos: Sequence[DatasetInfo], returns: list[np.ndarray], solved: list[np.ndarray | None], task: Task
) -> DatasetInfo:
    head = named_first(infos)
    if len({flags is None for flags in solved}) > 1:
        without = next(about.name for about, flags in zip(infos, solved, strict=True) if flags is None)
        if task.terminate_on_success:
            raise DatasetError(
                f"dataset {without} has no infos['success'] and the others have: the task ends episodes at success, so "
                "it must be known in all (or set `task.terminate_on_success` to False)"
            )
        log.warning("dataset %s has no infos['success'] and the others have: that of the mixture is unknown", without)
    for other in infos:
        for key in ("observation_space", "action_space"):
            if getattr(other, key) != getattr(head, key):
                raise DatasetError(
                    f"datasets {head.name} and {other.name} cannot be mixed: "
                    f"{key} {getattr(head, key)} against {getattr(other, key)}"
                )
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
    achieved_goal: bool | None = None,
    root: str | Path | None = None,
    cache: bool = True,
    clip_actions: bool = False,
    skip_bad_episodes: bool = False,
    download: bool = False,
    action_range: ActionRange = "space",
    action_margin: float = 0.0,
    env: str | None = None,
) -> Dataset:
    """Load one dataset, or a mixture of several, by id or path.

    `weights` are the probabilities of drawing from each (default: by size). `clip_actions` accepts actions outside the
    bounds, `skip_bad_episodes` leaves out episodes with other faults and logs it, `download` fetches an id that is not
    there. Without a task, rewards are the dataset's own; with the discount None, there are no mc_returns.
    `achieved_goal` None: the task says whether that entry is kept. With the `action_range` "data", [-1, 1] is the range
    of the dataset's actions, 1 + `action_margin` times as wide (`ActionMap.fitted`), in place of the action space,
    which then needs no bounds. Datasets of different environments are mixed only if `env` names the one that counts;
    beside datasets that name none, one that does counts. What the sources of a mixture say differently is logged.
    Raises `DatasetError`, naming episode and step where there is one.
    """
    names = [ids] if isinstance(ids, str | Path) else list(ids)
    if not names:
        raise DatasetError("no dataset given: name at least one")
    folders = [files.locate(name, root, download) for name in names]
    infos = [files.read_info(folder, name) for folder, name in zip(folders, names, strict=True)]
    if env is None:
        _check_one_environment(infos)
    if task is None:
        head = named_first(infos)
        task = Task(head.env_id or head.name, has_success=True).judged(head.metadata)
    keep_goal, bounded = task.achieved_goal if achieved_goal is None else achieved_goal, action_range == "space"
    spec, actions = _converters(infos[0], keep_goal, bounded)
    parts, returns, solved, digests, conventions = [], [], [], [], []
    for folder, about in zip(folders, infos, strict=True):
        converters = _converters(about, keep_goal, bounded)
        how = _Reading(folder, about, *converters, clip_actions, skip_bad_episodes, task.success_key)
        rows = how.rows(cache)
        _tell(rows, about, achieved_goal)
        digests.append(_digest(rows))
        if len(folders) > 1:
            conventions.append(_conventions(about, None if task.binary else rows["rewards"]))
        arrays, episode_returns, episode_success = _transitions(rows, task, discount, about.name)
        parts.append(arrays)
        returns.append(episode_returns)
        solved.append(episode_success)
        del rows
    merged = _merged(infos, returns, solved, task)
    if conventions:
        _tell_differences(infos, conventions)
    shaped = [np.clip(part["actions"], actions.low, actions.high).reshape(-1, *actions.shape) for part in parts]
    if action_range == "data":
        try:
            actions = actions.fitted(np.concatenate(shaped), action_margin)
        except EnvironmentMismatchError as error:
            raise DatasetError(f"dataset {merged.name}: {error}") from error
    for part, executed in zip(parts, shaped, strict=True):
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
        entries |= {"env_spec": kept.to_json(), **files.vouchers(kept)}
    return entries


def read_environment(entries: dict[str, Any], where: str) -> tuple[gym.Space, gym.Space, EnvSpec | None]:
    """Undo `environment_entries`; raises `DatasetError` naming `where` for what cannot be read."""
    spaces = [files.read_space(entries, key, where) for key in ("observation_space", "action_space")]
    return spaces[0], spaces[1], files.env_spec({**entries, "dataset_id": where})


def list_datasets(root: str | Path | None = None) -> list[str]:
    """Return the ids of the datasets under a root (None: MINARI_DATASETS_PATH, else Minari's own), sorted."""
    return files.local_ids(root)


def describe(dataset: str | Path, root: str | Path | None = None, task: Task | None = None) -> dict[str, Any]:
    """Return what there is to say of a dataset, as plain values: sizes, spaces, returns, success, scores, origin.

    `task`: as in `load`; what `o2o.envs.describe` says knows the dataset's own.
    """
    data = load(dataset, root=root, clip_actions=True, discount=None, task=task)
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
        "terminated": float(((data.arrays["masks"] == 0) & data.arrays["ends"]).sum() / about.episodes),
        "ref_min_score": about.ref_min_score,
        "ref_max_score": about.ref_max_score,
        "fingerprint": data.fingerprint,
    }
    row |= {key: about.metadata.get(key) for key in ORIGIN}
    if known := views.tasks(about.metadata):
        stem = views.set_of(about.name) if data.task.goal else about.name
        row |= {"goal_rows": int((data.arrays["masks"] == 0).sum()) if data.task.goal else None}
        row |= {"tasks": {f"{stem}-{name}": entry["goal_rows"] for name, entry in known.items()}}
    return row


def check(dataset: str | Path, root: str | Path | None = None) -> list[str]:
    """Return all problems of a dataset, one line each, none for a sound one; raises `DatasetError` if there is none.

    That it names no environment is logged, and is no problem: it can be trained on.
    """
    folder, found = files.locate(dataset, root), []
    episodes = steps = 0
    try:
        about = files.read_info(folder, dataset)
        spec, actions = _converters(about, True)
        known = 0
        for episode in files.read_episodes(files.open_storage(folder, about.metadata), about.name):
            bad = list(files.problems(episode, episodes, spec, actions))
            found += bad or files.outside_space(episode, episodes, about.observation_space)
            known += episode.success is not None
            episodes, steps = episodes + 1, steps + len(episode.rewards)
        if 0 < known < episodes:
            found.append(f"{episodes - known} of {episodes} episodes have no infos/success, and the others do")
    except DatasetError as error:
        return [*found, str(error)]
    for key, counted in (("episodes", episodes), ("steps", steps)):
        if getattr(about, key) != counted:
            found.append(f"metadata.json says {getattr(about, key)} {key}, the data has {counted}")
    if about.env_spec is None:
        log.warning(
            "dataset %s names no environment: train on the data alone (`online_steps` 0), or give one with `env`",
            about.name,
        )
    elif missing := files.missing_entry_point(about.env_spec):
        found.append(f"environment {about.env_spec.id} cannot be made, {missing}: install it, or give one with `env`")
    return found
