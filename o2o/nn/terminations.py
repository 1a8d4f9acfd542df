"""When an episode ends, as functions of the raw next observation, for roll-outs in a learned model.

The rules come from the Uni-O4 release. They also end an episode whose state is out of range, which the simulators do
not do. One differs: hopper's range has both bounds here; the release has the upper bound only, by a misplaced
parenthesis. The `pen` rule must be asked for by name, since gymnasium-robotics' pen does not end when it is dropped.
A rule reads the last numbers of an observation. Before them may be older observations (`o2o.data.history`) or a
position that is usually left out. `learned` is a classifier that a dynamics model fits to the ends in the dataset. It
serves all other tasks, where the release uses a goal distance (AntMaze) or no end at all.
"""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp

from o2o.errors import ConfigError
from o2o.types import Array

Termination = Literal["learned", "never", "halfcheetah", "hopper", "walker2d", "pen"]


RANGE = 100.0
"""Numbers from here on are out of range, on either side of 0."""


class Rule(NamedTuple):
    """When an episode ends: at a fall, or where numbers are out of range."""

    size: int
    """It reads so many numbers, the last ones."""
    bounded: int
    """So many of them, again the last, have a range."""
    fallen: Callable[[Array], Array]
    """Observations `[..., size]` to bool `[...]`."""

    def __call__(self, states: Array) -> Array:
        """Return where an episode ends, observations `[..., D]` to bool `[...]`."""
        return self.fallen(states[..., states.shape[-1] - self.size :]) | self.out_of_range(states)

    def out_of_range(self, states: Array) -> Array:
        """Return where observations `[..., D]` are not finite or out of range: no state of the task, bool `[...]`."""
        numbers = states[..., states.shape[-1] - self.bounded :]
        return jnp.any(~jnp.isfinite(numbers) | (jnp.abs(numbers) >= RANGE), axis=-1)


def _never(states: Array) -> Array:
    return jnp.zeros(states.shape[:-1], bool)


def _hopper(states: Array) -> Array:
    """Below 0.7 m, or leaning by 0.2 rad or more."""
    return ~(states[..., 0] > 0.7) | (jnp.abs(states[..., 1]) >= 0.2)


def _walker2d(states: Array) -> Array:
    """Height outside (0.8, 2) m, or leaning by 1 rad or more."""
    height, angle = states[..., 0], states[..., 1]
    return ~((height > 0.8) & (height < 2.0)) | (jnp.abs(angle) >= 1.0)


def _pen(states: Array) -> Array:
    """The pen is below 7.5 cm."""
    return states[..., 26] < 0.075


RULES: dict[str, Rule] = {
    "never": Rule(0, 0, _never),
    "halfcheetah": Rule(17, 17, _never),
    "hopper": Rule(11, 10, _hopper),  # the height has no upper bound
    "walker2d": Rule(17, 17, _walker2d),
    "pen": Rule(45, 0, _pen),
}
"""Name to rule; `learned` has none."""


def check_size(name: str, size: int) -> None:
    """Raise `ConfigError` for observations of `size` numbers, where the rule reads more."""
    if name in RULES and size < RULES[name].size:
        raise ConfigError(
            f"termination {name!r} reads observations of {RULES[name].size} numbers, the task's have {size}; set "
            "config.termination to learned, or to never"
        )


_PATTERNS = {
    r"HalfCheetah-v\d+": "halfcheetah",
    r"Hopper-v\d+": "hopper",
    r"Walker2d-v\d+": "walker2d",
}


def termination_of(env_id: str | None) -> Termination:
    """Return the name of an environment's rule; `learned` for those without one."""
    bare = (env_id or "").split(":")[-1]
    return next((name for pattern, name in _PATTERNS.items() if re.fullmatch(pattern, bare)), "learned")  # type: ignore[return-value]
