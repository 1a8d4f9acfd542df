"""Windows of consecutive rows: n-step returns, action chunks, and what an episode's end does to both.

A window holds W rows in order of time, leaves `[..., W, ...]`. Three flags say where episodes end, all `[..., W]`:

- `ends` is 1 at the last row of every episode.
- `masks` is 0 at a true terminal and 1 elsewhere, so also at a time limit.
- `valid` is 1 up to and including the first row with `ends`, and 0 behind it: those rows are of another episode.

A true terminal ends the return: nothing is bootstrapped behind it. A time limit cuts the window short too, but the
value of the last state may still count; the functions below say in each case what happens.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from o2o.types import Array, Batch, ChunkedConfig

Timeouts = Literal["terminal", "bootstrap"]
"""What a time limit means for an n-step target. `terminal`: no value behind it. `bootstrap`: the value counts."""


def last_valid(valid: Array) -> Array:
    """Return the index `[...]` (int32) of the last row of the window's first episode, for `valid [..., W]`."""
    return jnp.maximum(jnp.sum(valid, axis=-1).astype(jnp.int32) - 1, 0)


def discounted_return(rewards: Array, valid: Array, discount: float) -> Array:
    """Return the sum over j of discount^j r_j `[...]` up to the episode's end, for `rewards` and `valid` `[..., W]`."""
    powers = discount ** jnp.arange(rewards.shape[-1])
    return jnp.sum(powers * valid * rewards, axis=-1)


def survives(masks: Array, valid: Array) -> Array:
    """Return 0 where the episode terminates inside the window, else 1 `[...]`, for `masks` and `valid` `[..., W]`."""
    return jnp.min(jnp.where(valid > 0, masks, 1.0), axis=-1)


def row_at(tree: Any, index: Array) -> Any:
    """Return the rows `[..., *]` of leaves `[..., W, *]` at `index [...]`, one per window."""

    def pick(leaf: Array) -> Array:
        where = index.reshape(*index.shape, *[1] * (leaf.ndim - index.ndim))
        return jnp.take_along_axis(leaf, where, axis=index.ndim).squeeze(index.ndim)

    return jax.tree.map(pick, tree)


def n_step_rows(batch: Batch, n: int, discount: float, timeouts: Timeouts) -> Batch:
    """Return transitions `[..., *]` over the first n rows of windows `[..., W, *]`, W >= n.

    k <= n is the number of rows up to the end of the window's first n rows, or of their episode. In the result
    `rewards` is the sum over j < k of discount^j r_j, `next_observations` the observation after k steps, and `masks` is
    discount^k where its value counts, else 0. So the n-step target is y = rewards + masks * v(next_observations).

    The value does not count behind a true terminal. Behind a time limit it counts with `timeouts` "bootstrap". With
    "terminal" it counts only if all n rows are of one episode that goes on after them.
    """
    rewards, masks, ends, valid = (batch[key][..., :n] for key in ("rewards", "masks", "ends", "valid"))
    steps = jnp.sum(valid, axis=-1).astype(jnp.int32)
    counts = survives(masks, valid)
    if timeouts == "terminal":
        counts = counts * (steps == n) * (1.0 - jnp.max(ends * valid, axis=-1))
    powers = discount ** jnp.arange(n + 1)
    first = jnp.zeros_like(steps)
    return {
        "observations": row_at(batch["observations"], first),
        "actions": row_at(batch["actions"], first),
        "rewards": discounted_return(rewards, valid, discount),
        "masks": powers[steps] * counts,
        "next_observations": row_at(batch["next_observations"], last_valid(valid)),
    }


def repeat_last(actions: Array, valid: Array) -> Array:
    """Return actions `[..., W, A]` in which the episode's last action stands in all rows behind it."""
    index = jnp.minimum(jnp.arange(valid.shape[-1]), last_valid(valid)[..., None])
    return jnp.take_along_axis(actions, index[..., None], axis=-2)


def flat_chunk(actions: Array, valid: Array) -> tuple[Array, Array]:
    """Return the actions `[..., W, A]` as chunks `[..., W A]`, and `valid` once per action number `[..., W A]`."""
    return actions.reshape(*actions.shape[:-2], -1), jnp.repeat(valid, actions.shape[-1], axis=-1)


class Chunks(NamedTuple):
    """Transitions whose action is a chunk of h actions; n = h A numbers."""

    observations: Any
    """At the chunk's first action, `[..., D]`, or a dict of such arrays."""
    actions: Array
    """`[..., n]`."""
    entries: Array
    """1 where a number of `actions` counts for imitation, `[..., n]`."""
    returns: Array
    """Discounted reward inside the window, up to its episode's end, `[...]`."""
    masks: Array
    """0 where the episode terminates in the window, `[...]`."""
    valid: Array
    """1 where the whole window counts for the critic, `[...]`."""
    next_observations: Any
    """After the last action, like `observations`."""


def chunk_rows(batch: Batch, discount: float, pad_terminal: bool) -> Chunks:
    """Return the chunks of windows `[..., h, *]`, with all h rows as one action.

    A window that an episode's end cuts short does not count for the critic, and its actions behind the end do not count
    for imitation. `pad_terminal` makes an exception for true terminals: the last action is repeated to the end, the
    return stops at the terminal, and the window counts as a whole. Behind a time limit the next state is unknown, so
    such a window never counts for the critic. A window whose last row is the time limit is whole and bootstraps.
    """
    valid = batch["valid"]
    actions = batch["actions"]
    returns = discounted_return(batch["rewards"], valid, discount)
    masks = survives(batch["masks"], valid)
    whole = valid[..., -1]
    if pad_terminal:
        actions = repeat_last(actions, valid)
        whole = jnp.maximum(whole, 1.0 - masks)
        valid = jnp.maximum(valid, (1.0 - masks)[..., None])
    chunks, entries = flat_chunk(actions, valid)
    rows, axis = valid.shape[-1], valid.ndim - 1

    def row(tree: Any, index: int) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, index, axis, keepdims=False), tree)

    return Chunks(
        observations=row(batch["observations"], 0),
        actions=chunks,
        entries=entries,
        returns=returns,
        masks=masks,
        valid=whole,
        next_observations=row(batch["next_observations"], rows - 1),
    )


def chunk_transitions(batch: Batch, config: ChunkedConfig) -> Batch:
    """Return windows `[..., h, *]` as transitions `[..., *]` whose action is the whole chunk (`chunk_rows`).

    `masks` is discount^(h-1) where the value behind the chunk counts, else 0, and `rewards` the return inside the
    window. So the target of a one-step method, rewards + discount * masks * v(next_observations), is that of h steps.
    `valid [...]` is 1 where the transition counts for the critic, `entries [..., h A]` where a number counts for
    imitation. With `chunk` 1 the rows are transitions already: nothing but these two is added, all ones.
    """
    if config.chunk == 1:
        return {**batch, "valid": jnp.ones_like(batch["rewards"]), "entries": jnp.ones_like(batch["actions"])}
    chunks = chunk_rows(batch, config.discount, config.pad_terminal)
    return {
        "observations": chunks.observations,
        "actions": chunks.actions,
        "rewards": chunks.returns,
        "masks": config.discount ** (config.chunk - 1) * chunks.masks,
        "next_observations": chunks.next_observations,
        "valid": chunks.valid,
        "entries": chunks.entries,
    }
