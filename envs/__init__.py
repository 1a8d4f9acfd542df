"""Environments: `make` builds one from a dataset or a Gymnasium id, with its task's conventions (the table `TASKS`)."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from io import StringIO
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from o2o.data.datasets import DatasetInfo
from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.data.task import Task
from o2o.envs import kitchen
from o2o.envs.cameras import CameraObservation, add_cameras
from o2o.envs.pointmaze import EMBEDDED, embedded_id, make_embedded, remove_model_file
from o2o.envs.tasks import TASKS, register, task_for
from o2o.envs.wrappers import (
    BaseAction,
    EpisodeStatistics,
    FaultGuard,
    FlattenObservation,
    MapAction,
    StackHistory,
    TaskReward,
)
from o2o.errors import ConfigError, EnvironmentMismatchError, suggest
from o2o.user_code import import_module

__all__ = [
    "DEMO_DATASET",
    "EMBEDDED",
    "TASKS",
    "BaseAction",
    "CameraObservation",
    "check_spaces",
    "embedded_id",
    "final_info",
    "final_observations",
    "make",
]
__all__ += ["make_embedded", "make_vec", "register", "same_environment", "task_for", "wrap"]

DEMO_DATASET = "pointmaze-umaze"
"""The embedded dataset of `o2o demo`."""

with redirect_stderr(StringIO()):  # on import the package prints a notice about its AdroitHand*Dense-v1
    import gymnasium_robotics

gym.register_envs(gymnasium_robotics)


def make(
    source: str | DatasetInfo,
    task: Task | None = None,
    *,
    evaluation: bool = False,
    render_mode: str | None = None,
    seed: int | None = None,
    achieved_goal: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
    dataset: DatasetInfo | None = None,
    inner: Callable[[gym.Env], gym.Env] | None = None,
    history: int = 1,
    action_map: ActionMap | None = None,
    cameras: Sequence[str] = (),
    image_size: int = 64,
) -> gym.Env:
    """Make the environment of an id or a dataset: float32 observations, actions in [-1, 1], the task's reward.

    From the inside: the environment with its time limit, FaultGuard, FlattenObservation, MapAction, TaskReward,
    EpisodeStatistics. `info` has `raw_reward`, `success` (None if unknown), `executed_action` and `intervened` in every
    step, `episode` in the last. With `evaluation`, success alone does not end the episode. `env_kwargs` win over the
    task's. `seed` seeds it now, as a reset would. Its spaces must be those of `dataset` (or of `source`). `action_map`
    is the dataset's, where [-1, 1] is not its action space. `inner` wraps it before o2o's conventions do (see `wrap`).
    With `history` above 1, observations are joined to those before them (`o2o.data.history`), outside all else.
    `cameras` are rendered into the observation, images of `image_size` squared (`o2o.envs.cameras`); without any,
    the dataset's own. Raises `ConfigError` for an unknown id or camera, `EnvironmentMismatchError` for spaces that
    do not fit.
    """
    about = source if isinstance(source, DatasetInfo) else None
    task = task if task is not None else task_for(source)
    spec = _spec(source)
    kwargs: dict[str, Any] = dict(task.env_kwargs)
    if task.family == "kitchen":
        kwargs |= kitchen.spec_kwargs(spec.kwargs)
    kwargs |= env_kwargs or {}
    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    try:
        env = gym.make(spec, disable_env_checker=True, **kwargs)
    except Exception as error:
        raise ConfigError(f"environment {spec.id} cannot be made: {' '.join(str(error).split())}") from error
    remove_model_file(env)
    if task.family == "kitchen":
        env = kitchen.CompletedSubtasks(env)
    reference = dataset or about
    env = add_cameras(env, cameras, image_size, reference)
    if reference is not None:
        check_spaces(env, reference)
    env = wrap(
        env, task, evaluation=evaluation, achieved_goal=achieved_goal, inner=inner, history=history,
        action_map=action_map,
    )  # fmt: skip
    if seed is not None:
        env.reset(seed=seed)
        env.action_space.seed(seed)
    return env


def wrap(
    env: gym.Env,
    task: Task,
    *,
    evaluation: bool = False,
    achieved_goal: bool = False,
    inner: Callable[[gym.Env], gym.Env] | None = None,
    history: int = 1,
    action_map: ActionMap | None = None,
) -> gym.Env:
    """Put o2o's wrappers around an environment made elsewhere, a robot's for instance.

    `inner`, a recorder for instance, sits just outside the FaultGuard: it sees the environment's own units.
    """
    env = FaultGuard(env)
    env = inner(env) if inner is not None else env
    spec = ObservationSpec.from_space(env.observation_space, achieved_goal)
    action_map = action_map if action_map is not None else ActionMap.from_space(env.action_space)
    env = MapAction(FlattenObservation(env, spec), action_map)
    env = EpisodeStatistics(TaskReward(env, task, terminate=not evaluation))
    return env if history == 1 else StackHistory(env, history)


def check_spaces(env: gym.Env, dataset: DatasetInfo) -> None:
    """Raise `EnvironmentMismatchError`, naming both, unless observations and actions are the dataset's."""
    name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
    theirs = ObservationSpec.from_space(dataset.observation_space, True)
    ours = ObservationSpec.from_space(env.observation_space, True)
    if theirs != ours:
        raise EnvironmentMismatchError(
            f"dataset {dataset.name} has observations {theirs}, environment {name} has "
            f"{ours}; use the one it was recorded in"
        )
    actions, expected = ActionMap.from_space(env.action_space), ActionMap.from_space(dataset.action_space)
    if actions != expected:
        raise EnvironmentMismatchError(
            f"dataset {dataset.name} has actions {dataset.action_space}, environment {name} has {env.action_space}; "
            "use the one it was recorded in"
        )


def same_environment(env_id: str, dataset: DatasetInfo) -> bool:
    """Whether an id's environment is the one that a dataset names: same id, arguments, time limit and wrappers."""
    theirs = dataset.eval_env_spec or dataset.env_spec
    if theirs is None or theirs.id != env_id.split(":")[-1]:
        return False
    return _settings(_spec(env_id)) == _settings(theirs)


def _settings(spec: EnvSpec) -> str:
    """Return what of a specification says how its environment behaves, as JSON has it: tuples are lists there."""
    wrappers = [asdict(wrapper) for wrapper in spec.additional_wrappers]
    return json.dumps([spec.max_episode_steps, spec.kwargs, wrappers], sort_keys=True, default=str)


def _spec(source: str | DatasetInfo) -> EnvSpec:
    """Return a dataset's evaluation specification (with the real time limit) or its own; an id's from the registry."""
    if isinstance(source, DatasetInfo):
        spec = source.eval_env_spec or source.env_spec
        if spec is None:
            raise EnvironmentMismatchError(
                f"dataset {source.name} does not name its environment; give one with --env ID"
            )
        if spec.additional_wrappers:
            names = ", ".join(wrapper.name for wrapper in spec.additional_wrappers)
            raise EnvironmentMismatchError(
                f"dataset {source.name} was recorded in {spec.id} with wrappers around it ({names}), which o2o does "
                "not make by itself: register an environment that has them, and give it with --env module:ID; or with "
                f"--env {spec.id} if they change nothing"
            )
        return spec
    module, _, name = source.rpartition(":")
    try:
        if module:
            import_module(module)  # where the environment is registered
        return gym.spec(name)
    except (gym.error.Error, ConfigError) as error:
        hint = suggest(source, gym.registry, "register it with gymnasium first, or give module:id", count=3)
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"unknown environment {source!r} ({reason}); {hint}") from error


def make_vec(
    source: str | DatasetInfo,
    num_envs: int,
    task: Task | None = None,
    *,
    seed: int | None = None,
    processes: bool = False,
    **options: Any,
) -> gym.vector.VectorEnv:
    """Make `num_envs` environments of `make(source, task, **options)`, stepped together, seeded seed, seed + 1, ...

    Autoreset is SAME_STEP: the step that ends an episode returns the next one's first observation; its last one is in
    `final_observations`, its info in `final_info`. `processes` gives each environment its own process.
    """
    if num_envs < 1:
        raise ConfigError(f"num_envs is {num_envs}, expected at least 1")

    def maker() -> gym.Env:
        return make(source, task, **options)

    mode = gym.vector.AutoresetMode.SAME_STEP
    if processes:  # a fork would copy JAX's threads, and may hang
        envs = gym.vector.AsyncVectorEnv([maker] * num_envs, autoreset_mode=mode, context="spawn")
    else:
        envs = gym.vector.SyncVectorEnv([maker] * num_envs, autoreset_mode=mode)
    if seed is not None:
        envs.reset(seed=seed)
    return envs


def final_observations(next_observations: Any, infos: Mapping[str, Any]) -> Any:
    """Return the true next observations `[num_envs, ...]`: the last one where an episode ended."""
    if "final_obs" not in infos:
        return next_observations
    done = infos["_final_obs"]

    def replaced(batch: np.ndarray, rows: Any) -> np.ndarray:
        batch = np.array(batch)
        for i in np.flatnonzero(done):
            batch[i] = rows(infos["final_obs"][i])
        return batch

    if isinstance(next_observations, dict):
        return {key: replaced(value, lambda row, k=key: row[k]) for key, value in next_observations.items()}
    return replaced(next_observations, lambda row: row)


def final_info(infos: Mapping[str, Any], key: Literal["raw_reward", "success", "executed_action"] | str) -> np.ndarray:
    """Return an entry of `infos` `[num_envs, ...]` of the step just taken, from `final_info` where an episode ended."""
    if "final_info" not in infos:
        return np.asarray(infos[key])
    final, done = infos["final_info"], infos["_final_info"]
    values = np.array(final[key])
    if key in infos:
        going = ~np.asarray(done)
        values[going] = np.asarray(infos[key])[going]
    return values
