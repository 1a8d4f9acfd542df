"""Does a robot keep the contract of an environment that training can rely on? Tried on the robot itself."""

import copy
import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.envs.safety import Guard, Watchdog
from o2o.errors import O2OError

GENTLE = 0.05
"""Share of the action range, around its middle, that the check's commands fill."""


def check_robot_env(env: gym.Env, steps: int = 20, seed: int = 0, scale: float = GENTLE) -> list[str]:
    """Play one short episode with small commands; return what is against the contract, one line each with its remedy.

    An empty list is a robot that training can rely on. It moves the robot: `steps` commands, each within `scale` of
    half the action range around its middle, then a second reset. The environment is left open.
    """
    found: list[str] = []
    for problems in (_spaces(env), _description(env)):
        found += problems
    if any(problem.startswith("action space") for problem in found):
        return found
    try:
        found += _episode(env, steps, seed, scale)
    except Exception as error:  # the driver's own
        place = "reset or step"
        found.append(f"{place} raised {type(error).__name__}: {' '.join(str(error).split())}; training would stop here")
    return list(dict.fromkeys(found))


def _spaces(env: gym.Env) -> list[str]:
    found = []
    space = env.action_space
    if not isinstance(space, spaces.Box):
        return [f"action space {space}: give a Box; discrete commands cannot be trained"]
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        found.append(f"action space {space}: give finite bounds, they are what [-1, 1] stands for")
    elif (space.low >= space.high).any():
        found.append(f"action space {space}: an entry's bounds are equal; leave the entry out")
    else:
        try:
            ActionMap.from_space(space)
        except O2OError as error:
            found.append(f"action space: {error}")
    try:
        ObservationSpec.from_space(env.observation_space, True)
    except O2OError as error:
        found.append(f"observation space: {error}")
    return found


def _description(env: gym.Env) -> list[str]:
    found = []
    metadata = env.metadata or {}
    if metadata.get("replayable", True):
        found.append("metadata has no 'replayable': False; say it for hardware, so that nothing is ever played again")
    if not metadata.get("render_fps"):
        found.append("metadata has no 'render_fps', the steps per second; recording by hand needs it")
    if env.spec is not None and env.spec.max_episode_steps is None:
        found.append("no time limit: register it with max_episode_steps")
    if not callable(getattr(env.unwrapped, "stop", None)):
        found.append("no method stop(): give one that holds the robot still, for watchdogs and faults")
    layer, guards, watched = env, 0, False
    while isinstance(layer, gym.Wrapper):
        guards, watched = guards + isinstance(layer, Guard), watched or isinstance(layer, Watchdog)
        layer = layer.env
    if not guards:
        found.append("no safety wrapper: put o2o.envs.safety.guarded around it, or limit commands in the driver")
    if not watched:
        found.append("no watchdog: a policy or driver that hangs leaves the last command running")
    return found


def _episode(env: gym.Env, steps: int, seed: int, scale: float) -> list[str]:
    found: list[str] = []
    space = env.action_space
    assert isinstance(space, spaces.Box)
    middle, half = 0.5 * (space.low + space.high), 0.5 * (space.high - space.low)
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    found += _observed(env, observation, "reset")
    if not isinstance(info, dict):
        found.append(f"reset returned {type(info).__name__} as info, expected a dict")
    times: list[float] = []
    for step in range(steps):
        action = (middle + scale * half * rng.uniform(-1, 1, space.shape)).astype(space.dtype)
        before, kept = copy.deepcopy(observation), action.copy()
        start = time.monotonic()
        result = env.step(action)
        times.append(time.monotonic() - start)
        if len(result) != 5:
            return [
                *found,
                f"step returned {len(result)} values, expected observation, reward, terminated, truncated, info",
            ]
        after, reward, terminated, truncated, info = result
        if not np.array_equal(action, kept):
            found.append("step changed the action array it was given; copy it")
        if not _equal(before, observation):
            found.append("step changed the observation that it had returned before; return a new array each time")
        found += _observed(env, after, "step")
        number = np.asarray(reward)
        if number.shape != () or number.dtype.kind not in "fiub" or not np.isfinite(float(number)):
            found.append(f"step returned the reward {reward!r}, expected a finite number")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                found.append(f"step returned {flag!r} as {name}, expected True or False")
        if terminated and step + 1 < min(steps, 3):
            found.append(f"the episode terminated in step {step + 1} of gentle commands; look at its condition")
        observation = after
        if terminated or truncated:
            break
    found += _rate(env, times)
    found += _observed(env, env.reset(seed=seed + 1)[0], "a second reset")
    return found


def _observed(env: gym.Env, observation: Any, where: str) -> list[str]:
    if not env.observation_space.contains(observation):
        return [
            f"{where} returned an observation outside its space ({_difference(env.observation_space, observation)})"
        ]
    return []


def _difference(space: gym.Space, value: Any) -> str:
    """Return what of an observation is not as its space says."""
    if isinstance(space, spaces.Dict) and isinstance(value, dict):
        if set(value) != set(space.spaces):
            return f"entries {sorted(value)}, expected {sorted(space.spaces)}"
        wrong = next(key for key, sub in space.spaces.items() if not sub.contains(value[key]))
        return f"{wrong}: {_difference(space.spaces[wrong], value[wrong])}"
    if not isinstance(space, spaces.Box) or not isinstance(value, np.ndarray):
        return f"{value!r}, expected {space}"
    if value.dtype != space.dtype or value.shape != space.shape:
        return f"{value.dtype} {value.shape}, expected {space.dtype} {space.shape}"
    flat, low, high = value.reshape(-1), space.low.reshape(-1), space.high.reshape(-1)
    first = np.flatnonzero(~((flat >= low) & (flat <= high)))[0]
    return f"{flat[first]} in entry {first}, expected {low[first]} to {high[first]}"


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return all(map(_equal, first, second))
    return np.array_equal(first, second, equal_nan=np.asarray(first).dtype.kind == "f")


def _rate(env: gym.Env, times: list[float]) -> list[str]:
    fps = (env.metadata or {}).get("render_fps")
    if not fps or not times:
        return []
    slow = float(np.median(times))
    if slow > 1.2 / fps:
        return [f"a step takes {1e3 * slow:.0f} ms, longer than the {1e3 / fps:.0f} ms of render_fps {fps}"]
    return []
