"""Safety of a robot: one gym wrapper per concern, each of use alone. They go last before the command.

    env = guarded(MyArm(), max_change=0.1, forward=reach, box=(low, high), timeout_s=0.5)

All see the environment's own units. A wrapper that changes a command says so: `info["commanded_action"]` is what the
robot was sent, and it is what a run stores and a recorder writes. `info["safety"]` counts, by concern, the commands of
the episode that were changed or refused. `safety_counts(env)` has them since the environment was made.

What cannot be made safe raises `EnvironmentFaultError`, after the robot's own `stop()` was called if it has one. A run
keeps all transitions before the fault.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o.data.spaces import not_finite
from o2o.errors import ConfigError, EnvironmentFaultError

_log = logging.getLogger(__name__)

Step = tuple[Any, Any, bool, bool, dict[str, Any]]
REPEATS = 3
"""Frames in a row that repeat: a sensor that hangs."""
HALVINGS = 12
"""Steps of bisection between staying and the command: the command is met to 1 part in 4096."""


def stop_robot(env: gym.Env) -> None:
    """Call the robot's `stop()`, if it has one, and end the watch of watchdogs around it until the next step.

    An error of its own is logged, not raised.
    """
    layer = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, Watchdog):
            layer.rest()
        layer = layer.env
    if callable(stop := getattr(env.unwrapped, "stop", None)):
        try:
            stop()
        except Exception:
            _log.exception("the robot's stop() failed")


def safety_counts(env: gym.Env) -> dict[str, int]:
    """Return how many commands each concern has changed or refused since the environment was made."""
    counts: Counter[str] = Counter()
    while isinstance(env, gym.Wrapper):
        if isinstance(env, Guard):
            counts[env.concern] += env.count
        env = env.env
    return dict(counts)


class Guard(gym.Wrapper):
    """Base of the wrappers: changes a command, counts it, and tells what was sent."""

    concern = "guard"

    def __init__(self, env: gym.Env) -> None:
        """Wrap an environment whose actions are a Box. Raises `ConfigError` for another action space."""
        super().__init__(env)
        if not isinstance(env.action_space, spaces.Box):
            raise ConfigError(f"{type(self).__name__} guards actions of a Box, the environment has {env.action_space}")
        self.count = 0
        self._before = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; the episode's count begins anew."""
        self._before = self.count
        observation, info = self.env.reset(seed=seed, options=options)
        self.began(observation)
        return observation, info

    def step(self, action: Any) -> Step:
        """Step with what the guard makes of `action`, in the environment's units."""
        wanted = np.asarray(action)
        if wanted.shape != self.action_space.shape or wanted.dtype.kind not in "fiu" or not_finite(wanted).any():
            self.count += 1
            self.refuse(f"the command {' '.join(str(action).split())} is not {self.action_space.shape} finite numbers")
        allowed = self.limit(wanted.astype(np.float64)).astype(self.action_space.dtype)
        changed = not np.array_equal(allowed, wanted.astype(self.action_space.dtype))
        if changed:
            if not self.count:
                _log.warning("%s changed a command from %s to %s (reported once)", self.concern, wanted, allowed)
            self.count += 1
        observation, reward, terminated, truncated, info = self.env.step(allowed)
        sent = np.asarray(info.get("commanded_action", allowed))
        self.played(sent.astype(np.float64), observation)
        counts = {**info.get("safety", {}), self.concern: self.count - self._before}
        return observation, reward, terminated, truncated, {**info, "commanded_action": sent, "safety": counts}

    def refuse(self, why: str) -> None:
        """Stop the robot and raise `EnvironmentFaultError`."""
        stop_robot(self)
        raise EnvironmentFaultError(f"{self.concern}: {why}; the robot was stopped")

    def began(self, observation: Any) -> None:
        """Note the first observation of an episode."""

    def limit(self, action: np.ndarray) -> np.ndarray:
        """Return the command `[*shape]` that may be sent in place of `action`."""
        return action

    def played(self, sent: np.ndarray, observation: Any) -> None:
        """Note the command that was sent, and what was observed after it."""


class ActionBounds(Guard):
    """Commands stay within the action space, or within narrower bounds. NaN, Inf and other shapes are refused."""

    concern = "bounds"

    def __init__(self, env: gym.Env, low: Any = None, high: Any = None) -> None:
        """Clip to `low` and `high`, numbers or `[*shape]`; default: the action space's."""
        super().__init__(env)
        space = env.action_space
        assert isinstance(space, spaces.Box)
        self.low = np.maximum(space.low, -np.inf if low is None else low).astype(np.float64)
        self.high = np.minimum(space.high, np.inf if high is None else high).astype(np.float64)
        if (self.low > self.high).any():
            raise ConfigError(f"ActionBounds: low {low} is above high {high} within {space}")

    def limit(self, action: np.ndarray) -> np.ndarray:
        """Clip."""
        return np.clip(action, self.low, self.high)


class SlewLimit(Guard):
    """From one step to the next no entry of the command changes by more than `max_change`.

    The first command of an episode is compared with `rest`. What counts is the command that reached the robot.
    """

    concern = "slew"

    def __init__(self, env: gym.Env, max_change: Any, rest: Any = 0.0) -> None:
        """`max_change` and `rest`: numbers or `[*shape]`, in the action's units. Raises `ConfigError` below 0."""
        super().__init__(env)
        assert env.action_space.shape is not None
        self.max_change = np.broadcast_to(np.asarray(max_change, np.float64), env.action_space.shape)
        if not (self.max_change >= 0).all():
            raise ConfigError(f"SlewLimit: max_change {max_change} must not be negative or NaN")
        self.rest = np.broadcast_to(np.asarray(rest, np.float64), env.action_space.shape)
        self._last = self.rest

    def began(self, observation: Any) -> None:
        """The robot is at rest."""
        self._last = self.rest

    def limit(self, action: np.ndarray) -> np.ndarray:
        """Return the nearest command within reach of the last one."""
        return np.clip(action, self._last - self.max_change, self._last + self.max_change)

    def played(self, sent: np.ndarray, observation: Any) -> None:
        """Note the command."""
        self._last = sent


class VelocityLimit(Guard):
    """A command that is a target position stays within `max_step` of where the robot is."""

    concern = "velocity"

    def __init__(self, env: gym.Env, max_step: Any, position: Callable[[Any], Any]) -> None:
        """`position(observation)` gives the present position `[*shape]` in the action's units.

        `max_step`: the speed limit times the time of a step, a number or `[*shape]`.
        """
        super().__init__(env)
        self.max_step = np.asarray(max_step, np.float64)
        if not (self.max_step >= 0).all():
            raise ConfigError(f"VelocityLimit: max_step {max_step} must not be negative or NaN")
        self._position, self._at = position, np.zeros(0)

    def began(self, observation: Any) -> None:
        """Note where the robot is."""
        self._at = np.asarray(self._position(observation), np.float64)
        if self._at.shape != self.action_space.shape or not np.isfinite(self._at).all():
            self.refuse(f"position() gave {self._at}, expected {self.action_space.shape} finite numbers")

    def limit(self, action: np.ndarray) -> np.ndarray:
        """Return the nearest target within reach."""
        return np.clip(action, self._at - self.max_step, self._at + self.max_step)

    def played(self, sent: np.ndarray, observation: Any) -> None:
        """Note where the robot is."""
        self.began(observation)


class WorkspaceBox(Guard):
    """The robot's point stays in a box: a command that would leave it is shortened towards `stay`.

    A step is safe if the point that `forward` predicts lies in the box, or is nearer to the box than with `stay`.
    If `stay` itself would lead outside, it is sent.
    """

    concern = "workspace"

    def __init__(
        self, env: gym.Env, forward: Callable[[Any, np.ndarray], Any], low: Any, high: Any, stay: Any = 0.0
    ) -> None:
        """`forward(observation, action)` predicts the point `[D]` after the step; `low`, `high`: the box, `[D]`.

        `stay`: the command that does not move, a number, `[*shape]`, or a function of the observation.
        """
        super().__init__(env)
        self._forward, self._stay, self._seen = forward, stay, None
        self.low, self.high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if self.low.shape != self.high.shape or not (self.low < self.high).all():
            raise ConfigError(f"WorkspaceBox: low {low} must be below high {high}, and of its shape")

    def began(self, observation: Any) -> None:
        """Note the observation that the next command is predicted from."""
        self._seen = observation

    def played(self, sent: np.ndarray, observation: Any) -> None:
        """Note the observation that the next command is predicted from."""
        self._seen = observation

    def limit(self, action: np.ndarray) -> np.ndarray:
        """Return the part of the way from `stay` to the command that is safe."""
        if self._outside(action) == 0:
            return action
        stay = self._stay(self._seen) if callable(self._stay) else self._stay
        stay = np.broadcast_to(np.asarray(stay, np.float64), action.shape)
        allowed = self._outside(stay)
        if 0 < self._outside(action) < allowed:  # on its way back into the box
            return action
        safe, unsafe = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = 0.5 * (safe + unsafe)
            if self._outside(stay + middle * (action - stay)) <= allowed:
                safe = middle
            else:
                unsafe = middle
        return stay + safe * (action - stay)

    def _outside(self, action: np.ndarray) -> float:
        """Return how far outside the box the command leads; a prediction that is not finite is infinitely far."""
        point = np.asarray(self._forward(self._seen, action), np.float64)
        if point.shape != self.low.shape:
            self.refuse(f"forward() gave a point of shape {point.shape}, the box has {self.low.shape}")
        if not np.isfinite(point).all():
            return float("inf")
        return float(np.linalg.norm(np.maximum(self.low - point, 0) + np.maximum(point - self.high, 0)))


class DeadMan(Guard):
    """Without a person's hand on the switch the robot gets `stay`, and after `patience` such steps the episode ends."""

    concern = "dead man"

    def __init__(self, env: gym.Env, pressed: Callable[[], bool], stay: Any = 0.0, patience: int | None = None) -> None:
        """`pressed()` says, without waiting, whether the switch is held; an error of its own counts as released."""
        super().__init__(env)
        self._pressed, self._stay, self.patience, self._released = pressed, stay, patience, 0

    def began(self, observation: Any) -> None:
        """Patience begins anew."""
        self._released = 0

    def limit(self, action: np.ndarray) -> np.ndarray:
        """Return the command if the switch is held."""
        try:
            held = bool(self._pressed())
        except Exception:
            _log.exception("the dead-man switch failed: it counts as released")
            held = False
        self._released = 0 if held else self._released + 1
        return action if held else np.broadcast_to(np.asarray(self._stay, np.float64), action.shape)

    def step(self, action: Any) -> Step:
        """Step; a switch that stays released ends the episode as a time limit would."""
        observation, reward, terminated, truncated, info = super().step(action)
        ended = self.patience is not None and self._released >= self.patience
        return observation, reward, terminated, truncated or ended, info


class FreshObservation(Guard):
    """An observation that does not change, or is too old, is a sensor that hangs: the robot is stopped.

    While a frame repeats, the robot gets `stay`. After `max_repeats` such frames the fault is raised. It is also raised
    as soon as an observation is older than `max_age_s`.
    """

    concern = "stale"

    def __init__(
        self,
        env: gym.Env,
        max_repeats: int = REPEATS,
        *,
        watch: Callable[[Any], Any] | None = None,
        age_s: Callable[[Any, Mapping[str, Any]], float] | None = None,
        max_age_s: float = 0.2,
        stay: Any = None,
    ) -> None:
        """Compare `watch(observation)` (default: all of it) bit by bit with the one before.

        `age_s(observation, info)` gives an observation's age in seconds, from a time stamp of the driver. `stay`: the
        command while a frame repeats; None: the policy's.
        """
        super().__init__(env)
        if max_repeats < 1 or not max_age_s > 0:
            raise ConfigError(f"FreshObservation: max_repeats {max_repeats} and max_age_s {max_age_s} must be positive")
        self.max_repeats, self.max_age_s = max_repeats, max_age_s
        self._watch, self._age, self._stay = watch or (lambda observation: observation), age_s, stay
        self._last, self._repeats = b"", 0

    def began(self, observation: Any) -> None:
        """The first frame is new."""
        self._last, self._repeats = _bits(self._watch(observation)), 0

    def limit(self, action: np.ndarray) -> np.ndarray:
        """Return `stay` while a frame repeats."""
        if not self._repeats or self._stay is None:
            return action
        return np.broadcast_to(np.asarray(self._stay, np.float64), action.shape)

    def step(self, action: Any) -> Step:
        """Step; raises `EnvironmentFaultError` for a sensor that hangs."""
        observation, reward, terminated, truncated, info = super().step(action)
        now = _bits(self._watch(observation))
        self._repeats = self._repeats + 1 if now == self._last else 0
        self._last = now
        if self._repeats >= self.max_repeats and not (terminated or truncated):
            self.refuse(f"the observation has not changed for {self._repeats} steps")
        if self._age is not None and not (age := float(self._age(observation, info))) <= self.max_age_s:
            self.refuse(f"the observation is {age:.3g} s old, more than {self.max_age_s:.3g} s")
        return observation, reward, terminated, truncated, info


def _bits(value: Any) -> bytes:
    if isinstance(value, Mapping):
        return b"".join(_bits(value[key]) for key in sorted(value))
    if isinstance(value, tuple | list):
        return b"".join(map(_bits, value))
    return np.ascontiguousarray(value).tobytes()


class Watchdog(gym.Wrapper):
    """Call the robot's `stop()` if no step arrives, or none returns, within `timeout_s` of the one before.

    It watches from a thread of its own, so a policy that hangs and a driver that hangs are both noticed. The next step
    raises `EnvironmentFaultError`; a reset begins anew. The watch begins with an episode's first step: before it the
    robot stands where the reset left it, and a policy may compile.
    """

    def __init__(self, env: gym.Env, timeout_s: float, stop: Callable[[], None] | None = None) -> None:
        """`stop`: what to call; default: the environment's `stop()`. Raises `ConfigError` if there is neither."""
        super().__init__(env)
        stop = stop or getattr(env.unwrapped, "stop", None)
        if not callable(stop) or not timeout_s > 0:
            raise ConfigError("Watchdog needs a positive timeout_s, and stop or an environment with a method stop()")
        self.timeout_s, self._stop, self.count = timeout_s, stop, 0
        self._due: float | None = None
        self._barked: str | None = None
        self._playing = self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="o2o-watchdog", daemon=True)
        self._thread.start()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, for as long as it takes."""
        self._set(None)
        self._barked = None
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Step:
        """Step."""
        self._raise()
        self._playing = True
        try:
            self._set(self.timeout_s)
            result = self.env.step(action)
        finally:
            self._playing = False
        self._raise()
        self._set(None if result[2] or result[3] else self.timeout_s)
        return result

    def rest(self) -> None:
        """Watch no more until the next step: the robot was stopped by someone else."""
        self._set(None)

    def close(self) -> None:
        """End the watch and close the environment."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()
        super().close()

    def _raise(self) -> None:
        if self._barked:
            raise EnvironmentFaultError(f"watchdog: {self._barked}; the robot was stopped")

    def _set(self, seconds: float | None) -> None:
        with self._change:
            self._due = None if seconds is None else time.monotonic() + seconds
            self._change.notify()

    def _watch(self) -> None:
        with self._change:
            while not self._closed:
                left = None if self._due is None else self._due - time.monotonic()
                if left is None or left > 0:
                    self._change.wait(left)
                    continue
                what = "a step did not return" if self._playing else "no step arrived"
                self._due, self._barked = None, f"{what} within {self.timeout_s:.3g} s"
                self.count += 1
                try:
                    self._stop()
                except Exception:
                    _log.exception("the robot's stop() failed")


class ControlRate(gym.Wrapper):
    """Steps begin at a fixed rate. An overrun is a step that was asked for too late; it is counted.

    What happens then: `stretch` begins the step at once and counts time from there; `skip` waits for the next tick of
    the clock; `fault` raises `EnvironmentFaultError` after `max_overruns` in a row and stops the robot.
    """

    def __init__(
        self,
        env: gym.Env,
        hz: float,
        overrun: Literal["stretch", "skip", "fault"] = "stretch",
        max_overruns: int = 3,
        window: int = 10_000,
    ) -> None:
        """`hz`: steps per second. `window`: newest steps that `jitter()` speaks of."""
        super().__init__(env)
        if not 0 < hz < float("inf") or overrun not in ("stretch", "skip", "fault") or max_overruns < 1:
            raise ConfigError(f"ControlRate: hz {hz}, overrun {overrun!r}, max_overruns {max_overruns}; see its help")
        self.period_s, self.overrun, self.max_overruns = 1.0 / hz, overrun, max_overruns
        self.overruns, self._row, self._due = 0, 0, None
        self._late: deque[float] = deque(maxlen=window)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; the clock starts with the first step."""
        self._due, self._row = None, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Step:
        """Step when it is due."""
        now = time.monotonic()
        due = now if self._due is None else self._due
        if now > due + 0.05 * self.period_s:
            self.overruns, self._row = self.overruns + 1, self._row + 1
            if self.overrun == "fault" and self._row >= self.max_overruns:
                stop_robot(self)
                raise EnvironmentFaultError(
                    f"control rate: {self._row} commands in a row came late, the last by {1e3 * (now - due):.1f} ms at "
                    f"{1 / self.period_s:.3g} Hz; the robot was stopped"
                )
            if self.overrun == "skip":
                due += self.period_s * np.ceil((now - due) / self.period_s)
        else:
            self._row = 0
        wait_until(due)
        begun = time.monotonic()
        self._late.append(begun - due)
        self._due = (begun if self.overrun == "stretch" and begun > due + 0.05 * self.period_s else due) + self.period_s
        return self.env.step(action)

    def jitter(self) -> dict[str, float]:
        """Return how late steps began, in ms: `p50`, `p99`, `max`; their number `steps`, and `overruns`."""
        late = 1e3 * np.asarray(self._late or [0.0])
        p50, p99 = np.percentile(late, [50, 99])
        counts = {"steps": float(len(self._late)), "overruns": float(self.overruns)}
        return {"p50": float(p50), "p99": float(p99), "max": float(late.max()), **counts}


SPIN_S = 0.0005


def wait_until(due: float) -> None:
    """Return at `due` of `time.monotonic()`: sleep, and look at the clock for the last half millisecond."""
    if (left := due - time.monotonic() - SPIN_S) > 0:
        time.sleep(left)
    while time.monotonic() < due:
        pass


def guarded(
    env: gym.Env,
    *,
    low: Any = None,
    high: Any = None,
    max_change: Any = None,
    rest: Any = 0.0,
    max_step: Any = None,
    position: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, np.ndarray], Any] | None = None,
    box: Sequence[Any] | None = None,
    pressed: Callable[[], bool] | None = None,
    max_repeats: int | None = None,
    age_s: Callable[[Any, Mapping[str, Any]], float] | None = None,
    max_age_s: float = 0.2,
    timeout_s: float | None = None,
    hz: float | None = None,
    stay: Any = 0.0,
) -> gym.Env:
    """Put the guards that have a setting around a robot.

    From the robot outwards: workspace, bounds, velocity, slew, dead man, stale observations, rate, watchdog. A command
    passes them from the outside in. So the box has the last word; what it sends lies between `stay` and a command that
    the others have allowed. At its edge a command may therefore change faster than `max_change`. Settings are those of
    the wrappers; `box` is (low, high), for `forward`.
    """
    if forward is not None or box is not None:
        if forward is None or box is None:
            raise ConfigError("guarded: the workspace needs both forward and box=(low, high)")
        env = WorkspaceBox(env, forward, *box, stay=stay)
    env = ActionBounds(env, low, high)
    if max_step is not None or position is not None:
        if max_step is None or position is None:
            raise ConfigError("guarded: the velocity limit needs both max_step and position")
        env = VelocityLimit(env, max_step, position)
    env = env if max_change is None else SlewLimit(env, max_change, rest)
    env = env if pressed is None else DeadMan(env, pressed, stay)
    if max_repeats is not None or age_s is not None:
        env = FreshObservation(env, max_repeats or REPEATS, age_s=age_s, max_age_s=max_age_s)
    env = env if hz is None else ControlRate(env, hz)
    return env if timeout_s is None else Watchdog(env, timeout_s)
