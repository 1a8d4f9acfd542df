"""Observation normalisation. Its statistics are those of the dataset; they do not change online."""

from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.data.rows import BLOCK, Indexed
from o2o.data.spaces import STATE
from o2o.errors import ConfigError
from o2o.types import Array


class Normalizer(struct.PyTreeNode):
    """(s - mean) / std, with `mean` and `std` `[D]`. Of a dict of observations only the entry `state` is normalised."""

    mean: Array
    std: Array

    @classmethod
    def fit(cls, observations: Any, epsilon: float = 1e-3, floor: float | None = None) -> Self:
        """Take the statistics of observations `[N, D]`, or of the `state` of a dict.

        Without a `floor` the divisor is std + epsilon as in TD3+BC, and dimensions that never vary are only centred.
        With one it is max(std, floor) as in ResFiT (arXiv 2509.19301). Raises `ConfigError` if there is no flat part
        or `floor` is not positive.
        """
        flat = observations.get(STATE) if isinstance(observations, Mapping) else observations
        if flat is None:
            raise ConfigError(
                "observation normalisation works on flat float32 observations, not on images: set normalize to False"
            )
        if floor is not None and floor <= 0:
            raise ConfigError(f"std_floor is {floor}; expected a positive number, or None for std + {epsilon}")
        rows = np.asarray(flat)
        mean = rows.mean(axis=0, dtype=np.float64)
        blocks = (rows[i : i + BLOCK].astype(np.float64) - mean for i in range(0, len(rows), BLOCK))
        std = np.sqrt(sum((block**2).sum(axis=0) for block in blocks) / len(rows))
        std = np.where(std < 1e-8, 1.0, std + epsilon) if floor is None else np.maximum(std, floor)
        return cls(mean=jnp.asarray(mean, jnp.float32), std=jnp.asarray(std, jnp.float32))

    def __call__(self, observations: Any) -> Any:
        """Return observations with their flat part `[..., D]` normalised."""
        if isinstance(observations, Mapping):
            return {**observations, STATE: self(observations[STATE])}
        return (observations - self.mean) / self.std


def normalize(normalizer: Normalizer | None, observations: Any) -> Any:
    """Return `observations` normalised, or as they are if `normalizer` is None."""
    return observations if normalizer is None else normalizer(observations)


def normalized_rows(normalizer: Normalizer | None, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dataset's arrays with observations and next observations normalised, in host memory."""
    if normalizer is None:
        return dict(rows)

    def state(now: Any, after: Any) -> tuple[Any, Any]:
        if isinstance(now, Mapping):
            pair = state(now[STATE], after[STATE])
            return {**now, STATE: pair[0]}, {**after, STATE: pair[1]}
        if isinstance(after, Indexed) and after.heads(now):
            done = after.map(normalizer)
            return done.frames[: len(now)], done
        return np.asarray(normalizer(now)), np.asarray(normalizer(np.asarray(after)))

    now, after = state(rows["observations"], rows["next_observations"])
    return {**rows, "observations": now, "next_observations": after}
