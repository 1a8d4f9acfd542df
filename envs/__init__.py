"""Environments: `make` builds one from a dataset or a Gymnasium id, with its task's conventions (the table `TASKS`)."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from io import StringIO
from typing import Any

import gymnasium as gym
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
    "make",
    "make_embedded",
    "register",
    "same_environment",
    "spaces_of",
    "task_for",
    "wrap",
]

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

    The wrappers, from the inside: FaultGuard, `inner` (see `wrap`), FlattenObservation, MapAction, TaskReward and, with
    `history` above 1, StackHistory. Every step's `info` has `raw_reward`, `success` (None if unknown),
    `executed_action` and `intervened`.

    Args:
        source: A Gymnasium id, `module:id`, or a dataset that names its environment.
        task: Conventions of reward, success and termination; default: the table's for `source`.
        evaluation: Success alone does not end the episode.
        render_mode: Gymnasium's.
        seed: Seeds the environment now, as a reset would.
        achieved_goal: Keep `achieved_goal` of Dict observations.
        env_kwargs: Arguments of the environment; they win over those of the task.
        dataset: The environment's spaces must equal this dataset's; default: `source` if that is a dataset.
        inner: A wrapper for the environment in its own units, such as a recorder.
        history: Observations that are joined into one (`o2o.data.history`).
        action_map: What [-1, 1] stands for; default: the action space.
        cameras: Cameras to render into the observation (`o2o.envs.cameras`); default: those of the dataset.
        image_size: Height and width of their images.

    Raises `ConfigError` for an unknown id or camera, `EnvironmentMismatchError` for spaces that do not fit.
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
        env,
        task,
        evaluation=evaluation,
        achieved_goal=achieved_goal,
        inner=inner,
        history=history,
        action_map=action_map,
    )
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
    """Put o2o's wrappers around an environment that was made elsewhere, such as a robot's.

    `inner`, such as a recorder, is put just outside the FaultGuard, where it sees the environment's own units.
    """
    env = FaultGuard(env)
    env = inner(env) if inner is not None else env
    spec = ObservationSpec.from_space(env.observation_space, achieved_goal)
    action_map = action_map if action_map is not None else ActionMap.from_space(env.action_space)
    env = MapAction(FlattenObservation(env, spec), action_map)
    env = TaskReward(env, task, terminate=not evaluation)
    return env if history == 1 else StackHistory(env, history)


def check_spaces(env: gym.Env, dataset: DatasetInfo) -> None:
    """Raise `EnvironmentMismatchError` unless observations and actions of `env` equal the dataset's."""
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
    """Whether an id stands for the environment of a dataset: same id, arguments, time limit and wrappers."""
    theirs = dataset.eval_env_spec or dataset.env_spec
    if theirs is None or theirs.id != env_id.split(":")[-1]:
        return False
    return _settings(_spec(env_id)) == _settings(theirs)


def spaces_of(env_id: str) -> tuple[gym.Space, gym.Space, EnvSpec]:
    """Return the spaces of observations and actions of an environment in its own units, and its specification.

    Raises `ConfigError` for an id that is unknown or cannot be made.
    """
    spec = _spec(env_id)
    try:
        env = gym.make(spec, disable_env_checker=True)
    except Exception as error:
        raise ConfigError(f"environment {spec.id} cannot be made: {' '.join(str(error).split())}") from error
    remove_model_file(env)
    env.close()
    return env.observation_space, env.action_space, spec


def _settings(spec: EnvSpec) -> str:
    """Return the parts of a specification that decide the environment's behaviour, as JSON text."""
    wrappers = [asdict(wrapper) for wrapper in spec.additional_wrappers]
    return json.dumps([spec.max_episode_steps, spec.kwargs, wrappers], sort_keys=True, default=str)


def _spec(source: str | DatasetInfo) -> EnvSpec:
    """Return a dataset's evaluation specification (with the real time limit) or its own; an id's from the registry."""
    if isinstance(source, DatasetInfo):
        spec = source.eval_env_spec or source.env_spec
        if spec is None:
            raise EnvironmentMismatchError(
                f"dataset {source.name} does not name its environment; give one with --env ID, or train on the data "
                "alone with --online-steps 0"
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
