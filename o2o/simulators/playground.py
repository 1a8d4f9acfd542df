"""DM-control's tasks as MuJoCo Playground writes them, for MJX: `playground/CartpoleBalance-v0` and so on.

Needs `pip install 'o2o[playground]'`. An episode lasts 1000 steps and a step pays 0 to 1. Source: MuJoCo Playground
(arXiv 2502.08844).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import gymnasium as gym
import jax.numpy as jnp
import numpy as np

from o2o.errors import ConfigError
from o2o.simulators.gym import SimulatorEnv
from o2o.simulators.protocol import Outcome
from o2o.types import Array


@dataclass(frozen=True)
class Playground:
    """A task of Playground as a `Simulator`. `impl` is MJX's: `jax` runs everywhere, `warp` on CUDA alone."""

    name: str
    impl: Literal["jax", "warp"] = "jax"

    @cached_property
    def _env(self) -> Any:
        try:
            from mujoco_playground import dm_control_suite  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(f"playground/{self.name} needs `pip install 'o2o[playground]'` ({error})") from error
        if self.name not in dm_control_suite.ALL_ENVS:
            raise ConfigError(f"Playground has no task {self.name!r}; it has {', '.join(dm_control_suite.ALL_ENVS)}")
        return dm_control_suite.load(self.name, config_overrides={"impl": self.impl})

    @property
    def observation_space(self) -> gym.spaces.Box:
        """Playground's state observation, without bounds."""
        return gym.spaces.Box(-np.inf, np.inf, (self._env.observation_size,), np.float32)

    @property
    def action_space(self) -> gym.spaces.Box:
        """The ranges of the actuators."""
        low, high = np.asarray(self._env.mj_model.actuator_ctrlrange, np.float32).T
        return gym.spaces.Box(low, high)

    def reset(self, key: Array) -> Any:
        """Return the state in which the episode of a key begins."""
        return self._env.reset(key)

    def step(self, state: Any, action: Array) -> tuple[Any, Outcome]:
        """Play an action. `terminated` where the physics broke: these tasks end by time alone."""
        state = self._env.step(state, action)
        return state, Outcome(state.reward, state.done > 0)

    def observe(self, state: Any) -> Array:
        """Return the observation `[D]`."""
        return jnp.asarray(state.obs)


def make(name: str, impl: Literal["jax", "warp"] = "jax", render_mode: str | None = None) -> SimulatorEnv:
    """Make a task of Playground; the entry point of `playground/NAME-v0`."""
    return SimulatorEnv(Playground(name, impl), render_mode)
