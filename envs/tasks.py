"""The one table of tasks: patterns of environment ids with the papers' conventions (WSRL, Cal-QL, RLPD)."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from o2o.data.datasets import DatasetInfo
from o2o.data.task import Task
from o2o.envs.ogbench import wheel
from o2o.errors import ConfigError, O2OError, TrustError
from o2o.trust import HOW
from o2o.user_code import import_module, origin

MAZE: dict[str, Any] = {
    "reward_scale": 10.0,
    "reward_bias": -5.0,
    "terminate_on_success": True,
    "sparse": True,
    "metric": "success",
    "has_success": True,
    "success_reward": 1.0,
    # Not continuing: the library's continuing mazes reset onto the goal, or reward every step spent on it.
    "env_kwargs": (("continuing_task", False), ("reset_target", False)),
}
DENSE_MAZE: dict[str, Any] = {
    "metric": "success",
    "has_success": True,
    "env_kwargs": (("continuing_task", True), ("reset_target", False)),
}
LOCOMOTION = (
    r"(Ant|HalfCheetah|Hopper|Humanoid|HumanoidStandup|InvertedPendulum|InvertedDoublePendulum|Pusher|Reacher|Swimmer"
    r"|Walker2d)-v\d+"
)

TASKS: list[tuple[str, Task]] = [
    (r"(jax/)?PointMaze_\w+Dense-v\d+", Task("pointmaze-dense", "pointmaze", **DENSE_MAZE)),
    (r"(jax/)?PointMaze_\w+-v\d+", Task("pointmaze", "pointmaze", **MAZE)),
    # The ant's x and y are in `achieved_goal` alone; kept, they come first, as in D4RL.
    (r"AntMaze_\w+Dense-v\d+", Task("antmaze-dense", "antmaze", achieved_goal=True, **DENSE_MAZE)),
    (r"AntMaze_\w+-v\d+", Task("antmaze", "antmaze", achieved_goal=True, **MAZE)),
    (r"AdroitHand(Door|Hammer|Pen|Relocate)\w*-v\d+", Task("adroit", "adroit", metric="success", has_success=True)),
    (
        r"FrankaKitchen-v\d+",
        Task(
            "kitchen",
            "kitchen",
            reward_bias=-4.0,
            terminate_on_success=True,
            metric="kitchen",
            has_success=True,
            success_reward=4.0,
        ),
    ),
    (LOCOMOTION, Task("locomotion", "locomotion", metric="return")),
    # The environment itself ends an episode at the goal; before 1.2 it judged a step by where it leads.
    (r"(cube|scene|puzzle)\S*-singletask(-task\d)?-v\d+", Task("ogbench", "ogbench", has_success=True)),
]
"""Pattern of the whole environment id, task; the first match wins. `register` adds to the front."""


def register(env_id_pattern: str, task: Task) -> None:
    """Give a task to all environment ids that match a regular expression, before those known already."""
    try:
        re.compile(env_id_pattern)
    except re.error as error:
        raise ConfigError(f"environment pattern {env_id_pattern!r} is not a regular expression: {error}") from error
    TASKS.insert(0, (env_id_pattern, task))


def task_for(source: str | DatasetInfo, binary: bool | None = None) -> Task:
    """Return the task of an environment id or a dataset, `other` with raw rewards for unknown ones.

    A module that registers the environment is imported first, as it may register tasks too: that of `module:id`, and
    that of a dataset's environment, if its code may run here (`o2o.trust`) and can be imported.
    `binary` asks for the reward -1/0 by success, as x10 + 5 with termination on success (the WSRL paper's Adroit).
    """
    about = None if isinstance(source, str) else source
    env_id = source if isinstance(source, str) else source.env_id
    if isinstance(source, str) and ":" in source:
        import_module(source.rpartition(":")[0])
    elif about is not None:
        _import_environment(about)
    bare = (env_id or "").split(":")[-1]
    task = next((t for pattern, t in TASKS if re.fullmatch(pattern, bare)), Task("other", has_success=True))
    if task.sparse and rewards_of(source).get("reward_type") == "dense" and task.family in ("antmaze", "pointmaze"):
        task = Task(f"{task.name}-dense", task.family, achieved_goal=task.achieved_goal, **DENSE_MAZE)
    if about is not None and task.metric == "return" and about.ref_max_score is not None:
        task = replace(task, metric="normalized")
    task = replace(task, name=bare or (about.name if about is not None else task.name), env_id=env_id)
    if about is not None:
        task = task.judged(about.metadata)
        if isinstance(key := about.metadata.get("success_key"), str):
            task = replace(task, success_key=key)
    if not binary:
        return task
    if task.family not in ("adroit", "other"):
        raise ConfigError(
            f"task {task.name}: a binary reward is for environments that report success, such as Adroit's"
        )
    return replace(
        task,
        binary=True,
        sparse=True,
        terminate_on_success=True,
        reward_scale=10.0,
        reward_bias=5.0,
        metric="success",
        has_success=True,
    )


def run_task(
    about: DatasetInfo, env: str | None = None, binary: bool | None = None, env_kwargs: Mapping[str, Any] | None = None
) -> Task:
    """Return the task of a run on a dataset, in its own environment or in `env` (see `task_for`).

    `env_kwargs` change the environment's arguments. Raises `ConfigError` if it pays another reward than the dataset was
    recorded with and the task replaces neither.
    """
    task = task_for(env or about, binary).judged(about.metadata)
    if (env is None and not env_kwargs) or about.env_spec is None or (task.binary and not task.goal):
        return task
    theirs, ours = rewards_of(about), rewards_of(env or about) | _of_reward(env_kwargs or {})
    for key in sorted({*theirs, *ours}):
        if theirs.get(key, ours.get(key)) != ours.get(key, theirs.get(key)):
            raise ConfigError(
                f"environment {env or about.env_id} pays another reward than dataset {about.name} was recorded with: "
                f"{key} is {ours[key]!r}, {theirs[key]!r} in {about.env_spec.id}; use an environment of the same "
                "reward, or a dataset recorded in this one"
            )
    return task


def rewards_of(source: str | DatasetInfo) -> dict[str, Any]:
    """Return the arguments of an environment, of an id or a dataset, that decide its reward."""
    if isinstance(source, str):
        known = gym.registry.get(source.split(":")[-1])
        kwargs = {} if known is None else known.kwargs
    else:
        kwargs = source.env_spec.kwargs if source.env_spec is not None else {}
    return _of_reward(kwargs)


def _of_reward(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if "reward" in key or "cost" in key}


def _import_environment(about: DatasetInfo) -> None:
    """Import the module of a dataset's environment, if it may run; what cannot be imported tells no task."""
    spec = about.eval_env_spec or about.env_spec
    if spec is None:
        return
    with suppress(O2OError):
        entry = known_code(spec, about).entry_point
        if isinstance(entry, str):
            import_module(entry.partition(":")[0])


def known_code(spec: EnvSpec, dataset: DatasetInfo) -> EnvSpec:
    """Return a dataset's specification with the code of the registry, or its own if it may run (`o2o.trust`)."""
    if str(spec.entry_point).startswith("ogbench."):
        wheel()
    registered = gym.registry.get(spec.id)  # gymnasium.spec would import what stands before a colon
    if registered is not None:
        return replace(spec, entry_point=registered.entry_point, vector_entry_point=registered.vector_entry_point)
    if dataset.trusted or spec.entry_point in {known.entry_point for known in gym.registry.values()}:
        return spec
    if isinstance(spec.entry_point, str) and origin(spec.entry_point) is None:
        module = spec.entry_point.partition(":")[0]
        raise ConfigError(
            f"environment {spec.id} of dataset {dataset.name} is in module {module}, which is not found from here: "
            "start in the folder of that module, or put the folder on PYTHONPATH"
        )
    raise TrustError(
        f"dataset {dataset.name} would run {spec.entry_point} as its environment {spec.id}, which is not registered: "
        f"give the module that registers it, `env` MODULE:{spec.id.rpartition(':')[2]}; or {HOW}"
    )
