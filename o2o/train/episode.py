"""One environment and the episode under way in it: counters, reset seeds, and how to return to the same point.

Every reset has a seed derived from (run seed, stream, seed index, episode). So an episode is a function of that seed
and of the actions taken. A checkpoint keeps both, and a resume plays the actions again. This is exact for every
deterministic simulator and needs no knowledge of its internals. If the reset does not return the observation that the
episode began with (a robot), no action is played and a new episode begins. An environment with
`metadata["replayable"] = False` is never asked to play an episode again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import jax
import numpy as np

from o2o.data.task import Task

TRAIN_STREAM, EVAL_STREAM, FIXED_STREAM = 0, 1, 2
"""Streams of reset seeds: training, evaluations with starts of their own, a run's evaluations on the same starts."""


def reset_seed(*parts: int) -> int:
    """Derive one reset seed from a tuple of non-negative integers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass
class Step:
    """The result of one environment step, in the toolkit's conventions."""

    action: np.ndarray
    """The action that was executed, `[A]` in [-1, 1]: a human's takeover replaces the policy's."""
    reward: float
    """The reward after the task's transformation."""
    terminated: bool
    truncated: bool
    next_observation: Any
    """The true next observation, also at an episode's end."""
    info: dict[str, Any]

    @property
    def ended(self) -> bool:
        """Whether the episode is over, by either cause."""
        return self.terminated or self.truncated

    @property
    def intervened(self) -> bool:
        """Whether a human took over."""
        return bool(self.info.get("intervened", "intervene_action" in self.info))


@dataclass
class EnvSlot:
    """An environment and the episode under way in it (`o2o.data.rollout.Slot`)."""

    env: gymnasium.Env
    seeds: tuple[int, ...]
    """Prefix of the reset seed: run seed, stream, seed index and, if needed, further indices."""
    episode: int = -1
    observation: Any = None
    first: str | None = None
    """The fingerprint of the episode's first observation."""
    exact: bool = True
    """Whether the last `restore` returned to the very point of its snapshot."""
    actions: list[np.ndarray] = field(default_factory=list)
    raw_return: float = 0.0
    raw_last: float = 0.0
    """The last step's raw reward."""
    success: bool | None = None
    success_last: bool | None = None
    interventions: int = 0
    """Steps of the episode in which a human took over."""

    def reset(self, episode: int | None = None) -> Any:
        """Begin the next episode, or number `episode`, and return its first observation."""
        return self.began(self.env.reset(seed=self.begin(episode))[0])

    def begin(self, episode: int | None = None) -> int:
        """Begin the next episode, or number `episode`, and return its reset seed. The caller resets the environment."""
        self.episode = self.episode + 1 if episode is None else episode
        self.first, self.actions = None, []
        self.raw_return, self.raw_last, self.interventions = 0.0, 0.0, 0
        self.success, self.success_last = None, None
        if self.env.has_wrapper_attr("name_episode"):
            self.env.get_wrapper_attr("name_episode")((*self.seeds, self.episode))
        return reset_seed(*self.seeds, self.episode)

    def began(self, observation: Any) -> Any:
        """Store the first observation of the episode, and return it."""
        self.observation, self.first = observation, fingerprint(observation)
        return observation

    def step(self, action: np.ndarray) -> Step:
        """Play `action` `[A]` in [-1, 1]. An ended episode is not reset."""
        return self.played(action, self.env.step(action))

    def played(self, action: np.ndarray, outcome: tuple[Any, Any, bool, bool, dict[str, Any]]) -> Step:
        """Count a step: `action` was played, and the environment's `step` returned `outcome`."""
        observation, reward, terminated, truncated, info = outcome
        executed = np.asarray(info.get("executed_action", action), np.float32)
        self.observation = observation
        self.actions.append(np.asarray(action, np.float32).copy())
        self.raw_last = float(info.get("raw_reward", reward))
        self.raw_return += self.raw_last
        if info.get("success") is not None:
            self.success_last = bool(info["success"])
            self.success = bool(self.success) or self.success_last
        step = Step(executed, float(reward), bool(terminated), bool(truncated), observation, info)
        self.interventions += step.intervened
        return step

    def row(self, terminated: bool, normalized: Callable[[float], float | None] | None = None) -> dict[str, Any]:
        """Return the finished episode's row.

        `return` is the sum of raw rewards, `score` the number by which the task judges the episode (`Task.score`) and
        `intervention` the share of steps in which a human took over. `normalized` maps a raw return to the dataset's
        normalised score.
        """
        task = self.env.get_wrapper_attr("task") if self.env.has_wrapper_attr("task") else None
        judge = task if isinstance(task, Task) else Task("unknown")
        return {
            "episode": self.episode,
            "return": self.raw_return,
            "length": len(self.actions),
            "success": self.success,
            "success_last": self.success_last,
            "normalized": normalized(self.raw_return) if normalized else None,
            "score": judge.score(self.raw_return, self.raw_last, self.success),
            "terminated": terminated,
            "intervention": self.interventions / max(len(self.actions), 1),
        }

    @property
    def replayable(self) -> bool:
        """Whether an episode can be played again; true unless the environment's metadata denies it."""
        return bool(self.env.metadata.get("replayable", True))

    def snapshot(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON types."""
        actions = [action.tolist() for action in self.actions]
        return {"episode": self.episode, "first": self.first, "actions": actions}

    def restore(self, snapshot: dict[str, Any], observation: Any) -> bool:
        """Play the snapshot's episode up to the same point; return whether it ends at `observation`, bit for bit.

        If it does not (a robot, another version of the simulator), a new episode begins. If already the first
        observation differs, no action is played before.
        """
        if self.replayable:
            self.exact = self._replay(snapshot, observation)
        else:
            self.exact = False
            self.reset(snapshot["episode"] + 1)
        return self.exact

    def _replay(self, snapshot: dict[str, Any], observation: Any) -> bool:
        self.reset(snapshot["episode"])
        if self.first != snapshot.get("first", self.first):
            return False
        for action in snapshot["actions"]:
            self.step(np.asarray(action, np.float32))
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), self.observation, observation)
        if not all(jax.tree.leaves(same)):
            self.reset(snapshot["episode"] + 1)
            return False
        return True


def fingerprint(observation: Any) -> str:
    """Return a digest of an observation's bytes, shapes and types as hexadecimal text."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(observation):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()
