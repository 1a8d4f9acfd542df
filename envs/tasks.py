"""The one table of tasks: patterns of environment ids with the papers' conventions (WSRL, Cal-QL, RLPD)."""

import re
from dataclasses import replace
from typing import Any

from o2o.data.datasets import DatasetInfo
from o2o.data.task import Task
from o2o.errors import ConfigError
from o2o.user_code import import_module

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
    (r"PointMaze_\w+Dense-v\d+", Task("pointmaze-dense", "pointmaze", **DENSE_MAZE)),
    (r"PointMaze_\w+-v\d+", Task("pointmaze", "pointmaze", **MAZE)),
    (r"AntMaze_\w+Dense-v\d+", Task("antmaze-dense", "antmaze", **DENSE_MAZE)),
    (r"AntMaze_\w+-v\d+", Task("antmaze", "antmaze", **MAZE)),
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

    `binary` asks for the reward -1/0 by success, as x10 + 5 with termination on success (the WSRL paper's Adroit).
    """
    about = None if isinstance(source, str) else source
    env_id = source if isinstance(source, str) else source.env_id
    if isinstance(source, str) and ":" in source:  # a module that registers environments may register tasks too
        import_module(source.rpartition(":")[0])
    bare = (env_id or "").split(":")[-1]
    task = next((t for pattern, t in TASKS if re.fullmatch(pattern, bare)), Task("other", has_success=True))
    if about is not None and task.sparse and _kwargs(about).get("reward_type") == "dense":
        task = Task(f"{task.name}-dense", task.family, **DENSE_MAZE)
    if about is not None and task.metric == "return" and about.ref_max_score is not None:
        task = replace(task, metric="normalized")
    task = replace(task, name=bare or (about.name if about is not None else task.name), env_id=env_id)
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


def _kwargs(about: DatasetInfo) -> dict[str, Any]:
    spec = about.eval_env_spec or about.env_spec
    return spec.kwargs if spec is not None else {}
