"""Open-loop execution of action chunks: the queue of actions that a policy carries from step to step.

A policy proposes a chunk `[..., H, A]` when its queue is empty; its actions are then played one per step. Queues are
cleared at episode ends and at a human's takeover. All shapes are static. How many actions are left is data, so the
policies of a batch may be at different positions of their chunks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from o2o.errors import ConfigError
from o2o.nn.kernels import any_seed, plans_in_turn
from o2o.types import Array, Carry


class ActionQueue(NamedTuple):
    """The rest of a chunk."""

    actions: Array
    """`[..., h, A]`; the first `left` of them are still to be played, in order."""
    left: Array
    """Actions left, int32 `[...]`."""


def empty_queue(batch_shape: tuple[int, ...], horizon: int, action_dim: int) -> ActionQueue:
    """Return the empty queue of fresh episodes, with `horizon` places.

    Raises `ConfigError` if the horizon is below 1.
    """
    if horizon < 1:
        raise ConfigError(f"an action queue of {horizon} places cannot hold an action; the horizon must be at least 1")
    return ActionQueue(
        actions=jnp.zeros((*batch_shape, horizon, action_dim), jnp.float32), left=jnp.zeros(batch_shape, jnp.int32)
    )


def outdated(carry: Carry, ended: Any, intervened: Any) -> Any:
    """Return where a policy's carry must be cleared, booleans `[...]`: where its episode `ended`.

    A queue is also cleared where a human `intervened`: it was planned from a state that the robot has left.
    """
    return ended | intervened if isinstance(carry, ActionQueue) else ended


def planned_in_turn(carry: Carry) -> bool:
    """Return whether seeds with this carry act one after the other, so that each plans only when its queue is empty."""
    return isinstance(carry, ActionQueue) and plans_in_turn()


def next_action(queue: ActionQueue, propose: Callable[[], Array], execute: int) -> tuple[Array, ActionQueue]:
    """Return the action `[..., A]` of this step, and the queue without it.

    Where `left` is 0 the queue first takes the leading `execute` actions of `propose() [..., H, A]`. `propose` is
    evaluated only if a queue of the batch is empty; under `jax.vmap`, if a queue of any member is.
    Raises `ConfigError` unless 1 <= execute <= the queue's places, or if the proposal has another shape.
    """
    places = queue.actions.shape[-2]
    if not 1 <= execute <= places:
        raise ConfigError(f"{execute} actions to execute per chunk; the queue has {places} places, so 1 to {places}")
    empty = queue.left == 0

    def refill() -> ActionQueue:
        chunk = propose()
        if chunk.ndim != queue.actions.ndim or chunk.shape[-2] < execute:
            raise ConfigError(
                f"the policy proposed actions of shape {chunk.shape}; expected the queue's batch axes, at least "
                f"{execute} steps and {queue.actions.shape[-1]} action numbers"
            )
        taken = chunk[..., :execute, :].astype(queue.actions.dtype)
        padding = [(0, 0)] * (chunk.ndim - 2) + [(0, places - execute), (0, 0)]
        filled = jnp.broadcast_to(jnp.pad(taken, padding), queue.actions.shape)
        return ActionQueue(
            actions=jnp.where(empty[..., None, None], filled, queue.actions),
            left=jnp.where(empty, execute, queue.left).astype(jnp.int32),
        )

    ready = jax.lax.cond(any_seed(empty.any()), refill, lambda: queue)
    rest = jnp.concatenate([ready.actions[..., 1:, :], jnp.zeros_like(ready.actions[..., :1, :])], axis=-2)
    return ready.actions[..., 0, :], ActionQueue(actions=rest, left=ready.left - 1)


def play(chunk: int, carry: Carry, propose: Callable[[], Array]) -> tuple[Array, Carry]:
    """Return the next actions `[..., A]` of the chunks of `chunk` actions being played, and the queues without them.

    `propose()` gives new chunks `[..., h A]`, which are taken where a queue is empty; with h = 1 at every step.
    """
    if chunk == 1:
        return propose(), carry

    def chunks() -> Array:
        flat = propose()
        return flat.reshape(*flat.shape[:-1], chunk, -1)

    return next_action(carry, chunks, chunk)


def fresh_queue(chunk: int, batch_shape: tuple[int, ...], action_dim: int) -> ActionQueue | None:
    """Return empty queues `[*batch_shape, h, A]`; `None` with h = 1, where nothing is remembered."""
    return None if chunk == 1 else empty_queue(batch_shape, chunk, action_dim)
