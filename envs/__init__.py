"""Environments: `make` builds one from a dataset or a Gymnasium id, with its task's conventions (the table `TASKS`)."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import TimeLimit

from o2o.data import datasets, files
from o2o.data.datasets import DatasetInfo, info
from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.data.task import Task
from o2o.envs import kitchen, playground
from o2o.envs.cameras import CameraObservation, add_cameras
from o2o.envs.ogbench import PLAYS, make_play
from o2o.envs.pointmaze import EMBEDDED, embedded_id, make_embedded, remove_model_file
from o2o.envs.tasks import TASKS, known_code, register, run_task, task_for
from o2o.envs.wrappers import (
    BaseAction,
    FaultGuard,
    FlattenObservation,
    MapAction,
    StackHistory,
    TaskReward,
)
from o2o.errors import ConfigError, DatasetError, EnvironmentMismatchError, suggest
from o2o.user_code import import_module

__all__ = [
    "DEMO_DATASET",
    "EMBEDDED",
    "TASKS",
    "BaseAction",
    "CameraObservation",
    "bare",
    "check_spaces",
    "describe",
    "embedded_id",
    "endless",
    "limit_for",
    "make",
    "make_dataset",
    "make_embedded",
    "make_play",
    "register",
    "run_task",
    "same_environment",
    "spaces_of",
    "specification",
    "task_for",
    "wrap",
]

DEMO_DATASET = "pointmaze-umaze"
"""The embedded dataset of `o2o demo`."""

with redirect_stderr(StringIO()):  # on import the package prints a notice about its AdroitHand*Dense-v1
    import gymnasium_robotics

gym.register_envs(gymnasium_robotics)

for _maze in [spec for name, spec in gym.registry.items() if name.startswith("PointMaze_") and spec.version == 3]:
    gym.register(
        f"jax/{_maze.name}-v0",
        "o2o.simulators.gym:point_maze",
        max_episode_steps=_maze.max_episode_steps,
        kwargs={key: value for key, value in _maze.kwargs.items() if key in ("maze_map", "reward_type")},
    )  # the same tasks as pure functions (`o2o.simulators`)
playground.register()


def make(
    source: str | DatasetInfo | EnvSpec,
    task: Task | None = None,
    *,
    evaluation: bool = False,
    render_mode: str | None = None,
    seed: int | None = None,
    achieved_goal: bool | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    dataset: DatasetInfo | None = None,
    inner: Callable[[gym.Env], gym.Env] | None = None,
    history: int = 1,
    action_map: ActionMap | None = None,
    cameras: Sequence[str] = (),
    image_size: int = 64,
    episode_limit: int | None = None,
    own_units: bool = False,
    simulator: Callable[..., gym.Env] | None = None,
) -> gym.Env:
    """Make the environment of an id or a dataset: float32 observations, actions in [-1, 1], the task's reward.

    The wrappers, from the inside: FaultGuard, `inner` (see `wrap`), FlattenObservation, MapAction, TaskReward and, with
    `history` above 1, StackHistory. An environment without a time limit gets one where there is a dataset
    (`limit_for`). A window opens only for the `render_mode` "human" given here. Every step's `info` has `raw_reward`,
    `success` (None if unknown), `executed_action` and `intervened`.

    Args:
        source: A Gymnasium id, `module:id`, a dataset that names its environment, or a specification of Gymnasium.
        task: Conventions of reward, success and termination; default: the table's for `source`.
        evaluation: Success alone does not end the episode.
        render_mode: Gymnasium's.
        seed: Seeds the environment now, as a reset would.
        achieved_goal: Keep `achieved_goal` of Dict observations; default: as the task says.
        env_kwargs: Arguments of the environment; they win over those of the task.
        dataset: The environment's spaces must equal this dataset's; default: `source` if that is a dataset.
        inner: A wrapper for the environment in its own units, such as a recorder.
        history: Observations that are joined into one (`o2o.data.history`).
        action_map: What [-1, 1] stands for; default: the action space.
        cameras: Cameras to render into the observation (`o2o.envs.cameras`); default: those of the dataset.
        image_size: Height and width of their images.
        episode_limit: Steps after which an episode is cut; default: the environment's own limit.
        own_units: Leave out FlattenObservation and MapAction: observations and actions are the environment's own.
        simulator: What makes the bare environment (`o2o.envs.shared`); default: `gymnasium.make`.

    Raises `ConfigError` for an unknown id or camera, `EnvironmentMismatchError` for spaces that do not fit,
    `TrustError` for a dataset whose environment is code that only its file names.
    """
    about = source if isinstance(source, DatasetInfo) else None
    spec = files.portable(specification(source))
    task = task if task is not None else task_for(spec.id.rpartition(":")[2] if isinstance(source, EnvSpec) else source)
    kwargs: dict[str, Any] = dict(task.env_kwargs)
    if task.family == "kitchen":
        kwargs |= kitchen.spec_kwargs(spec.kwargs)
    kwargs |= env_kwargs or {}
    kwargs |= {} if episode_limit is None else {"max_episode_steps": episode_limit}
    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    env = _made(spec, simulator, **kwargs)
    if task.family == "kitchen":
        env = kitchen.CompletedSubtasks(env)
    reference = dataset or about
    if reference is not None and spec.max_episode_steps is None and episode_limit is None:
        env = TimeLimit(env, limit_for(reference))
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
        own_units=own_units,
    )
    if seed is not None:
        env.reset(seed=seed)
        env.action_space.seed(seed)
    return env


def _made(spec: EnvSpec, make: Callable[..., gym.Env] | None = None, **kwargs: Any) -> gym.Env:
    """Make the bare environment of a specification, as Gymnasium does or with `make`. Raises `ConfigError`."""
    try:
        env = (make or gym.make)(spec, disable_env_checker=True, **kwargs)
    except (Exception, SystemExit) as error:  # a bare assertion has no text of its own
        named = (
            f"{type(error).__name__}: {error}" if isinstance(error, Exception) else f"it ends the process ({error!r})"
        )
        unseen = isinstance(error, TypeError) and "render_mode" in kwargs and "'render_mode'" in str(error)
        advice = ": to be shown, its class or function must take `render_mode`" if unseen else ""
        raise ConfigError(f"environment {spec.id} cannot be made ({' '.join(named.split())}){advice}") from error
    remove_model_file(env)
    return env


def bare(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> gym.Env:
    """Make an environment in its own units, without o2o's wrappers. Raises `ConfigError`."""
    return _made(specification(env_id), **(env_kwargs or {}))


def make_dataset(
    name: str,
    root: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> tuple[str, ...]:
    """Make a dataset that o2o can make anywhere, if it is not there yet, and return its ids.

    `name`: one of `EMBEDDED`, or `ogbench/NAME` with one of OGBench's scenes. `options`: `steps`, `seed` and
    `processes` of the latter (`make_play`); None counts as not given. `progress(done, total)` is called with counts of
    steps. Raises `ConfigError` for an option of an embedded dataset, else as `make_embedded` and `make_play`.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if name.startswith(files.OGBENCH_PREFIX):
        return make_play(name, root, progress, **given)
    if name not in EMBEDDED and not name.startswith(files.EMBEDDED_PREFIX):
        names = [*EMBEDDED, *(f"{files.OGBENCH_PREFIX}{scene}" for scene in PLAYS)]
        raise DatasetError(f"no dataset {name!r} that o2o can make; {suggest(name, names)}")
    if given:
        raise ConfigError(f"{name} is small and always made whole: leave out {', '.join(given)}")
    return (make_embedded(name, root, progress),)


def wrap(
    env: gym.Env,
    task: Task,
    *,
    evaluation: bool = False,
    achieved_goal: bool | None = None,
    inner: Callable[[gym.Env], gym.Env] | None = None,
    history: int = 1,
    action_map: ActionMap | None = None,
    own_units: bool = False,
) -> gym.Env:
    """Put o2o's wrappers around an environment that was made elsewhere, such as a robot's.

    `inner`, such as a recorder, is put just outside the FaultGuard, where it sees the environment's own units. With
    `own_units` so does whoever acts.
    """
    env = FaultGuard(env, task.success_key)
    env = inner(env) if inner is not None else env
    if own_units:
        return TaskReward(env, task, terminate=not evaluation)
    keep_goal = task.achieved_goal if achieved_goal is None else achieved_goal
    spec = ObservationSpec.from_space(env.observation_space, keep_goal)
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
    actions, expected = ActionMap.bounds_of(env.action_space), ActionMap.bounds_of(dataset.action_space)
    if actions != expected:
        raise EnvironmentMismatchError(
            f"dataset {dataset.name} has actions {dataset.action_space}, environment {name} has {env.action_space}; "
            "use the one it was recorded in"
        )


LEAST_LIMIT, LIMIT_FACTOR = 1000, 10


def limit_for(dataset: DatasetInfo) -> int:
    """Return the steps after which an episode is cut in an environment that has no time limit.

    It might have no end otherwise: ten times the dataset's mean episode, at least 1000.
    """
    return max(LEAST_LIMIT, LIMIT_FACTOR * -(-dataset.steps // max(dataset.episodes, 1)))


def endless(source: str | DatasetInfo) -> bool:
    """Whether an environment has no time limit of its own that is known."""
    return specification(source).max_episode_steps is None


def describe(dataset: str | Path, root: str | Path | None = None) -> dict[str, Any]:
    """Return what there is to say of a dataset (`o2o.data.datasets.describe`), with the `task` of a run on it."""
    task = run_task(info(dataset, root))
    return {**datasets.describe(dataset, root, task), "task": task}


def same_environment(
    env_id: str | None,
    dataset: DatasetInfo,
    env_kwargs: Mapping[str, Any] | None = None,
    episode_limit: int | None = None,
) -> bool:
    """Whether an id stands for the environment of a dataset: same id, arguments, time limit and wrappers.

    None is the dataset's own. `env_kwargs` and `episode_limit` change what it stands for, as in `make`.
    """
    theirs = dataset.eval_env_spec or dataset.env_spec
    if env_id is None and not env_kwargs and episode_limit is None:
        return True
    if theirs is None or (env_id is not None and theirs.id != env_id.split(":")[-1]):
        return False
    ours = theirs if env_id is None else specification(env_id)
    kwargs, limit = {**ours.kwargs, **(env_kwargs or {})}, episode_limit or ours.max_episode_steps
    return _settings(replace(ours, kwargs=kwargs, max_episode_steps=limit)) == _settings(theirs)


def spaces_of(env_id: str) -> tuple[gym.Space, gym.Space, EnvSpec]:
    """Return the spaces of observations and actions of an environment in its own units, and its specification.

    Raises `ConfigError` for an id that is unknown or cannot be made.
    """
    spec = specification(env_id)
    env = _made(spec)
    env.close()
    return env.observation_space, env.action_space, spec


def _settings(spec: EnvSpec) -> str:
    """Return the parts of a specification that decide the environment's behaviour, as JSON text."""
    spec = files.portable(spec)
    wrappers = [asdict(wrapper) for wrapper in spec.additional_wrappers]
    return json.dumps([spec.max_episode_steps, spec.kwargs, wrappers], sort_keys=True, default=str)


def specification(source: str | DatasetInfo | EnvSpec) -> EnvSpec:
    """Return an id's specification from the registry; of a dataset that for evaluation, or else its own.

    The code of a dataset's environment is that of the registered environment of this id, whatever the dataset names.
    Raises `ConfigError` for an unknown id, `EnvironmentMismatchError` for a dataset that names no environment or one
    within wrappers, `TrustError` if no registered environment has the code that the dataset names.
    """
    if isinstance(source, EnvSpec):
        return source
    if isinstance(source, DatasetInfo):
        spec = source.eval_env_spec or source.env_spec
        if spec is None:
            raise EnvironmentMismatchError(
                f"dataset {source.name} does not name its environment; give one with `env`, or train on the data alone "
                "(`online_steps` 0)"
            )
        if spec.additional_wrappers:
            names = ", ".join(wrapper.name for wrapper in spec.additional_wrappers)
            raise EnvironmentMismatchError(
                f"dataset {source.name} was recorded in {spec.id} with wrappers around it ({names}), which o2o does "
                "not make by itself: register an environment that has them, and give it as `env` module:ID; or give "
                f"`env` {spec.id} if they change nothing"
            )
        return known_code(spec, source)
    module, _, name = source.rpartition(":")
    try:
        if module:
            import_module(module)  # where the environment is registered
        return gym.spec(name)
    except (gym.error.Error, ConfigError) as error:
        hint = suggest(source, gym.registry, "register it with gymnasium first, or give module:id", count=3)
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"unknown environment {source!r} ({reason}); {hint}") from error
