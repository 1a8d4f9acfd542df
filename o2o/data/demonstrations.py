"""Record episodes in a bare environment, such as a robot's, for its first dataset."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from o2o.data.files import Episode
from o2o.data.rollout import OneEach, Played, rollout
from o2o.data.spaces import ActionMap
from o2o.data.task import flags_of, success_of
from o2o.errors import DatasetError


def record(
    env: gym.Env,
    policy: Callable[[Any, np.random.Generator], np.ndarray],
    steps: int,
    seed: int = 0,
    success_key: str | None = None,
) -> Iterator[Episode]:
    """Yield whole episodes of `policy(observation, rng) -> action` in a bare environment until they hold `steps` steps.

    Every episode is reset with a seed of its own, so its actions replay it. If the policy has a `reset(rng)`, it is
    called at the start of each episode. The recorded actions are those executed: a human's `info["intervene_action"]`
    replaces the policy's. Success is looked up under `success_key` first (`Task.success_key`). Raises `DatasetError`
    for an action that is not finite or has another shape; such an action of the policy is not played. Raises
    `DatasetError` for an environment of `o2o.envs.make` too: a dataset holds the
    rewards, observations and actions of the bare environment.
    """
    if env.has_wrapper_attr("action_map") and isinstance(env.get_wrapper_attr("action_map"), ActionMap):
        raise DatasetError(
            "o2o's wrappers are around the environment to record in, and would be applied to the dataset once more: "
            "make it with gymnasium.make (for images, o2o.envs.CameraObservation around that)"
        )
    rng = np.random.default_rng(seed)
    slot = _Recording(env, rng, success_key)
    for _ in rollout(OneEach(_Demonstrator(policy, rng)), [slot], [slot.numbers(steps)]):
        yield slot.episode()


@dataclass
class _Demonstrator:
    """The policy, as the loop calls it; it draws from the generator that also gives the seeds of resets."""

    policy: Callable[[Any, np.random.Generator], np.ndarray]
    rng: np.random.Generator

    def reset(self, seed: int) -> None:
        if callable(begin := getattr(self.policy, "reset", None)):
            begin(self.rng)

    def interrupt(self) -> None:
        pass

    def act(self, observation: Any) -> np.ndarray:
        return self.policy(observation, self.rng)


class _Recording:
    """A bare environment (`o2o.data.rollout.Slot`) that remembers the episode under way."""

    def __init__(self, env: gym.Env, rng: np.random.Generator, success_key: str | None) -> None:
        self._env, self._rng, self._total, self._success_key = env, rng, 0, success_key

    def numbers(self, steps: int) -> Iterator[int]:
        """Number episodes until `steps` steps are played."""
        number = 0
        while self._total < steps:
            yield number
            number += 1

    def reset(self, episode: int) -> None:
        self._number, self._seed = episode, int(self._rng.integers(2**31))
        self.observation, _ = self._env.reset(seed=self._seed)
        self._observations, self._rows = [copy.deepcopy(self.observation)], []

    def step(self, action: Any) -> Played:
        where = f"step {len(self._rows)} of episode {self._number}"
        executed = _checked(action, self._env, f"the policy's action at {where}")
        self.observation, reward, terminated, truncated, info = self._env.step(action)
        human = "intervene_action" in info
        if human:
            executed = _checked(info["intervene_action"], self._env, f"the intervene_action at {where}")
        if "commanded_action" in info:
            executed = _checked(info["commanded_action"], self._env, f"the commanded_action at {where}")
        self._observations.append(copy.deepcopy(self.observation))  # environments may write into one array
        try:
            success = success_of(info, self._success_key)
        except ValueError as error:
            raise DatasetError(f"the environment returned {error} at {where}") from None
        self._rows.append((executed, float(reward), bool(terminated), bool(truncated), success, human))
        self._total += 1
        return Played(bool(terminated or truncated), human)

    def episode(self) -> Episode:
        """Return the episode that has just ended."""
        actions, rewards, terminations, truncations, success, human = zip(*self._rows, strict=True)
        return Episode(
            observations=_stack(self._observations),
            actions=np.stack(actions),
            rewards=np.asarray(rewards),
            terminations=np.asarray(terminations),
            truncations=np.asarray(truncations),
            success=flags_of(success),
            seed=self._seed,
            intervened=np.asarray(human) if any(human) else None,
        )


def _checked(action: Any, env: gym.Env, what: str) -> np.ndarray:
    """Return a copy of an action `[*shape]`; raise `DatasetError`, naming `what`, if it cannot be stored."""
    found = np.array(action)
    if found.shape != env.action_space.shape or found.dtype.kind not in "fiub" or not np.isfinite(found).all():
        raise DatasetError(
            f"{what} is {' '.join(str(action).split())}; expected finite numbers of shape {env.action_space.shape}"
        )
    return found


def _stack(observations: list[Any]) -> Any:
    first = observations[0]
    if isinstance(first, dict):
        return {key: _stack([observation[key] for observation in observations]) for key in first}
    if isinstance(first, tuple):
        return tuple(_stack([observation[i] for observation in observations]) for i in range(len(first)))
    return np.stack(observations)
