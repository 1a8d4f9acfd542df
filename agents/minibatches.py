"""What agents of flat observations share: refusing others, and one step per minibatch of a call."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from o2o.errors import ConfigError
from o2o.types import Batch, Info


def check_flat(observations: Any, agent: str) -> None:
    """Raise ConfigError unless `observations` is one array `[B, D]`."""
    if isinstance(observations, dict) or jnp.ndim(observations) != 2:
        raise ConfigError(f"{agent} needs flat float32 observations [batch, dim]; choose the dataset's state entries")


A = TypeVar("A")


def each_minibatch(step: Callable[[A, Batch], tuple[A, Info]], agent: A, batch: Batch) -> tuple[A, Info]:
    """Run `step` once per leading row of the leaves `[utd, B, ...]`; metrics are means over them."""
    agent, infos = jax.lax.scan(step, agent, batch)
    return agent, jax.tree.map(lambda x: x.mean(axis=0), infos)
