"""Find, read, check and write the files of Minari datasets."""

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import METADATA_FILE_NAME, MinariStorage
from minari.namespace import NAMESPACE_METADATA_FILENAME
from minari.serialization import deserialize_space

from o2o.data import views
from o2o.data.spaces import ActionMap, ObservationSpec, not_finite
from o2o.data.task import Task, as_flags, success_key
from o2o.errors import DatasetError, EnvironmentMismatchError, suggest
from o2o.files import parse_json, whole_folder
from o2o.trust import trusted, vouched, voucher

EMBEDDED_PREFIX = "o2o/embedded/"
"""Ids of the datasets that o2o makes itself."""
OGBENCH_PREFIX = "ogbench/"
"""Ids of the datasets that o2o makes with OGBench's oracles."""
CAN_BE_MADE = (
    *(EMBEDDED_PREFIX + name for name in ("pointmaze-umaze", "pointmaze-medium", "pointmaze-pixels")),
    *(f"{OGBENCH_PREFIX}{name}-play" for name in ("cube-single", "cube-double", "cube-triple", "scene")),
    *(f"{OGBENCH_PREFIX}{name}-play" for name in ("puzzle-3x3", "puzzle-4x4")),
)
"""Datasets that `o2o data make` makes, without their version; `o2o.envs` has the recipes."""
NUMBERS = "fiub"
"""Kinds of NumPy types that hold real numbers or flags."""
WATCHERS = ("HumanRendering", "RenderCollection", "RecordVideo", "RecordEpisodeStatistics")
"""Wrappers of Gymnasium that look on and change nothing."""


@dataclass(frozen=True)
class Episode:
    """One episode of T steps in the environment's units: T+1 observations (nested as the space is), T of the rest."""

    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    success: np.ndarray | None = None
    """Success after each step, `[T]`; None if the environment does not say."""
    seed: int | None = None
    intervened: np.ndarray | None = None
    """Whether a human acted in each step, `[T]`; written as `infos/intervened`. None if unknown."""
    states: Mapping[str, np.ndarray] | None = None
    """States of the simulator at each observation, `[T + 1, ...]` by name; written as `infos/<name>`."""


@dataclass(frozen=True, eq=False)
class DatasetInfo:
    """The metadata of a dataset, or of several mixed ones. The fields `episode_*` are set when it is loaded."""

    ids: tuple[str, ...]
    env_id: str | None
    env_spec: EnvSpec | None
    eval_env_spec: EnvSpec | None
    observation_space: gym.Space
    action_space: gym.Space
    ref_min_score: float | None
    ref_max_score: float | None
    episodes: int
    steps: int
    metadata: Mapping[str, Any]
    """metadata.json of the first dataset."""
    episode_returns: np.ndarray | None = None
    """Raw returns of all episodes, `[n]`."""
    episode_success: np.ndarray | None = None
    """Whether any step of the episode succeeded, `[n]`; None where success is unknown."""
    trusted: bool = False
    """Whether the code that its specifications name may run, though no registered environment has it (`o2o.trust`)."""

    @property
    def name(self) -> str:
        """The ids as one line."""
        return " + ".join(self.ids)

    def normalized(self, returns: Any, task: Task | None = None) -> np.ndarray | None:
        """Return 100 * (return - min) / (max - min), or None without reference scores.

        The result is also None if `task` makes an environment other than that of the reference scores.
        """
        if self.ref_min_score is None or self.ref_max_score is None or self.ref_max_score == self.ref_min_score:
            return None
        spec = self.eval_env_spec or self.env_spec
        if task is not None and spec is not None:
            if any(spec.kwargs.get(key, value) != value for key, value in task.env_kwargs):
                return None
        span = self.ref_max_score - self.ref_min_score
        return 100.0 * (np.asarray(returns, np.float64) - self.ref_min_score) / span


def default_root() -> Path:
    """Return MINARI_DATASETS_PATH, or Minari's own default."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def local_ids(root: str | Path | None = None) -> list[str]:
    """Return the sorted ids of the datasets under a root. Raises `DatasetError` if the root is a file."""
    base = Path(root) if root is not None else default_root()
    if base.is_file():
        raise DatasetError(f"{base} is a file, expected a folder of datasets: give another root")
    return sorted(
        path.parent.parent.relative_to(base).as_posix() for path in base.glob(f"**/data/{METADATA_FILE_NAME}")
    )


def locate(dataset: str | Path, root: str | Path | None = None, download: bool = False) -> Path:
    """Return the `data` folder of a dataset given by id or by path, or that of a set whose task it names (`views`).

    Raises `DatasetError` if it is not there, with similar ids and how to get it.
    """
    base = Path(root) if root is not None else default_root()
    for candidate in (Path(dataset) / "data", Path(dataset), base / dataset / "data"):
        if (candidate / METADATA_FILE_NAME).is_file():
            return candidate
    name = str(dataset)
    for stored in views.candidates(name):
        data = base / stored / "data"
        if (data / METADATA_FILE_NAME).is_file() and views.tasks(read_metadata(data)):
            return data
    if (base / name / "data").is_dir() or (Path(name) / "data").is_dir():
        raise DatasetError(f"dataset {name}: its data folder has no {METADATA_FILE_NAME}; copy or download it again")
    if download:
        return _download(name, base)
    near = suggest(name, local_ids(base), "", count=3)
    hint = f"{near} Otherwise " if near else ""
    raise DatasetError(f"dataset {name!r} is not under {base}: {hint}{_source_of(name)}, or set MINARI_DATASETS_PATH")


def _source_of(name: str) -> str:
    """Return how to get a dataset that is not there, or that nobody can make it under this name."""
    made = views.set_of(name)
    if not name.startswith((EMBEDDED_PREFIX, OGBENCH_PREFIX)):
        return f"get it with `minari download {name}` (needs the network and o2o[hub])"
    if made in CAN_BE_MADE:
        return f"get it with `o2o data make {made.removeprefix(EMBEDDED_PREFIX)}`"
    prefix = EMBEDDED_PREFIX if name.startswith(EMBEDDED_PREFIX) else OGBENCH_PREFIX
    family = [known.removeprefix(prefix) for known in CAN_BE_MADE if known.startswith(prefix)]
    hint = suggest(made.removeprefix(prefix), family).rstrip("?")
    return f"o2o makes no {made!r}, {hint}: give another name, or a path"


def _download(name: str, base: Path) -> Path:
    previous = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(base)
    try:
        base.mkdir(parents=True, exist_ok=True)
        parse_dataset_id(name)
        minari.download_dataset(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"dataset {name!r} could not be downloaded ({type(error).__name__}: {reason}); is there a network? "
            f"Otherwise copy its folder to {base / name}"
        ) from error
    finally:
        if previous is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = previous
    return base / name / "data"


def read_metadata(data: Path) -> dict[str, Any]:
    """Return metadata.json. Raises `DatasetError` if it cannot be read or lacks an entry that o2o needs."""
    try:
        metadata = parse_json((data / METADATA_FILE_NAME).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{data / METADATA_FILE_NAME} is not readable JSON ({error}); download the dataset again"
        ) from error
    word = lambda value: isinstance(value, str)  # noqa: E731
    count = lambda value: _number(value) and value >= 0 and value == int(value)  # noqa: E731
    score = lambda value: value is None or _number(value)  # noqa: E731
    fits = {"dataset_id": word, "total_episodes": count, "total_steps": count, "data_format": word}
    fits |= {"ref_min_score": score, "ref_max_score": score}
    entries = metadata if isinstance(metadata, dict) else {}
    missing = [key for key, fit in fits.items() if not fit(entries.get(key))]
    if missing:
        raise DatasetError(
            f"{data / METADATA_FILE_NAME} lacks {', '.join(missing)}, or has none of a sense; is this a Minari dataset?"
        )
    return metadata


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def env_spec(metadata: Mapping[str, Any], key: str = "env_spec") -> EnvSpec | None:
    """Return the environment specification under a key, or None. Raises `DatasetError` if it cannot be parsed."""
    text = metadata.get(key)
    if not text:
        return None
    try:
        for old in ('"order_enforce": true,', '"apply_api_compatibility": false,', '"autoreset": false, '):
            text = text.replace(old, "")  # written by Gymnasium before 1.0
        spec = EnvSpec.from_json(text)
        kinds = {"entry_point": str | None, "kwargs": dict, "max_episode_steps": int | None}
        if wrong := [name for name, kind in kinds.items() if not isinstance(getattr(spec, name), kind)]:
            raise TypeError(f"its {wrong[0]} is {getattr(spec, wrong[0])!r}")
        return portable(spec)
    except Exception as error:
        raise DatasetError(f"dataset {metadata['dataset_id']}: its {key} cannot be read ({error})") from error


def portable(spec: EnvSpec) -> EnvSpec:
    """Return what of a specification decides how an environment behaves.

    Left out are o2o's own wrappers, which `o2o.envs.make` adds again, wrappers that only look on, and a `render_mode`
    that opens windows or collects pictures.
    """
    kwargs = dict(spec.kwargs)
    mode = str(kwargs.get("render_mode"))
    if mode == "human" or mode.endswith("_list"):
        del kwargs["render_mode"]
    others = (
        wrapper
        for wrapper in spec.additional_wrappers
        if not wrapper.entry_point.startswith("o2o.")
        and not (wrapper.entry_point.startswith("gymnasium.wrappers.") and wrapper.name in WATCHERS)
    )
    return replace(spec, kwargs=kwargs, additional_wrappers=tuple(others))


def storable(spec: EnvSpec | None) -> EnvSpec | None:
    """Return a specification for a dataset (`portable`); None if it has no JSON form."""
    if spec is None:
        return None
    spec = portable(spec)
    try:
        spec.to_json()
    except (TypeError, ValueError):  # registered with a class, or with an argument that is no JSON
        return None
    return spec


LIBRARIES = ("gymnasium", "gymnasium_robotics", "o2o", "ogbench")
"""Packages whose environments o2o knows."""


def vouchers(*specs: EnvSpec | None) -> dict[str, list[str]]:
    """Return the entry of metadata.json by which a specification's code may run for this user (`o2o.trust`).

    Only for environments that this program has registered, and none for those that every o2o has.
    """
    found = []
    for spec in specs:
        known = None if spec is None else gym.registry.get(spec.id)
        if spec is None or known is None or known.entry_point != spec.entry_point:
            continue
        if str(spec.entry_point).partition(".")[0] not in LIBRARIES:
            found.append(voucher([str(spec.entry_point)], spec.kwargs))
    return {"vouched": [proof for proof in found if proof is not None]} if any(found) else {}


def _vouched_for(metadata: Mapping[str, Any], *specs: EnvSpec | None) -> bool:
    """Whether this user vouched for every one of the specifications."""
    proofs = metadata.get("vouched")
    if not isinstance(proofs, list):
        return False
    return all(any(vouched(proof, [str(spec.entry_point)], spec.kwargs) for proof in proofs) for spec in specs if spec)


def open_storage(data: Path, metadata: Mapping[str, Any]) -> MinariStorage:
    """Open the data of a dataset. Raises `DatasetError` if the data or the spaces cannot be read."""
    try:
        return MinariStorage.read(data)
    except Exception as error:
        raise DatasetError(f"dataset {metadata['dataset_id']}: cannot be opened at {data} ({error})") from error


def info(dataset: str | Path, root: str | Path | None = None, download: bool = False) -> DatasetInfo:
    """Return a dataset's metadata without reading its data. Raises `DatasetError`."""
    return read_info(locate(dataset, root, download), dataset)


def read_info(data: Path, name: str | Path | None = None) -> DatasetInfo:
    """Return the metadata in a `data` folder; of the task of the set, if `name` names one. Raises `DatasetError`."""
    metadata = views.viewed(read_metadata(data), data.parent.name, str(name or ""))
    return info_of(metadata, data, lambda key: getattr(open_storage(data, metadata), key))


def info_of(metadata: Mapping[str, Any], folder: Path, space_of: Callable[[str], Any]) -> DatasetInfo:
    """Return what a metadata.json in `folder` says; `space_of(key)` finds a space that is not in it.

    Raises `DatasetError`.
    """
    spec, eval_spec, name = env_spec(metadata), env_spec(metadata, "eval_env_spec"), metadata["dataset_id"]
    seen, done = (
        read_space(metadata, key, name) if key in metadata else space_of(key)
        for key in ("observation_space", "action_space")
    )
    return DatasetInfo(
        ids=(name,),
        env_id=spec.id if spec else None,
        env_spec=spec,
        eval_env_spec=eval_spec,
        observation_space=seen,
        action_space=done,
        ref_min_score=metadata.get("ref_min_score"),
        ref_max_score=metadata.get("ref_max_score"),
        episodes=int(metadata["total_episodes"]),
        steps=int(metadata["total_steps"]),
        metadata=metadata,
        trusted=trusted(folder) or _vouched_for(metadata, spec, eval_spec),
    )


def read_space(metadata: Mapping[str, Any], key: str, name: str) -> gym.Space:
    """Return the space under a key of metadata.json. Raises `DatasetError` if it cannot be read."""
    try:
        return deserialize_space(metadata[key])
    except Exception as error:
        raise DatasetError(f"dataset {name}: its {key} cannot be read ({error!r})") from error


def said(about: DatasetInfo, *path: str) -> Any:
    """Return what a dataset's metadata say under nested keys of its `source`; None if they do not."""
    value = about.metadata.get("source")
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def rate_of(about: DatasetInfo) -> float | None:
    """Return a dataset's steps per second: `fps` of its source, or robosuite's `control_freq`; None if unknown."""
    rates = (said(about, "fps"), said(about, "env_args", "env_kwargs", "control_freq"))
    return next((float(rate) for rate in rates if _number(rate) and rate > 0), None)


def file_digest(data: Path) -> str:
    """Return the sha256 of the names and contents of all files of the dataset; its location does not matter."""
    digest = hashlib.sha256()
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        digest.update(path.relative_to(data).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_episodes(
    storage: MinariStorage, name: str, start: int = 0, named: str | None = None, states: Iterable[str] = ()
) -> Iterator[Episode]:
    """Yield the episodes from number `start` on as they are stored: see `problems`, then `tidy`.

    `named` is the entry of the infos that says whether a step succeeds, where it is there (`Task.success_key`);
    `states` are entries of the infos that are states of the simulator.
    Raises `DatasetError` with the number of an episode that cannot be read.
    """
    try:
        total = int(storage.total_episodes)
    except Exception as error:
        raise DatasetError(f"dataset {name}: its metadata cannot be read ({error})") from error
    if total == 0:
        raise DatasetError(f"dataset {name}: it is empty (0 episodes); record or download it again")
    raw, i = iter(storage.get_episodes(range(start, total))), start
    while i < total:
        try:
            episode = next(raw)
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise DatasetError(
                f"dataset {name}: episode {i} of {total} cannot be read, the file is corrupt or truncated ({reason}); "
                "copy or download it again"
            ) from error
        infos = episode.get("infos") or {}
        success = success_key(infos, named)
        yield Episode(
            observations=episode["observations"],
            actions=np.asarray(episode["actions"]),
            rewards=np.asarray(episode["rewards"]),
            terminations=np.asarray(episode["terminations"]),
            truncations=np.asarray(episode["truncations"]),
            success=None if success is None else np.asarray(infos[success]),
            states={key: np.asarray(infos[key]) for key in states if key in infos} or None,
        )
        i += 1


def tidy(episode: Episode) -> Episode:
    """Return an episode with rewards, flags and success as `[T]`; they may be stored as `[T, 1]`, flags as 0 and 1.

    Success flags may have a row more, of the reset, and several columns, of which any counts. Raises `ValueError`,
    saying what is wrong, for columns of another shape and for values that are no flags or no numbers.
    """
    rewards = _one_column("rewards", episode.rewards)
    if rewards.dtype.kind not in NUMBERS:
        raise ValueError(f"rewards are {rewards.dtype}, expected numbers")
    steps, success = len(rewards), episode.success
    if success is not None:
        if success.ndim == 0 or len(success) not in (steps, steps + 1) or (steps and not success.size):
            raise ValueError(
                f"infos/success has shape {success.shape} for {steps} steps, expected a flag for each step, or one more"
            )
        success = _flags("infos/success", success[len(success) - steps :]).reshape(steps, -1).any(axis=1)
    flags = {key: _flags(key, _one_column(key, getattr(episode, key))) for key in ("terminations", "truncations")}
    return replace(episode, rewards=rewards, success=success, **flags)


def _one_column(name: str, values: np.ndarray) -> np.ndarray:
    """Return a column `[T]` or `[T, 1]` as `[T]`."""
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise ValueError(f"{name} have shape {values.shape}, expected one value per step ([T] or [T, 1])")
    return values


def _flags(name: str, values: np.ndarray) -> np.ndarray:
    try:
        return as_flags(values)
    except ValueError as error:
        raise ValueError(f"{name} has the value {error}, expected true or false (1 or 0)") from None


def problems(
    episode: Episode, index: int, spec: ObservationSpec, actions: ActionMap, clip: bool = False
) -> Iterator[str]:
    """Yield one line for each error in an episode. With `clip`, actions outside the bounds are allowed."""
    where = f"episode {index}"
    try:
        episode = tidy(episode)
        arrays = _numbers(episode, spec)
    except (ValueError, EnvironmentMismatchError) as error:
        yield f"{where}{error}" if str(error).startswith(" ") else f"{where}: {error}"
        return
    for key in ("terminations", "truncations"):
        if len(early := np.flatnonzero(getattr(episode, key)[:-1])):
            yield (
                f"{where}, step {early[0]}: {key} is true there, and the episode goes on for "
                f"{len(episode.rewards) - 1 - early[0]} steps: split it there"
            )
    for key, array in arrays.items():
        if len(bad := np.argwhere(not_finite(array))):
            step, entry = bad[0]
            yield f"{where}, step {step}: {key} has {array[step, entry]} in entry {entry}; remove the episode"
    if arrays["actions"].shape[1] != actions.dim:
        yield f"{where}: actions have {arrays['actions'].shape[1]} entries, the action space {actions.dim}"
    elif not clip and (out := np.argwhere(actions.outside(arrays["actions"].reshape(-1, *actions.shape)))).size:
        step, entry = out[0]
        yield (
            f"{where}, step {step}: action entry {entry} is {arrays['actions'][step, entry]:.6g}, outside the bounds "
            f"[{actions.low[entry]:g}, {actions.high[entry]:g}]; set `clip_actions` to clip them"
        )


def _numbers(episode: Episode, spec: ObservationSpec) -> dict[str, np.ndarray]:
    """Return the columns of a tidy episode that hold numbers, by name, as `[T or T + 1, entries]`.

    Raises `ValueError` or `EnvironmentMismatchError` if lengths, shapes or types do not fit.
    """
    steps = len(episode.rewards)
    if steps == 0:
        raise ValueError(" has no steps; delete it")
    if not episode.actions.ndim:
        raise ValueError(f"actions have shape (), expected one action for each of {steps} steps")
    for key in ("actions", "terminations", "truncations"):
        if len(getattr(episode, key)) != steps:
            raise ValueError(f" has {len(getattr(episode, key))} {key} for {steps} rewards")
    arrays = {"actions": episode.actions.reshape(steps, -1), "rewards": episode.rewards.reshape(steps, -1)}
    for key, state in (episode.states or {}).items():
        if state.ndim != 2 or len(state) != steps + 1:
            raise ValueError(f" has infos/{key} of shape {state.shape} for {steps} steps, expected {steps + 1} rows")
    for leaf in spec.leaves:
        array = leaf.of(episode.observations)
        if len(array) != steps + 1:
            raise ValueError(f" has {len(array)} observations for {steps} steps, expected {steps + 1}")
        if not leaf.image:
            arrays[f"observations ({leaf.name})"] = array.reshape(steps + 1, -1)
    for key, array in arrays.items():
        if array.dtype.kind not in NUMBERS:
            raise ValueError(f"{key} are {array.dtype}, expected numbers")
    return arrays


def outside_space(episode: Episode, index: int, space: gym.Space, path: tuple[str | int, ...] = ()) -> Iterator[str]:
    """Yield one line for each Box of an observation space that a number of a sound episode lies outside of."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        parts = space.spaces.items() if isinstance(space, gym.spaces.Dict) else enumerate(space.spaces)
        for key, part in parts:
            yield from outside_space(episode, index, part, (*path, key))
    elif isinstance(space, gym.spaces.Box):
        name, values = "/".join(map(str, path)) or "observation", episode.observations
        for key in path:
            values = values[key]
        values = np.asarray(values, np.float64).reshape(-1, int(np.prod(space.shape)))
        low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
        slack = 1e-5 * np.maximum(1.0, np.where(np.isfinite(high - low), high - low, 1.0))
        if len(out := np.argwhere((values < low - slack) | (values > high + slack))):
            step, entry = out[0]
            yield (
                f"episode {index}, step {step}: observations ({name}) have {values[step, entry]:.6g} in entry {entry}, "
                f"outside their space [{low[entry]:g}, {high[entry]:g}]; widen the space, or look at the sensor"
            )


def missing_entry_point(spec: EnvSpec) -> str | None:
    """Return what is missing of a specification's entry point `module:name`, None if it seems to be there.

    That of the registry wins for an id that is registered. No code of the module runs.
    """
    entry = gym.registry.get(spec.id, spec).entry_point
    if not isinstance(entry, str):
        return None
    module, _, name = entry.partition(":")
    loaded, path = sys.modules.get(module), None
    if loaded is not None:
        return None if hasattr(loaded, name.partition(".")[0]) else f"module {module} has no {name}"
    found, parts = None, module.split(".")
    for i in range(len(parts)):
        found = PathFinder.find_spec(".".join(parts[: i + 1]), path if i else [*sys.path, str(Path.cwd())])
        if found is None:
            return f"there is no module {module} here"
        path = found.submodule_search_locations
    if found is not None and found.origin is not None and found.origin.endswith(".py"):
        text = Path(found.origin).read_text(errors="replace")
        if re.search(rf"\b{re.escape(name.partition('.')[0])}\b|import \*", text) is None:
            return f"module {module} has no {name}"
    return None


def _target(dataset_id: str, root: str | Path | None) -> Path:
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise DatasetError(f"dataset id {dataset_id!r} is not of the form namespace/name-v0") from error
    return (Path(root) if root is not None else default_root()) / dataset_id


def work_folder(target: Path, kind: str) -> Path:
    """Return the hidden folder beside a dataset in which it is made, episode by episode."""
    return target.with_name(f".{target.name}.{kind}")


def check_new(dataset_id: str, root: str | Path | None = None) -> Path:
    """Return the folder for a new dataset. Raises `DatasetError` if the id is malformed or exists already."""
    target = _target(dataset_id, root)
    if target.exists():
        raise DatasetError(f"dataset {dataset_id} exists already at {target}; choose another id or delete it")
    return target


def write_dataset(
    dataset_id: str,
    episodes: Iterable[Episode],
    *,
    observation_space: gym.Space,
    action_space: gym.Space,
    spec: EnvSpec | None,
    eval_spec: EnvSpec | None = None,
    root: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write episodes as a Minari dataset and return its folder, which appears whole or not at all.

    With `overwrite`, it takes the place of an earlier one, which stays until then. A specification without a JSON form
    is left out; training on the dataset then needs `--env`. Raises `DatasetError` if the id is malformed or exists
    already, the folder cannot be written, or an episode has no steps.
    """
    base = Path(root) if root is not None else default_root()
    target = _target(dataset_id, base) if overwrite else check_new(dataset_id, base)
    spec, eval_spec = storable(spec), storable(eval_spec)
    extra: dict[str, Any] = {"dataset_id": dataset_id, "minari_version": minari.__version__}
    extra |= {**vouchers(spec, eval_spec), **(metadata or {})}
    if eval_spec is not None:
        extra["eval_env_spec"] = eval_spec.to_json()
    try:
        with whole_folder(target, overwrite) as folder:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kinds = (observation_space, action_space, spec)
                storage = MinariStorage.new(folder / "data", *kinds, jpeg_encoding=False)
            storage.update_metadata(extra)
            storage.update_episodes(_buffer(episode) for episode in episodes)  # one in memory at a time
            for parent in target.relative_to(base).parents:
                if parent != Path(".") and not (base / parent / NAMESPACE_METADATA_FILENAME).exists():
                    (base / parent / NAMESPACE_METADATA_FILENAME).write_text("{}")
    except OSError as error:
        raise DatasetError(f"dataset {dataset_id} could not be written to {target}: {error}") from error
    return target


def _buffer(episode: Episode) -> EpisodeBuffer:
    if len(episode.rewards) == 0:
        raise DatasetError("an episode to be written has no steps; leave it out")
    flags = {"success": episode.success, "intervened": episode.intervened}
    infos: dict[str, Any] = {key: np.concatenate([[False], steps]) for key, steps in flags.items() if steps is not None}
    infos |= episode.states or {}
    return EpisodeBuffer(
        seed=episode.seed,
        observations=episode.observations,
        actions=episode.actions,  # pyright: ignore[reportArgumentType]
        rewards=episode.rewards,  # pyright: ignore[reportArgumentType]
        terminations=episode.terminations,  # pyright: ignore[reportArgumentType]
        truncations=episode.truncations,  # pyright: ignore[reportArgumentType]
        infos=infos or None,
    )
