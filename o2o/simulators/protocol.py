"""What a simulator written in JAX has to offer: pure functions of one environment's state."""

from typing import Any, NamedTuple, Protocol

import gymnasium as gym

from o2o.types import Array

State = Any
"""A pytree of arrays, the same shapes in every step. Random keys that a step needs are part of it."""


class Outcome(NamedTuple):
    """What a step leads to, for one environment."""

    reward: Array
    """The raw reward `[]`, before the task's transformation."""
    terminated: Array
    """Whether the episode is over for good `[]`; never because of a time limit."""
    success: Array | None = None
    """Whether the step succeeds `[]`; None: the environment does not know success."""


class Simulator(Protocol):
    """One environment as pure functions, which `jax.vmap` makes many of.

    It is hashable and equal by value (a frozen dataclass), because programs are compiled for it. It resets nothing by
    itself and knows no time limit: both are `Batch`'s.
    """

    @property
    def observation_space(self) -> gym.Space:
        """A Box, or a Dict or Tuple of Boxes."""
        ...

    @property
    def action_space(self) -> gym.spaces.Box:
        """A bounded Box of floats."""
        ...

    def reset(self, key: Array) -> State:
        """Return the state in which the episode of this random key begins."""
        ...

    def step(self, state: State, action: Array) -> tuple[State, Outcome]:
        """Play an action of the action space."""
        ...

    def observe(self, state: State) -> Any:
        """Return the observation, of the structure of the observation space."""
        ...
