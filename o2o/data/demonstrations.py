"""Episodes played in a bare environment, a robot's for instance, to make its first dataset of."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from o2o.data.files import Episode
from o2o.data.spaces import ActionMap
from o2o.data.task import any_success
from o2o.errors import DatasetError


def record(
    env: gym.Env, policy: Callable[[Any, np.random.Generator], np.ndarray], steps: int, seed: int = 0
) -> Iterator[Episode]:
    """Yield whole episodes of `policy(observation, rng) -> action` in a bare environment until they hold `steps` steps.

    Each is reset with its own seed, so that its actions replay it. A policy's `reset(rng)`, if any, is called first.
    The actions are those executed: a human's `info["intervene_action"]` wins. Raises `DatasetError` for an action that
    is not finite or of another shape; the policy's is not played. Also for an environment of `o2o.envs.make`, whose
    rewards, observations and actions are not those that a dataset holds.
    """
    if env.has_wrapper_attr("action_map") and isinstance(env.get_wrapper_attr("action_map"), ActionMap):
        raise DatasetError(
            "o2o's wrappers are around the environment to record in, and would be applied to the dataset once more: "
            "make it with gymnasium.make (for images, o2o.envs.CameraObservation around that)"
        )
    rng, done, number = np.random.default_rng(seed), 0, 0
    while done < steps:
        start = int(rng.integers(2**31))
        observation, _ = env.reset(seed=start)
        if callable(begin := getattr(policy, "reset", None)):
            begin(rng)
        observations, rows, over = [copy.deepcopy(observation)], [], False
        while not over:
            where = f"step {len(rows)} of episode {number}"
            action = policy(observation, rng)
            executed = _checked(action, env, f"the policy's action at {where}")
            observation, reward, terminated, truncated, step_info = env.step(action)
            human = "intervene_action" in step_info
            if human:
                executed = _checked(step_info["intervene_action"], env, f"the intervene_action at {where}")
            observations.append(copy.deepcopy(observation))  # which may be the same array every time
            success = any_success(step_info.get("success"))
            rows.append((executed, float(reward), bool(terminated), bool(truncated), success, human))
            over = terminated or truncated
        done, number = done + len(rows), number + 1
        actions, rewards, terminations, truncations, success, human = zip(*rows, strict=True)
        yield Episode(
            observations=_stack(observations),
            actions=np.stack(actions),
            rewards=np.asarray(rewards),
            terminations=np.asarray(terminations),
            truncations=np.asarray(truncations),
            success=None if None in success else np.asarray(success, bool),
            seed=start,
            intervened=np.asarray(human) if any(human) else None,
        )


def _checked(action: Any, env: gym.Env, what: str) -> np.ndarray:
    """Return a copy of an action `[*shape]`."""
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
