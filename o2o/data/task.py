"""A task: reward transform, success, termination on success and metric, for dataset and environment alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import numpy as np

from o2o.errors import ConfigError
from o2o.settings import Amount, NotNegative, NotZero, Portion, Real, Settings

Family = Literal["antmaze", "pointmaze", "adroit", "kitchen", "locomotion", "ogbench", "other"]
Metric = Literal["return", "success", "normalized", "kitchen"]


SUCCESS_KEYS = ("success", "is_success")
"""Names under which environments report success in their infos; the first one that is there counts."""


def success_key(infos: Mapping[str, Any], named: str | None = None) -> str | None:
    """Return the name under which `infos` report success, `named` before all others; None if they do not."""
    names = SUCCESS_KEYS if named is None else (named, *SUCCESS_KEYS)
    return next((key for key in names if infos.get(key) is not None), None)


def as_flags(values: Any) -> np.ndarray:
    """Return flags as booleans of their shape; raises `ValueError`, naming it, for a value that is not 0 or 1."""
    found = np.asarray(values)
    if found.dtype == bool:
        return found
    wrong = ~np.isin(found, (0, 1)) if found.dtype.kind in "iuf" else np.ones(found.shape, bool)
    if wrong.any():
        raise ValueError(f"{found[wrong].tolist()[0]!r}")
    return found.astype(bool)


def flags_of(steps: Sequence[bool | None]) -> np.ndarray | None:
    """Return the success of an episode's steps `[T]`; None if no step said. A silent step has not succeeded.

    Some environments report success in the last step alone.
    """
    return np.asarray([bool(step) for step in steps]) if any(step is not None for step in steps) else None


def success_of(infos: Mapping[str, Any], named: str | None = None) -> bool | None:
    """Return whether any success flag of one step is set, whatever their shape; None if `infos` have none.

    `named` is the entry to look at first (`success_key`). Raises `ValueError` for a flag that is neither true nor
    false, such as NaN or a text.
    """
    if (key := success_key(infos, named)) is None:
        return None
    try:
        return bool(as_flags(infos[key]).any())
    except ValueError as error:
        raise ValueError(f"{error} as info[{key!r}], expected true or false,") from None


@dataclass(frozen=True)
class Part(Settings):
    """A condition on the simulator's state in a row: some of its numbers lie within a distance of a target."""

    column: str
    """Name of the state in the dataset, such as `qpos`."""
    entries: tuple[Amount, ...]
    target: tuple[Real, ...]
    within: NotNegative = 0.0
    """Largest Euclidean distance at which the condition still holds."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the condition that `dataclasses.asdict` made a JSON object of."""
        entries, target = (tuple(values[key]) for key in ("entries", "target"))
        return cls(str(values["column"]), entries, target, float(values["within"]))


def judge(parts: Sequence[Part], states: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return reward `[N]`, the number of conditions that hold less their number, and whether all hold `[N]`.

    `states`: columns `[N, ...]` by name. Both are judged on the state in which the row's action is taken.
    """
    held = [
        np.linalg.norm(states[part.column][:, list(part.entries)] - np.asarray(part.target), axis=-1) <= part.within
        for part in parts
    ]
    count = np.sum(held, axis=0)
    return count - float(len(parts)), count == len(parts)


@dataclass(frozen=True)
class Task(Settings):
    """A task's conventions. Hashable, comparable by value; the table of known ones is `o2o.envs.TASKS`."""

    name: str
    family: Family = "other"
    reward_scale: Annotated[float, NotZero()] = 1.0
    """The agent sees scale * reward + bias, in float32."""
    reward_bias: Real = 0.0
    binary: bool = False
    """The raw reward is replaced by success - 1, that is -1 or 0, before scale and bias."""
    terminate_on_success: bool = False
    """A successful step is terminal (mask 0) and ends the episode."""
    sparse: bool = False
    """The reward takes one value on failure and one on success (see `failure_reward`)."""
    metric: Metric = "success"
    """What evaluation is judged by (`score`): `success` is the return where success is not known; `normalized`
    the return, which ranks alike; `kitchen` is the final step's raw reward divided by 4: the share of subtasks done."""
    has_success: bool = False
    """Whether success means anything here, provided that the environment reports it."""
    success_key: str | None = None
    """Entry of the infos that says whether a step succeeds, looked at before `success` and `is_success`."""
    success_reward: Real | None = None
    """Without a success flag, a step whose raw reward is at least this is a success."""
    raw_failure_reward: Real = 0.0
    """Raw reward of every step of a sparse task that is no success, unless the task is binary."""
    only_successes: bool = False
    """Leave episodes without success out of the dataset (the WSRL paper's Adroit data)."""
    data_share: Portion = 1.0
    """Share of each dataset's episodes that are used, the first ones (RLPD's Adroit: 0.9)."""
    achieved_goal: bool = False
    """Observations keep `achieved_goal`: what it says is in no other entry, such as the place of AntMaze's ant."""
    env_kwargs: tuple[tuple[str, Any], ...] = ()
    """Constructor arguments of the environment, over those of the dataset's specification."""
    env_id: str | None = None
    goal: tuple[Part, ...] = ()
    """What rows of a dataset are judged by (`judge`), in place of their stored rewards and success. A row where all of
    it holds has mask 0. Its episode goes on, and so do windows of rows."""

    def judged(self, metadata: Mapping[str, Any]) -> "Task":
        """Return the task with the goal that a dataset's metadata name (`o2o.data.views`), this one if they do not."""
        goal = metadata.get("goal")
        if not isinstance(goal, Mapping):
            return self
        parts, sparse = tuple(map(Part.from_json, goal["parts"])), bool(goal["sparse"])
        return replace(self, goal=parts, binary=sparse, sparse=sparse)

    def rewards(self, raw: Any, success: Any = None) -> np.ndarray:
        """Return the transformed float32 rewards for raw rewards and success flags of one shape.

        Raises `ConfigError` if the task is binary and `success` is None.
        """
        base = np.asarray(raw, np.float64)
        if self.binary:
            if success is None:
                raise ConfigError(f"task {self.name}: a binary reward needs success flags, and there are none")
            base = np.asarray(success, np.float64) - 1.0
        return np.asarray(self.reward_scale * base + self.reward_bias, np.float32)

    @property
    def failure_reward(self) -> float | None:
        """Return the transformed reward of a failing step of a sparse task, rounded as by `rewards`; else None."""
        return float(self.rewards(self.raw_failure_reward, False)) if self.sparse else None

    def score(self, raw_return: float, last_reward: float, success: bool | None) -> float:
        """Return what an episode is judged by: its raw return, last raw reward or success in any step, by `metric`."""
        if self.metric == "kitchen":
            return last_reward / 4.0
        return float(success) if self.metric == "success" and success is not None else raw_return

    def success(self, raw: Any, flags: Any = None) -> np.ndarray | None:
        """Return boolean success per step from the environment's flags, else from raw rewards, else None."""
        if not self.has_success and not self.binary:
            return None
        if flags is not None:
            return np.asarray(flags, bool)
        if self.success_reward is not None:
            return np.asarray(raw) >= self.success_reward
        return None

    def strange_failures(self, raw: Any, flags: Any = None) -> np.ndarray:
        """Return the steps of a sparse task, by index, that are no success and have another reward than declared.

        Equality is that of the transformed rewards in float32. Empty where success is not known, or decides the reward.
        """
        success = self.success(raw, flags)
        if not self.sparse or self.binary or success is None:
            return np.empty(0, np.int64)
        failed = ~success if self.success_reward is None else ~success & (np.asarray(raw) < self.success_reward)
        return np.flatnonzero(failed & (self.rewards(raw) != self.rewards(self.raw_failure_reward)))
