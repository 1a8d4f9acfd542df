"""Find, read, check and write the files of Minari datasets."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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

from o2o.data.spaces import ActionMap, ObservationSpec, not_finite
from o2o.data.task import Task
from o2o.errors import DatasetError, EnvironmentMismatchError, suggest

EMBEDDED_PREFIX = "o2o/embedded/"
"""Ids of the datasets that o2o makes itself."""


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
    """Return the `data` folder of a dataset given by id or by path.

    Raises `DatasetError` if it is not there, with similar ids and how to get it.
    """
    base = Path(root) if root is not None else default_root()
    for candidate in (Path(dataset) / "data", Path(dataset), base / dataset / "data"):
        if (candidate / METADATA_FILE_NAME).is_file():
            return candidate
    name = str(dataset)
    if (base / name / "data").is_dir() or (Path(name) / "data").is_dir():
        raise DatasetError(f"dataset {name}: its data folder has no {METADATA_FILE_NAME}; copy or download it again")
    if download:
        return _download(name, base)
    get = f"`minari download {name}` (needs the network and o2o[hub])"
    if name.startswith(EMBEDDED_PREFIX):
        get = f"`o2o data make {name.removeprefix(EMBEDDED_PREFIX).rsplit('-v', 1)[0]}`"
    near = suggest(name, local_ids(base), "", count=3)
    hint = f"{near} Otherwise " if near else ""
    raise DatasetError(f"dataset {name!r} is not under {base}: {hint}get it with {get}, or set MINARI_DATASETS_PATH")


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
        metadata = json.loads((data / METADATA_FILE_NAME).read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{data / METADATA_FILE_NAME} is not readable JSON ({error}); download the dataset again"
        ) from error
    kinds = {"dataset_id": str, "total_episodes": int | float, "total_steps": int | float, "data_format": str}
    entries = metadata if isinstance(metadata, dict) else {}
    missing = [key for key, kind in kinds.items() if not isinstance(entries.get(key), kind)]
    if missing:
        raise DatasetError(f"{data / METADATA_FILE_NAME} lacks {', '.join(missing)}; is this a Minari dataset?")
    return metadata


def env_spec(metadata: Mapping[str, Any], key: str = "env_spec") -> EnvSpec | None:
    """Return the environment specification under a key, or None. Raises `DatasetError` if it cannot be parsed."""
    text = metadata.get(key)
    if not text:
        return None
    try:
        for old in ('"order_enforce": true,', '"apply_api_compatibility": false,', '"autoreset": false, '):
            text = text.replace(old, "")  # written by Gymnasium before 1.0
        return without_own_wrappers(EnvSpec.from_json(text))
    except Exception as error:
        raise DatasetError(f"dataset {metadata['dataset_id']}: its {key} cannot be read ({error})") from error


def without_own_wrappers(spec: EnvSpec) -> EnvSpec:
    """Return a specification without o2o's own wrappers, which `o2o.envs.make` adds again."""
    others = (wrapper for wrapper in spec.additional_wrappers if not wrapper.entry_point.startswith("o2o."))
    return replace(spec, additional_wrappers=tuple(others))


def storable(spec: EnvSpec | None) -> EnvSpec | None:
    """Return a specification for a dataset: without o2o's own wrappers; None if it has no JSON form."""
    if spec is None:
        return None
    spec = without_own_wrappers(spec)
    try:
        spec.to_json()
    except (TypeError, ValueError):  # registered with a class, or with an argument that is no JSON
        return None
    return spec


def open_storage(data: Path, metadata: Mapping[str, Any]) -> MinariStorage:
    """Open the data of a dataset. Raises `DatasetError` if the data or the spaces cannot be read."""
    try:
        return MinariStorage.read(data)
    except Exception as error:
        raise DatasetError(f"dataset {metadata['dataset_id']}: cannot be opened at {data} ({error})") from error


def info(dataset: str | Path, root: str | Path | None = None, download: bool = False) -> DatasetInfo:
    """Return a dataset's metadata without reading its data. Raises `DatasetError`."""
    return read_info(locate(dataset, root, download))


def read_info(data: Path) -> DatasetInfo:
    """Return the metadata in a `data` folder. Raises `DatasetError`."""
    metadata = read_metadata(data)
    spec, name = env_spec(metadata), metadata["dataset_id"]
    found = {}
    for key in ("observation_space", "action_space"):
        try:
            found[key] = (
                deserialize_space(metadata[key]) if key in metadata else getattr(open_storage(data, metadata), key)
            )
        except DatasetError:
            raise
        except Exception as error:
            raise DatasetError(f"dataset {name}: its {key} cannot be read ({error!r})") from error
    return DatasetInfo(
        ids=(name,),
        env_id=spec.id if spec else None,
        env_spec=spec,
        eval_env_spec=env_spec(metadata, "eval_env_spec"),
        ref_min_score=metadata.get("ref_min_score"),
        ref_max_score=metadata.get("ref_max_score"),
        episodes=int(metadata["total_episodes"]),
        steps=int(metadata["total_steps"]),
        metadata=metadata,
        **found,
    )


def file_digest(data: Path) -> str:
    """Return the sha256 of the names and contents of all files of the dataset; its location does not matter."""
    digest = hashlib.sha256()
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        digest.update(path.relative_to(data).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_episodes(storage: MinariStorage, name: str, start: int = 0) -> Iterator[Episode]:
    """Yield the episodes from number `start` on. Raises `DatasetError`, naming the episode that cannot be read."""
    total = storage.total_episodes
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
        rewards = np.asarray(episode["rewards"])
        yield Episode(
            observations=episode["observations"],
            actions=np.asarray(episode["actions"]),
            rewards=rewards,
            terminations=np.asarray(episode["terminations"], bool),
            truncations=np.asarray(episode["truncations"], bool),
            success=_success(episode.get("infos") or {}, len(rewards)),
        )
        i += 1


def _success(infos: Mapping[str, Any], steps: int) -> np.ndarray | None:
    """Return the success flags of the steps `[T]` from infos with one entry per observation (T+1) or step (T)."""
    flags = np.asarray(infos["success"]).reshape(-1) if "success" in infos else np.empty(0)
    if not steps or len(flags) not in (steps, steps + 1):
        return None
    return flags[-steps:].astype(bool)


def problems(
    episode: Episode, index: int, spec: ObservationSpec, actions: ActionMap, clip: bool = False
) -> Iterator[str]:
    """Yield one line for each error in an episode. With `clip`, actions outside the bounds are allowed."""
    where, steps = f"episode {index}", len(episode.rewards)
    if steps == 0:
        yield f"{where} has no steps; delete it"
        return
    for key in ("actions", "terminations", "truncations"):
        if len(getattr(episode, key)) != steps:
            yield f"{where} has {len(getattr(episode, key))} {key} for {steps} rewards"
            return
    arrays = {"actions": episode.actions.reshape(steps, -1), "rewards": episode.rewards.reshape(steps, -1)}
    for leaf in spec.leaves:
        try:
            array = leaf.of(episode.observations)
        except EnvironmentMismatchError as error:
            yield f"{where}: {error}"
            return
        if len(array) != steps + 1:
            yield f"{where} has {len(array)} observations for {steps} steps, expected {steps + 1}"
            return
        if not leaf.image:
            arrays[f"observations ({leaf.name})"] = array.reshape(steps + 1, -1)
    for key, array in arrays.items():
        if len(bad := np.argwhere(not_finite(array))):
            step, entry = bad[0]
            yield f"{where}, step {step}: {key} has {array[step, entry]} in entry {entry}; remove the episode"
    if arrays["actions"].shape[1] != actions.dim:
        yield f"{where}: actions have {arrays['actions'].shape[1]} entries, the action space {actions.dim}"
    elif not clip and (out := np.argwhere(actions.outside(episode.actions))).size:
        step, entry = out[0]
        yield (
            f"{where}, step {step}: action entry {entry} is {arrays['actions'][step, entry]:.6g}, outside the bounds "
            f"[{actions.low[entry]:g}, {actions.high[entry]:g}]; clip them with --clip-actions (clip_actions=True)"
        )


def check_new(dataset_id: str, root: str | Path | None = None) -> Path:
    """Return the folder for a new dataset. Raises `DatasetError` if the id is malformed or exists already."""
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise DatasetError(f"dataset id {dataset_id!r} is not of the form namespace/name-v0") from error
    target = (Path(root) if root is not None else default_root()) / dataset_id
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
) -> Path:
    """Write episodes as a Minari dataset and return its folder, which appears whole or not at all.

    A specification without a JSON form is left out; training on the dataset then needs `--env`. Raises `DatasetError`
    if the id is malformed or exists already, the folder cannot be written, or an episode has no steps.
    """
    base = Path(root) if root is not None else default_root()
    target = check_new(dataset_id, base)
    spec, eval_spec, scratch = storable(spec), storable(eval_spec), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent.absolute()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            storage = MinariStorage.new(scratch / "data", observation_space, action_space, spec, jpeg_encoding=False)
        extra: dict[str, Any] = {"dataset_id": dataset_id, "minari_version": minari.__version__, **(metadata or {})}
        if eval_spec is not None:
            extra["eval_env_spec"] = eval_spec.to_json()
        storage.update_metadata(extra)
        storage.update_episodes(_buffer(episode) for episode in episodes)  # one in memory at a time
        for parent in target.relative_to(base).parents:
            if parent != Path(".") and not (base / parent / NAMESPACE_METADATA_FILENAME).exists():
                (base / parent / NAMESPACE_METADATA_FILENAME).write_text("{}")
        scratch.chmod(0o755)
        os.replace(scratch, target)
    except OSError as error:
        raise DatasetError(f"dataset {dataset_id} could not be written to {target}: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _buffer(episode: Episode) -> EpisodeBuffer:
    if len(episode.rewards) == 0:
        raise DatasetError("an episode to be written has no steps; leave it out")
    flags = {"success": episode.success, "intervened": episode.intervened}
    infos = {key: np.concatenate([[False], steps]) for key, steps in flags.items() if steps is not None} or None
    return EpisodeBuffer(
        seed=episode.seed,
        observations=episode.observations,
        actions=episode.actions,  # pyright: ignore[reportArgumentType]
        rewards=episode.rewards,  # pyright: ignore[reportArgumentType]
        terminations=episode.terminations,  # pyright: ignore[reportArgumentType]
        truncations=episode.truncations,  # pyright: ignore[reportArgumentType]
        infos=infos,
    )
