"""Observation normalisation. Its statistics are those of the dataset; they do not change online."""

from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.data.rows import Indexed
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
        if not isinstance(flat, np.ndarray | jax.Array):
            raise ConfigError(
                "observation normalisation works on flat float32 observations, not on images: set normalize to False"
            )
        if floor is not None and floor <= 0:
            raise ConfigError(f"std_floor is {floor}; expected a positive number, or None for std + {epsilon}")
        values = np.asarray(flat, np.float64)
        std = values.std(axis=0)
        std = np.where(std < 1e-8, 1.0, std + epsilon) if floor is None else np.maximum(std, floor)
        return cls(mean=jnp.asarray(values.mean(axis=0), jnp.float32), std=jnp.asarray(std, jnp.float32))

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

    def state(entry: Any) -> Any:
        if isinstance(entry, Mapping):
            return {key: state(part) if key == STATE else part for key, part in entry.items()}
        return entry.map(normalizer) if isinstance(entry, Indexed) else np.asarray(normalizer(entry))

    done = {key: state(rows[key]) for key in ("observations", "next_observations") if key in rows}
    return {**rows, **done}
