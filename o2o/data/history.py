"""Observation history: the last k observations joined into one, for datasets and live environments alike.

Entries are joined along their last axis, the oldest first: flat observations `[k * D]`, images `[H, W, k * C]`. At the
start of an episode its first observation is repeated.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o.data.datasets import Dataset
from o2o.data.rows import Indexed
from o2o.errors import ConfigError


def check_length(length: int) -> None:
    """Raise `ConfigError` if `length` is below 1."""
    if length < 1:
        raise ConfigError(f"history is {length}; expected at least 1, the present observation alone")


def copied(observation: Any) -> Any:
    """Return a copy of an observation: an environment may write into the same arrays in every step."""
    if isinstance(observation, dict):
        return {key: copied(entry) for key, entry in observation.items()}
    return np.array(observation)


def join(observations: Sequence[Any]) -> Any:
    """Join observations of one structure along the last axis of every entry, in the given order."""
    if isinstance(observations[0], dict):
        return {key: join([observation[key] for observation in observations]) for key in observations[0]}
    return observations[0] if len(observations) == 1 else np.concatenate(observations, axis=-1)


class History:
    """The last `length` observations of an episode under way."""

    def __init__(self, length: int) -> None:
        """Begin empty; raise `ConfigError` for a length below 1."""
        check_length(length)
        self._last: deque[Any] = deque(maxlen=length)

    def reset(self, observation: Any) -> Any:
        """Begin an episode and return its first observation, repeated."""
        self._last.extend([copied(observation)] * (self._last.maxlen or 1))
        return join(list(self._last))

    def push(self, observation: Any) -> Any:
        """Add the episode's next observation and return the last ones."""
        self._last.append(copied(observation))
        return join(list(self._last))


def joined_space(space: gym.Space, length: int) -> gym.Space:
    """Return the space of `length` joined observations of a Box or a Dict of Boxes."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: joined_space(entry, length) for key, entry in space.spaces.items()})
    assert isinstance(space, spaces.Box)
    low, high = (np.concatenate([bound] * length, axis=-1) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype)  # pyright: ignore[reportArgumentType]


def past(observations: Any, rows: np.ndarray, first: Any, length: int) -> list[Any]:
    """Return the `length` observations up to each row in `rows`, the oldest first; none is earlier than row `first`."""

    def at(index: np.ndarray) -> Any:
        whole = observations
        return {key: entry[index] for key, entry in whole.items()} if isinstance(whole, dict) else whole[index]

    return [at(np.maximum(rows - back, first)) for back in reversed(range(length))]


def with_history(data: Dataset, length: int) -> Dataset:
    """Return the dataset with every observation joined to the `length` - 1 before it in its episode.

    `next_observations` get the history of the next step. Everything else stays as it is, `observation_spec` (of a
    single observation) too. Raises `ConfigError` for a length below 1.
    """
    check_length(length)
    if length == 1:
        return data
    rows = np.arange(data.size)
    ends = np.asarray(data.arrays["ends"], bool)
    first = np.maximum.accumulate(np.where(np.concatenate([[True], ends[:-1]]), rows, 0))

    now, after = data.arrays["observations"], data.arrays["next_observations"]
    ago = past(now, rows, first, length)
    joined = join(ago)
    if isinstance(now, dict):
        pairs = {key: _following(after[key], [back[key] for back in ago], joined[key]) for key in now}
        both = {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}
    else:
        both = _following(after, ago, joined)
    return replace(data, arrays={**data.arrays, "observations": both[0], "next_observations": both[1]})


def _following(after: Any, ago: list[np.ndarray], joined: np.ndarray) -> tuple[np.ndarray, Any]:
    """Return joined observations and next observations of one entry; held by index where they were."""
    if not isinstance(after, Indexed):
        return joined, np.concatenate([*ago[1:], after], axis=-1)
    size = len(after)
    last = np.flatnonzero(after.index >= size)  # the others' next observations are rows themselves
    tail = np.concatenate([*(back[last] for back in ago[1:]), after[last]], axis=-1)
    index = after.index.copy()
    index[last] = size + np.arange(len(last))
    frames = np.concatenate([joined, tail])
    return frames[:size], Indexed(frames, index)
