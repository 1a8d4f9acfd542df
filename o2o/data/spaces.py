"""From an environment's spaces to the toolkit's: flat float32 observations beside images, and actions in [-1, 1].

A flat observation holds the entries of a Dict in alphabetical order, depth first, and those of a Tuple by index.
`achieved_goal` is left out unless asked for. A uint8 Box of three axes is an image: it keeps type and name, and is
given as `[H, W, C]`. So are pictures with their channels first, grey ones and stacks of them (`Leaf`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o.errors import EnvironmentMismatchError

STATE = "state"
"""Key of the flat part of an observation that is a dict."""
BASE_ACTION = "base_action"
"""Key of the base policy's action, `[A]` in [-1, 1], for agents that correct one."""
ACTION_LIMIT = 0.99999
"""Dataset actions are clipped to this, so that a tanh policy's density stays finite (Cal-QL's and WSRL's code)."""
LARGEST_BOUND = 1e6
"""Bounds of actions beyond this stand for none: in their range the actions of any task are one and the same."""
SMALLEST_PICTURE = 32
"""Pixels per side from which an array of numbers that may be no picture (grey, of floats) is taken for one.

Half of it is enough where an axis of 1, 3 or 4 looks like one of colours.
"""
SMALLEST_HALF_RANGE = 0.05
"""Smallest half range of an action coordinate, in the environment's units (arXiv 2509.19301, released code)."""


def not_finite(array: np.ndarray) -> np.ndarray:
    """Return booleans of the array's shape: true where a number is not finite as float32."""
    with np.errstate(over="ignore"):
        return ~np.isfinite(array.astype(np.float32))


@dataclass(frozen=True)
class Leaf:
    """One entry of an observation: its path, its shape there, and whether it is an image."""

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    image: bool

    @property
    def name(self) -> str:
        """Return the path as text, `a/b`; `image` for a bare image space."""
        return "/".join(map(str, self.path)) or ("image" if self.image else "observation")

    @property
    def _channels_first(self) -> bool:
        """Whether an image's axis of channels (or of grey frames) lies before height and width."""
        return len(self.shape) > 2 and self.shape[-3] < min(self.shape[-2:])

    @property
    def pixels(self) -> tuple[int, int, int]:
        """Return an image's shape `(H, W, C)` as agents see it; the frames of a stack are joined as channels."""
        if len(self.shape) == 2:
            return (*self.shape, 1)
        first = self._channels_first
        height, width = self.shape[-2:] if first else self.shape[-3:-1]
        return height, width, int(np.prod(self.shape[:-3])) * self.shape[-3 if first else -1]

    def of(self, observation: Any) -> np.ndarray:
        """Return this entry of an observation `[..., *shape]`, an image `[..., H, W, C]`.

        Raises `EnvironmentMismatchError` if it is missing, has another shape, or is an image but not uint8.
        """
        for key in self.path:
            try:
                observation = observation[key]
            except (KeyError, IndexError, TypeError):
                raise EnvironmentMismatchError(f"the observation has no entry {self.name!r}") from None
        array = np.asarray(observation)
        if array.ndim < len(self.shape) or array.shape[array.ndim - len(self.shape) :] != self.shape:
            raise EnvironmentMismatchError(
                f"observation entry {self.name!r} has shape {array.shape}, expected {self.shape} at its end"
            )
        if not self.image:
            return array
        if array.dtype != np.uint8:
            raise EnvironmentMismatchError(
                f"observation entry {self.name!r}: images are {array.dtype}, expected uint8 (0 to 255) as in its space"
            )
        lead = array.shape[: array.ndim - len(self.shape)]
        array = np.moveaxis(array, -3, -1) if self._channels_first else array
        array = np.moveaxis(array, -4, -2) if len(self.shape) == 4 else array
        return array.reshape(*lead, *self.pixels)

    def undo(self, image: Any) -> Any:
        """Return an image `[..., H, W, C]` of `of` in its own layout `[..., *shape]`."""
        if image.shape[image.ndim - len(self.shape) :] == self.shape:
            return image
        lead, (height, width, _) = image.shape[:-3], self.pixels
        if len(self.shape) == 2:
            return image[..., 0]
        if len(self.shape) == 4:
            image = np.moveaxis(image.reshape(*lead, height, width, self.shape[0], -1), -2, -4)
        return np.moveaxis(image, -1, -3) if self._channels_first else image


def _is_image(space: gym.Space, name: str) -> bool:
    """Whether a Box holds pictures that agents can see; raises `EnvironmentMismatchError` for pictures of others."""
    shape = tuple(space.shape or ())
    first = len(shape) > 2 and shape[-3] < min(shape[-2:])
    sides = shape[-2:] if len(shape) == 2 or first else shape[-3:-1]
    colours = len(shape) > 2 and shape[-3 if first else -1] in (1, 3, 4)
    large = len(shape) > 1 and min(sides) >= (SMALLEST_PICTURE // 2 if colours else SMALLEST_PICTURE)
    if isinstance(space, spaces.Box) and space.dtype == np.uint8:
        if len(shape) == 3 or (len(shape) in (2, 4) and large):
            return True
    if large:
        raise EnvironmentMismatchError(
            f"observation entry {name!r} looks like an image, {space.dtype} of shape {shape}: o2o takes images as "
            "uint8 (0 to 255) of shape [H, W, C], also [C, H, W], [H, W] or a stack of them; convert it with a "
            "gymnasium.ObservationWrapper, and flatten to one axis what is no image"
        )
    return False


def _leaves(space: gym.Space, path: tuple[str | int, ...], achieved_goal: bool) -> Iterator[Leaf]:
    if isinstance(space, spaces.Dict):
        for key in sorted(space.spaces):
            if key != "achieved_goal" or achieved_goal:
                yield from _leaves(space.spaces[key], (*path, key), achieved_goal)
    elif isinstance(space, spaces.Tuple):
        for i, sub in enumerate(space.spaces):
            yield from _leaves(sub, (*path, i), achieved_goal)
    elif isinstance(space, spaces.Box | spaces.MultiBinary):
        name = "/".join(map(str, path)) or "(whole)"
        yield Leaf(path, tuple(space.shape or ()), _is_image(space, name))
    else:
        raise EnvironmentMismatchError(
            f"observation entry {'/'.join(map(str, path)) or '(whole)'} is {space}: o2o takes Box, MultiBinary, and "
            "Dict or Tuple of them; convert it with a gymnasium.ObservationWrapper"
        )


@dataclass(frozen=True)
class ObservationSpec:
    """How observations of one space are flattened, for the dataset and the live environment alike."""

    leaves: tuple[Leaf, ...]

    @classmethod
    def from_space(cls, space: gym.Space, achieved_goal: bool = False) -> Self:
        """Return the spec of a space; raise `EnvironmentMismatchError` for entries that are not numeric arrays."""
        leaves = tuple(_leaves(space, (), achieved_goal))
        if not leaves:
            raise EnvironmentMismatchError(f"observation space {space} has nothing left to observe")
        return cls(leaves)

    @property
    def state_dim(self) -> int:
        """Return the width of the flat part, 0 if there is none."""
        return sum(int(np.prod(leaf.shape)) for leaf in self.leaves if not leaf.image)

    @property
    def images(self) -> dict[str, tuple[int, ...]]:
        """Return the images' shapes by name."""
        return {leaf.name: leaf.pixels for leaf in self.leaves if leaf.image}

    @property
    def shape(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """Return `(D,)`, or shapes by key where there are images."""
        if not self.images:
            return (self.state_dim,)
        return ({STATE: (self.state_dim,)} if self.state_dim else {}) | self.images

    @property
    def space(self) -> gym.Space:
        """Return the space of the flattened observations."""
        state = spaces.Box(-np.inf, np.inf, (self.state_dim,), np.float32)
        if not self.images:
            return state
        entries: dict[str, gym.Space] = {STATE: state} if self.state_dim else {}
        entries |= {name: spaces.Box(0, 255, shape, np.uint8) for name, shape in self.images.items()}
        return spaces.Dict(entries)

    def flatten(self, observation: Any) -> Any:
        """Return float32 `[..., D]`, or a dict of it (`state`) and uint8 images, for one observation or a batch."""
        parts, images = [], {}
        for leaf in self.leaves:
            array = leaf.of(observation)
            if leaf.image:
                images[leaf.name] = array
            else:
                lead = array.shape[: array.ndim - len(leaf.shape)]
                parts.append(array.reshape(*lead, int(np.prod(leaf.shape))).astype(np.float32))
        if not images:
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return ({STATE: np.concatenate(parts, axis=-1)} if parts else {}) | images

    def unflatten(self, observation: Any) -> Any:
        """Undo `flatten` for one observation or a batch; numbers stay float32."""
        state: Any = observation.get(STATE) if isinstance(observation, dict) else observation
        tree: Any = {}
        at = 0
        for leaf in self.leaves:
            if leaf.image:
                value = leaf.undo(observation[leaf.name])
            else:
                width = int(np.prod(leaf.shape))
                value = state[..., at : at + width].reshape((*state.shape[:-1], *leaf.shape))
                at += width
            if not leaf.path:
                return value
            node = tree
            for key in leaf.path[:-1]:
                node = node.setdefault(key, {})
            node[leaf.path[-1]] = value
        return _nested(tree)

    def latest(self, observation: Any) -> Any:
        """Return the newest of observations that are joined along their last axis (`o2o.data.history`)."""
        if not isinstance(observation, dict):
            return observation[..., -self.state_dim :]
        widths = {STATE: self.state_dim} | {name: shape[-1] for name, shape in self.images.items()}
        return {key: entry[..., -widths[key] :] for key, entry in observation.items() if key in widths}

    def __str__(self) -> str:
        """Return a description such as `desired_goal[2] + observation[4]`."""
        return " + ".join(f"{leaf.name}[{'x'.join(map(str, leaf.shape))}]" for leaf in self.leaves)


def _nested(tree: Any) -> Any:
    """Return a tree whose dicts with integer keys are tuples."""
    if not isinstance(tree, dict):
        return tree
    entries = {key: _nested(value) for key, value in tree.items()}
    return tuple(entries.values()) if all(isinstance(key, int) for key in entries) else entries


def with_base_action(observation: Any, action: Any) -> dict[str, Any]:
    """Return a flattened observation, or a batch, as a dict with the `base_action` beside its entries."""
    entries = observation if isinstance(observation, dict) else {STATE: observation}
    return {**entries, BASE_ACTION: action}


@dataclass(frozen=True)
class ActionMap:
    """The affine map between [-1, 1] and a bounded Box; bounds are flat tuples, `shape` is the environment's.

    A coordinate whose bounds are equal is played there, and stored as 0.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    shape: tuple[int, ...]

    @classmethod
    def from_space(cls, space: gym.Space) -> Self:
        """Return the map of an action space; raise `EnvironmentMismatchError` unless it is a bounded float Box."""
        return cls.bounds_of(space).useful()

    def useful(self) -> Self:
        """Return itself; raise `EnvironmentMismatchError` if actions could not be told apart after the map."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        largest = np.maximum(np.abs(low), np.abs(high))
        if np.any(wrong := ~(largest <= LARGEST_BOUND)):
            i = int(np.argmax(wrong))
            raise EnvironmentMismatchError(
                f"the action space has no {'useful' if np.isfinite(largest[i]) else 'finite'} bounds: [{low[i]:g}, "
                f"{high[i]:g}] in entry {i}, expected at most {LARGEST_BOUND:g} in size; give its Box bounds where it "
                "is made or with gymnasium.wrappers.TransformAction, or take the range of the data (action_range "
                "'data')"
            )
        close = 256 * np.spacing(largest.astype(np.float32))
        if np.any(wrong := (low < high) & (high - low < close)):
            i = int(np.argmax(wrong))
            raise EnvironmentMismatchError(
                f"the action space has the bounds [{low[i]:.9g}, {high[i]:.9g}] in entry {i}, too close to each other "
                "for float32: subtract their centre with gymnasium.wrappers.TransformAction"
            )
        return self

    @classmethod
    def bounds_of(cls, space: gym.Space) -> Self:
        """Return a float Box's own bounds, which may be infinite: to be compared or `fitted`, not to map with.

        Raises `EnvironmentMismatchError` for any other space.
        """
        if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
            raise EnvironmentMismatchError(
                f"the action space is {space}: o2o's agents act in a continuous Box; discrete actions are not supported"
            )
        return cls(tuple(map(float, space.low.ravel())), tuple(map(float, space.high.ravel())), tuple(space.shape))

    def fitted(self, actions: Any, margin: float = 0.0) -> Self:
        """Return the map of the range of environment actions `[N, *shape]`, within this map's bounds.

        Each half range is at least `SMALLEST_HALF_RANGE` and then widened by the factor 1 + margin (arXiv 2509.19301).
        """
        flat = np.asarray(actions, np.float64).reshape(-1, self.dim)
        low, high = flat.min(axis=0), flat.max(axis=0)
        centre, half = (low + high) / 2, np.maximum((high - low) / 2, SMALLEST_HALF_RANGE) * (1.0 + margin)
        bounds = np.maximum(centre - half, self.low), np.minimum(centre + half, self.high)
        return replace(self, low=tuple(map(float, bounds[0])), high=tuple(map(float, bounds[1]))).useful()

    @property
    def dim(self) -> int:
        """Return the number of action coordinates A."""
        return len(self.low)

    @property
    def space(self) -> spaces.Box:
        """Return the toolkit's action space, Box(-1, 1, (A,))."""
        return spaces.Box(-1.0, 1.0, (self.dim,), np.float32)

    def _centre_and_half(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        return (high + low) / 2, (high - low) / 2

    @cached_property
    def float32_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds, rounded inwards to float32: a float64 space then contains every mapped action."""
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        up, down = np.nextafter(low, np.float32(np.inf)), np.nextafter(high, np.float32(-np.inf))
        return np.where(low < np.asarray(self.low), up, low), np.where(high > np.asarray(self.high), down, high)

    def to_env(self, actions: Any) -> np.ndarray:
        """Return float32 environment actions `[..., *shape]` for `[..., A]`, which are clipped to [-1, 1]."""
        centre, half = self._centre_and_half()
        actions = np.clip(np.asarray(actions, np.float32), -1.0, 1.0)
        mapped = np.clip(centre + half * actions, *self.float32_bounds)
        return mapped.reshape(*actions.shape[:-1], *self.shape)

    def from_env(self, actions: Any) -> np.ndarray:
        """Return float32 `[..., A]` for environment actions `[..., *shape]`, clipped to [-1, 1]."""
        centre, half = self._centre_and_half()
        actions = np.asarray(actions, np.float32)
        flat = actions.reshape(*actions.shape[: actions.ndim - len(self.shape)], self.dim)
        return np.clip((flat - centre) / np.where(half > 0, half, np.float32(1)), -1.0, 1.0)

    def outside(self, actions: Any, tolerance: float = 1e-5) -> np.ndarray:
        """Return booleans `[..., A]`: entries outside the bounds by more than `tolerance` times the range."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        actions = np.asarray(actions, np.float64)
        flat = actions.reshape(*actions.shape[: actions.ndim - len(self.shape)], self.dim)
        span = np.where(np.isfinite(high - low) & (high > low), high - low, np.maximum(np.abs(low), 1.0))
        slack = np.where(np.isfinite(span), tolerance * span, tolerance)
        return (flat < low - slack) | (flat > high + slack)
