"""A simulator as a Gymnasium environment: what evaluates, records and looks at it, one step at a time."""

from functools import cached_property
from typing import Any

import gymnasium
import jax
import numpy as np

from o2o.errors import ConfigError
from o2o.simulators.pointmaze import PointMaze
from o2o.simulators.protocol import Simulator


class SimulatorEnv(gymnasium.Env):
    """One environment of a `Simulator`. It is registered as any other; `o2o.train.simulated` looks inside it."""

    metadata = {"render_modes": []}

    def __init__(self, simulator: Simulator, render_mode: str | None = None) -> None:
        """Play `simulator`. Raises `ConfigError` for a render mode."""
        if render_mode is not None:
            raise ConfigError(f"a simulator in JAX draws no pictures: render_mode is {render_mode!r}, expected None")
        self.simulator = simulator
        self.observation_space, self.action_space = simulator.observation_space, simulator.action_space
        self._state: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the episode of a seed, or of a random one that follows from earlier seeds."""
        super().reset(seed=seed)
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        self._state, observation = self._reset(jax.random.key(number))
        return self._as_numpy(observation), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Play an action of the action space."""
        self._state, observation, outcome = self._step(self._state, np.asarray(action, np.float32))
        info = {} if outcome.success is None else {"success": bool(outcome.success)}
        return self._as_numpy(observation), float(outcome.reward), bool(outcome.terminated), False, info

    @cached_property
    def _reset(self) -> Any:
        return _programs(self.simulator)[0]

    @cached_property
    def _step(self) -> Any:
        return _programs(self.simulator)[1]

    def _as_numpy(self, observation: Any) -> Any:
        def cast(space: gymnasium.Space, value: Any) -> Any:
            if isinstance(space, gymnasium.spaces.Dict):
                return {key: cast(space[key], value[key]) for key in space}
            if isinstance(space, gymnasium.spaces.Tuple):
                return tuple(cast(sub, each) for sub, each in zip(space.spaces, value, strict=True))
            return np.asarray(value, space.dtype)

        return cast(self.observation_space, observation)


_COMPILED: dict[Simulator, tuple[Any, Any]] = {}


def _programs(simulator: Simulator) -> tuple[Any, Any]:
    """Return the compiled reset and step of a simulator; equal ones share them."""
    if simulator not in _COMPILED:

        def reset(key: Any) -> Any:
            state = simulator.reset(key)
            return state, simulator.observe(state)

        def step(state: Any, action: Any) -> Any:
            state, outcome = simulator.step(state, action)
            return state, simulator.observe(state), outcome

        _COMPILED[simulator] = jax.jit(reset), jax.jit(step)
    return _COMPILED[simulator]


def point_maze(render_mode: str | None = None, **kwargs: Any) -> SimulatorEnv:
    """Make a point maze (`o2o.simulators.pointmaze`); the entry point of `jax/PointMaze_*-v0`."""
    return SimulatorEnv(PointMaze(**kwargs), render_mode)
