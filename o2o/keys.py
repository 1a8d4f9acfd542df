"""Random keys of a run. Everything derives from `seed + k` by `fold_in`, so seed k does not depend on how many run.

A key is a function of (seed, stream, index): the index is a counter that a checkpoint holds anyway. So no chain of
splits has to be stored, and the key of a later draw is known before the earlier ones were made.
"""

from typing import Any

import jax
import jax.numpy as jnp

from o2o.types import Array

INIT, DATA, ACT, WORLD = range(4)
"""Streams: initialisation, minibatches (index: gradient step), acting (index: environment step), simulators in JAX
(index: environment)."""


def seed_keys(seed: int, seeds: int) -> Array:
    """Return the keys `[S]` of seeds `seed`, `seed + 1`, ..."""
    return jax.vmap(jax.random.key)(jnp.arange(seeds, dtype=jnp.uint32) + jnp.uint32(seed))


def key_at(key: Array, stream: int, index: Array | int = 0) -> Array:
    """Return the key of draw number `index` in a stream, for one seed's `key`."""
    return jax.random.fold_in(jax.random.fold_in(key, stream), index)


def is_key(leaf: Any) -> bool:
    """Whether an array, or a shape and type, is one of random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
