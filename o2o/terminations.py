"""When an episode ends, as functions of the raw next observation, for roll-outs in a learned model.

The rules are those of the Uni-O4 release (which go beyond the simulators where a state is out of range), but for the
range of hopper's, which has both bounds here: there a misplaced parenthesis leaves the upper one only. Its `pen` rule
can be asked for by name, since gymnasium-robotics' pen does not end when it is dropped. `learned` stands for a
classifier that a dynamics model fits to the dataset's own ends; it serves every other task, where the release has a
goal distance (AntMaze) or no end at all.
"""

import re
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from o2o.types import Array

Termination = Literal["learned", "never", "halfcheetah", "hopper", "walker2d", "pen"]


def _wild(states: Array) -> Array:
    return jnp.any(~jnp.isfinite(states) | (jnp.abs(states) >= 100.0), axis=-1)


def _never(states: Array) -> Array:
    return jnp.zeros(states.shape[:-1], bool)


def _hopper(states: Array) -> Array:
    """Below 0.7 m, leaning by 0.2 rad or more, or out of range (the height itself has no upper bound)."""
    return _wild(states[..., 1:]) | ~(states[..., 0] > 0.7) | (jnp.abs(states[..., 1]) >= 0.2)


def _walker2d(states: Array) -> Array:
    """Height outside (0.8, 2) m, leaning by 1 rad or more, or out of range."""
    height, angle = states[..., 0], states[..., 1]
    return _wild(states) | ~((height > 0.8) & (height < 2.0)) | (jnp.abs(angle) >= 1.0)


def _pen(states: Array) -> Array:
    """The pen is below 7.5 cm."""
    return states[..., 26] < 0.075


RULES: dict[str, Callable[[Array], Array]] = {
    "never": _never,
    "halfcheetah": _wild,
    "hopper": _hopper,
    "walker2d": _walker2d,
    "pen": _pen,
}
"""Name to rule: observations `[..., D]` to bool `[...]`."""

_PATTERNS = {
    r"HalfCheetah-v\d+": "halfcheetah",
    r"Hopper-v\d+": "hopper",
    r"Walker2d-v\d+": "walker2d",
}


def termination_of(env_id: str | None) -> Termination:
    """Return the name of an environment's rule; `learned` for those without one."""
    bare = (env_id or "").split(":")[-1]
    return next((name for pattern, name in _PATTERNS.items() if re.fullmatch(pattern, bare)), "learned")  # type: ignore[return-value]
