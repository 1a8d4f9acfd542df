"""One gym wrapper per concern, here in the order, from the inside, in which `o2o.envs.make` stacks them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np

from o2o.data.history import History, joined_space
from o2o.data.rollout import executed_action
from o2o.data.spaces import ActionMap, ObservationSpec, not_finite, with_base_action
from o2o.data.task import Task, success_of
from o2o.envs.safety import stop_robot
from o2o.errors import DivergenceError, EnvironmentFaultError, EnvironmentMismatchError, O2OError

_log = logging.getLogger(__name__)

Step = tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]
Reset = tuple[Any, dict[str, Any]]


def _not_finite(value: Any) -> np.ndarray:
    """Return the numbers of an array, or a single one, that float32 cannot hold as finite ones."""
    array = np.asarray(value)
    return array[not_finite(array)] if array.dtype.kind == "f" else np.empty(0)


class FaultGuard(gym.Wrapper):
    """Turn an exception of the environment, or NaN or Inf from it, into an `EnvironmentFaultError` naming the step.

    So also a reward that is no number, and an `intervene_action` that is not of the action space's shape. What float32
    cannot hold is Inf. A robot's own `stop()` is called first.
    """

    def __init__(self, env: gym.Env, success_key: str | None = None) -> None:
        """Wrap the bare environment; `success_key` is the task's."""
        super().__init__(env)
        self._success_key = success_key
        self._name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
        """Reset; the observation must be finite."""
        self._step = 0
        with self._guarded():
            observation, info = self.env.reset(seed=seed, options=options)
        self._check(observation, "observation")
        return observation, info

    def step(self, action: Any) -> Step:
        """Step; observation, reward and a human's `intervene_action` must be finite."""
        self._step += 1
        with self._guarded():
            observation, reward, terminated, truncated, info = self.env.step(action)
        self._check(observation, "observation")
        try:
            number = float(reward)
        except (TypeError, ValueError):
            raise self._fault(f"returned {reward!r} as its reward, expected a number,") from None
        if len(_not_finite(number)):
            raise self._fault(f"returned the reward {number}")
        try:
            success_of(info, self._success_key)
        except ValueError as error:
            raise self._fault(f"returned {error}") from None
        if "intervene_action" in info:
            self._check_takeover(info["intervene_action"])
        return observation, reward, bool(terminated), bool(truncated), info

    def close(self) -> None:
        """Close the environment."""
        with self._guarded("as it was closed"):
            super().close()

    @contextmanager
    def _guarded(self, when: str | None = None) -> Iterator[None]:
        try:
            yield
        except (O2OError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit, or a cancelled task of asyncio
            raise self._fault(f"raised {type(error).__name__}: {error}", when) from error

    def _check_takeover(self, action: Any) -> None:
        try:
            found = np.asarray(action, np.float64)
        except (TypeError, ValueError):
            raise self._fault(f"returned {action!r} as its intervene_action, expected an array of numbers") from None
        if found.shape != self.action_space.shape:
            expected = f"expected {self.action_space.shape}; leave it out where nobody takes over"
            raise self._fault(f"returned an intervene_action of shape {found.shape}, {expected},")
        self._check(found, "intervene_action")

    def _check(self, value: Any, where: str) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                self._check(entry, f"{where} {key!r}" if where == "observation" else f"{where}/{key}")
        elif isinstance(value, tuple | list):
            for i, entry in enumerate(value):
                self._check(entry, f"{where}[{i}]")
        elif len(bad := _not_finite(value)):
            raise self._fault(f"returned {bad[0]} in its {where}")

    def _fault(self, what: str, when: str | None = None) -> EnvironmentFaultError:
        stop_robot(self)
        when = when or (f"at step {self._step} of the episode" if self._step else "on reset")
        return EnvironmentFaultError(f"environment {self._name} {' '.join(what.split())} {when}")


class FlattenObservation(gym.ObservationWrapper):
    """Observations as float32 `[D]`, or a dict of `state` and uint8 images."""

    def __init__(self, env: gym.Env, spec: ObservationSpec) -> None:
        """Flatten with the given spec."""
        super().__init__(env)
        self.observation_spec = spec
        self.observation_space = spec.space

    def observation(self, observation: Any) -> Any:
        """Return the flat observation."""
        return self.observation_spec.flatten(observation)


class MapAction(gym.Wrapper):
    """Actions in [-1, 1], clipped. `info["executed_action"]` is the action executed: a takeover's if there was one.

    `info["intervened"]` says whether a human took over (`intervene_action`). An action of theirs outside the map is
    clipped too; the first one logs a warning.
    """

    def __init__(self, env: gym.Env, action_map: ActionMap) -> None:
        """Map with the given action map."""
        super().__init__(env)
        self.action_map = action_map
        self.action_space = action_map.space
        self._told = False

    def step(self, action: Any) -> Step:
        """Step with an action `[A]` in [-1, 1]; raises `DivergenceError`, nothing moved, if it is not finite."""
        flat = np.asarray(action, np.float32).reshape(-1)
        if len(bad := np.flatnonzero(~np.isfinite(flat))):
            raise DivergenceError(
                f"the policy's action has {flat[bad[0]]} in entry {bad[0]} and was not played: the learner diverged; "
                "take an earlier checkpoint, or train again with a lower learning rate"
            )
        env_action = self.action_map.to_env(action)
        if len(bad := np.flatnonzero(~np.isfinite(env_action))):
            raise EnvironmentMismatchError(
                f"the action {flat} becomes {env_action.reshape(-1)[bad[0]]} in the environment's units: the bounds of "
                "its action space are too large"
            )
        observation, reward, terminated, truncated, info = self.env.step(env_action)
        info["intervened"] = "intervene_action" in info
        info["executed_action"] = self.action_map.from_env(executed_action(info, env_action))
        if info["intervened"] and not self._told:
            self._tell(np.asarray(info["intervene_action"], np.float64).reshape(-1))
        return observation, reward, terminated, truncated, info

    def _tell(self, takeover: np.ndarray) -> None:
        """Log a warning if a takeover `[A]` lies outside the actions that can be stored."""
        entries = np.flatnonzero(self.action_map.outside(takeover.reshape(self.action_map.shape)))
        if not len(entries):
            return
        i, self._told = entries[0], True
        _log.warning(
            "a takeover's action has %g in entry %d, but the run's actions lie within [%g, %g] there: the agent learns "
            "the clipped action (reported once). Is this range the dataset's (action_range 'data', agent residual)? "
            "Then record demonstrations that reach as far, or start a run with action_range 'space'",
            takeover[i],
            i,
            self.action_map.low[i],
            self.action_map.high[i],
        )


class TaskReward(gym.Wrapper):
    """The task's reward, success and termination; `info` has `raw_reward` and `success` (None if unknown)."""

    def __init__(self, env: gym.Env, task: Task, terminate: bool = True) -> None:
        """Apply `task`; without `terminate`, success does not end the episode."""
        super().__init__(env)
        self.task = task
        self.terminates = terminate and task.terminate_on_success
        """Whether success ends an episode."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
        """Reset; the same entries of `info` as in a step."""
        observation, info = self.env.reset(seed=seed, options=options)
        try:
            success = self._success(0.0, info)
        except ValueError:  # such as NaN: nothing has been done that could have succeeded
            success = None
        return observation, info | {"raw_reward": 0.0, "success": success}

    def step(self, action: Any) -> Step:
        """Step."""
        observation, raw, terminated, truncated, info = self.env.step(action)
        raw = float(raw)
        success = self._success(raw, info)
        terminated = terminated or (self.terminates and bool(success))
        return (
            observation,
            float(self.task.rewards(raw, success)),
            terminated,
            truncated,
            info | {"raw_reward": raw, "success": success},
        )

    def _success(self, raw: float, info: dict[str, Any]) -> bool | None:
        success = self.task.success(raw, success_of(info, self.task.success_key))
        return None if success is None else bool(success)


class StackHistory(gym.Wrapper):
    """Observations joined to the last ones of their episode (see `o2o.data.history`)."""

    def __init__(self, env: gym.Env, length: int) -> None:
        """Join `length` observations, the present one among them; raises `ConfigError` for a length below 1."""
        super().__init__(env)
        self._history = History(length)
        self.observation_space = joined_space(env.observation_space, length)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
        """Reset; the first observation stands for those before it."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._history.reset(observation), info

    def step(self, action: Any) -> Step:
        """Step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._history.push(observation), reward, terminated, truncated, info


class BaseAction(gym.Wrapper):
    """Observations gain `base_action` `[A]`: what a frozen base policy would do next, in [-1, 1].

    The base begins anew in every episode, before it is asked for anything, whatever ended the one before; the last
    observation of an episode has what it would have done there. Its seed comes from the reset's. A human's takeover
    interrupts it.
    """

    def __init__(self, env: gym.Env, base: Any) -> None:
        """Ask `base`: `reset(seed)`, `act(observation)` of the observation without history -> action `[A]`.

        Its `interrupt()` is called after every step that a human took over.
        """
        super().__init__(env)
        self.base = base
        self._spec: ObservationSpec = env.get_wrapper_attr("observation_spec")
        self._rng: np.random.Generator | None = None
        entries = env.observation_space if isinstance(env.observation_space, gym.spaces.Dict) else None
        space = with_base_action(entries.spaces if entries is not None else env.observation_space, env.action_space)
        self.observation_space = gym.spaces.Dict(space)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
        """Reset environment and base."""
        observation, info = self.env.reset(seed=seed, options=options)
        if seed is not None or self._rng is None:
            self._rng = np.random.default_rng(seed)
        self.base.reset(int(self._rng.integers(2**31)))
        return self._asked(observation), info

    def step(self, action: Any) -> Step:
        """Step with an action `[A]`, the base's or any other."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if info.get("intervened"):
            self.base.interrupt()
        return self._asked(observation), reward, terminated, truncated, info

    def _asked(self, observation: Any) -> dict[str, Any]:
        return with_base_action(observation, self.base.act(self._spec.latest(observation)))
