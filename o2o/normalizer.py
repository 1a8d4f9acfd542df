"""Observation normalisation; its statistics are frozen with the agent (they must not change when it goes online)."""

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.errors import ConfigError
from o2o.types import Array


class Normalizer(struct.PyTreeNode):
    """(s - mean) / std per dimension, `[D]` each; dimensions that never vary are only centred."""

    mean: Array
    std: Array

    @classmethod
    def fit(cls, observations: Any, epsilon: float = 1e-3) -> Self:
        """Take the statistics of observations `[N, D]`; std + epsilon as in TD3+BC. Raises `ConfigError` for images."""
        if not isinstance(observations, np.ndarray | jax.Array):
            raise ConfigError("observation normalisation works on flat float32 observations, not on images")
        values = np.asarray(observations, np.float64)
        std = values.std(axis=0)
        std = np.where(std < 1e-8, 1.0, std + epsilon)
        return cls(mean=jnp.asarray(values.mean(axis=0), jnp.float32), std=jnp.asarray(std, jnp.float32))

    def __call__(self, observations: Any) -> Any:
        """Return normalised observations `[..., D]`."""
        return (observations - self.mean) / self.std


def normalize(normalizer: Normalizer | None, observations: Any) -> Any:
    """Apply `normalizer`, or nothing where there is none."""
    return observations if normalizer is None else normalizer(observations)
