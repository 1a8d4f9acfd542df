"""What agents share: checks of shapes and counts, and the scan over the minibatches of one call."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from o2o.errors import ConfigError, DatasetError
from o2o.types import PRIORITIES, Array, Batch, Info


def check_flat(observations: Any, agent: str) -> None:
    """Raise ConfigError unless `observations` is one array `[B, D]`."""
    if isinstance(observations, dict) or jnp.ndim(observations) != 2:
        raise ConfigError(
            f"{agent} needs flat float32 observations [batch, dim] and these have images: import or record the data "
            "without cameras, or take an agent that learns from them (docs/images.md)"
        )


def minibatches_in(batch: Batch) -> int:
    """Return `utd`, the number of minibatches in leaves `[utd, B, ...]`; raise `DatasetError` for leaves `[B, ...]`."""
    if jnp.ndim(batch["actions"]) < 3:
        raise DatasetError(
            f"update takes leaves [utd, B, ...], a minibatch per critic step; actions have shape "
            f"{jnp.shape(batch['actions'])}, expected [utd, B, A]: give one minibatch as leaf[None]"
        )
    return batch["actions"].shape[0]


def check_keys(agent: Any, batch: Batch) -> None:
    """Raise DatasetError if the batch lacks a key that the agent needs."""
    missing = [key for key in agent.needs.batch_keys if key not in batch]
    if missing:
        raise DatasetError(
            f"batch has no {', '.join(missing)}, which {type(agent).__name__} needs; draw it from an OfflineData or "
            "ReplayBuffer made with the agent's needs"
        )


A = TypeVar("A")


def each_minibatch(
    step: Callable[..., tuple[A, Info]], agent: A, batch: Batch, rng: Array | None = None
) -> tuple[A, Info]:
    """Run `step(agent, rows)` once per leading row of the leaves `[utd, B, ...]`; metrics are means over them.

    Priorities `[B]` among the metrics of a step are returned as `[utd, B]`.
    With `rng` it is `step(agent, rows, key)`, with a key of its own for each minibatch.
    Raises `DatasetError` if the batch lacks a key that the agent needs.
    """
    utd = minibatches_in(batch)
    check_keys(agent, batch)
    inputs = (batch,) if rng is None else (batch, jax.random.split(rng, utd))
    agent, infos = jax.lax.scan(lambda agent, each: step(agent, *each), agent, inputs)
    return agent, {name: x if name == PRIORITIES else x.mean(axis=0) for name, x in infos.items()}
