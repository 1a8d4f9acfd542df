"""Open-loop execution of action chunks: the queue of actions a policy carries from one step of an episode to the next.

A chunk `[..., H, A]` is proposed when a queue runs dry and its actions are handed out one per step. The loops give
every new episode a fresh carry, so a queue never outlives its episode. All shapes are static: which chunk position
comes next is data, so a batch of policies may stand at different positions. Nor does it outlive a human's takeover.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from o2o.errors import ConfigError
from o2o.nn.kernels import any_seed, plans_in_turn
from o2o.types import Array, Carry


class ActionQueue(NamedTuple):
    """The rest of a chunk: the first `left [...]` (int32) of `actions [..., h, A]` are still to be played, in order."""

    actions: Array
    left: Array


def empty_queue(batch_shape: tuple[int, ...], horizon: int, action_dim: int) -> ActionQueue:
    """Return the queue of fresh episodes: `horizon` places, none taken.

    Raises `ConfigError` for a horizon below 1.
    """
    if horizon < 1:
        raise ConfigError(f"an action queue of {horizon} places cannot hold an action; the horizon must be at least 1")
    return ActionQueue(
        actions=jnp.zeros((*batch_shape, horizon, action_dim), jnp.float32), left=jnp.zeros(batch_shape, jnp.int32)
    )


def outdated(carry: Carry, ended: Any, intervened: Any) -> Any:
    """Return where a policy's carry is to be cleared, booleans `[...]`: where its episode `ended`.

    A queue also where a human `intervened` in the step: the rest of it was planned for where the robot is no more.
    """
    return ended | intervened if isinstance(carry, ActionQueue) else ended


def planned_in_turn(carry: Carry) -> bool:
    """Return whether seeds that carry `carry` act one after the other, so that each plans in its own time."""
    return isinstance(carry, ActionQueue) and plans_in_turn()


def next_action(queue: ActionQueue, propose: Callable[[], Array], execute: int) -> tuple[Array, ActionQueue]:
    """Return the action `[..., A]` of this step and the queue behind it.

    Where `left` is 0 the queue first takes the leading `execute` actions of `propose() [..., H, A]`; `propose` is
    evaluated only when some queue is empty, under `jax.vmap` that of any.
    Raises `ConfigError` unless 1 <= execute <= the queue's places.
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
