"""Action distributions: a diagonal Gaussian, plain or squashed by tanh.

The tanh change of variables is exact: log|d tanh(u)/du| = 2 (ln 2 - u - softplus(-2u)) (SAC, arXiv 1801.01290, app. C).
"""

import jax
import jax.numpy as jnp
from flax import struct

from o2o.types import Array

ATANH_LIMIT = 1.0 - 1e-6
"""Stored actions are pulled inside this bound before atanh; the datasets module clips to 0.99999 already."""


def _gaussian_log_prob(values: Array, mean: Array, std: Array) -> Array:
    z = (values - mean) / std
    return jnp.sum(-0.5 * jnp.square(z) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi), axis=-1)


def _log_det_tanh(pre_tanh: Array) -> Array:
    return jnp.sum(2.0 * (jnp.log(2.0) - pre_tanh - jax.nn.softplus(-2.0 * pre_tanh)), axis=-1)


class Normal(struct.PyTreeNode):
    """Diagonal Gaussian over actions, `mean` and `std` of shape `[..., A]`; samples are not clipped."""

    mean: Array
    std: Array

    def mode(self) -> Array:
        """Return the mean, `[..., A]`."""
        return self.mean

    def sample(self, rng: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Return reparameterised samples, `[*sample_shape, ..., A]`."""
        return self.mean + self.std * jax.random.normal(rng, (*sample_shape, *self.mean.shape))

    def log_prob(self, actions: Array) -> Array:
        """Return the log-density of `actions` `[..., A]`, shape `[...]`."""
        return _gaussian_log_prob(actions, self.mean, self.std)

    def entropy(self) -> Array:
        """Return the differential entropy, `[...]`."""
        return jnp.sum(jnp.log(self.std) + 0.5 * jnp.log(2 * jnp.pi * jnp.e), axis=-1)

    def sample_and_log_prob(self, rng: Array, sample_shape: tuple[int, ...] = ()) -> tuple[Array, Array]:
        """Return samples `[*sample_shape, ..., A]` and their log-densities `[*sample_shape, ...]`."""
        actions = self.sample(rng, sample_shape)
        return actions, self.log_prob(actions)


class TanhNormal(struct.PyTreeNode):
    """tanh of a diagonal Gaussian whose `mean` and `std` have shape `[..., A]`; actions lie in (-1, 1)."""

    mean: Array
    std: Array

    def mode(self) -> Array:
        """Return tanh(mean), the field's convention for the deterministic action, `[..., A]`."""
        return jnp.tanh(self.mean)

    def sample(self, rng: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Return reparameterised samples, `[*sample_shape, ..., A]`."""
        return jnp.tanh(Normal(self.mean, self.std).sample(rng, sample_shape))

    def log_prob(self, actions: Array) -> Array:
        """Return the log-density of `actions` `[..., A]` in (-1, 1), shape `[...]`."""
        pre_tanh = jnp.arctanh(jnp.clip(actions, -ATANH_LIMIT, ATANH_LIMIT))
        return _gaussian_log_prob(pre_tanh, self.mean, self.std) - _log_det_tanh(pre_tanh)

    def sample_and_log_prob(self, rng: Array, sample_shape: tuple[int, ...] = ()) -> tuple[Array, Array]:
        """Return samples `[*sample_shape, ..., A]` and log-densities `[*sample_shape, ...]` without inverting tanh."""
        pre_tanh = Normal(self.mean, self.std).sample(rng, sample_shape)
        log_prob = _gaussian_log_prob(pre_tanh, self.mean, self.std) - _log_det_tanh(pre_tanh)
        return jnp.tanh(pre_tanh), log_prob
