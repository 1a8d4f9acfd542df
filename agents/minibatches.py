"""What agents share: the shapes and counts that they refuse, and one step per minibatch of a call."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from o2o.errors import ConfigError, DatasetError
from o2o.types import Batch, Info


def check_flat(observations: Any, agent: str) -> None:
    """Raise ConfigError unless `observations` is one array `[B, D]`."""
    if isinstance(observations, dict) or jnp.ndim(observations) != 2:
        raise ConfigError(f"{agent} needs flat float32 observations [batch, dim]; choose the dataset's state entries")


def check_counts(config: Any, *names: str) -> None:
    """Raise ConfigError for a count below 1 among these settings; None is no count."""
    for name in names:
        if (count := getattr(config, name)) is not None and count < 1:
            raise ConfigError(f"{type(config).__name__}.{name} is {count}; expected at least 1")


def minibatches_in(batch: Batch) -> int:
    """Return `utd`, how many minibatches a call's leaves `[utd, B, ...]` hold; DatasetError for leaves `[B, ...]`."""
    if jnp.ndim(batch["actions"]) < 3:
        raise DatasetError(
            f"update takes leaves [utd, B, ...], a minibatch per critic step; actions have shape "
            f"{jnp.shape(batch['actions'])}, expected [utd, B, A]: give one minibatch as leaf[None]"
        )
    return batch["actions"].shape[0]


def check_keys(agent: Any, batch: Batch) -> None:
    """Raise DatasetError if the batch lacks a key that the agent needs."""
    missing = [key for key in agent.needs.keys if key not in batch]
    if missing:
        raise DatasetError(
            f"batch has no {', '.join(missing)}, which {type(agent).__name__} needs; draw it from an OfflineData or "
            "ReplayBuffer made with the agent's needs"
        )


A = TypeVar("A")


def each_minibatch(step: Callable[[A, Batch], tuple[A, Info]], agent: A, batch: Batch) -> tuple[A, Info]:
    """Run `step` once per leading row of the leaves `[utd, B, ...]`; metrics are means over them.

    Raises `DatasetError` if the batch lacks a key that the agent needs.
    """
    minibatches_in(batch)
    check_keys(agent, batch)
    agent, infos = jax.lax.scan(step, agent, batch)
    return agent, jax.tree.map(lambda x: x.mean(axis=0), infos)
