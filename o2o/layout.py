"""How the same mathematics is laid out on different back ends: what is fast on a GPU need not be on a CPU."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from o2o.networks import CriticEnsemble, Model, split_members, stack_members
from o2o.types import Array, Params

PIECE_ROWS = 32
"""Rows whose intermediate values, some dozens of each, still fit a CPU core's cache."""

APART_FROM = 64
"""Width of the critics' layers from which separate products gain more than their compilation costs."""
APART_MEMBERS = 4
"""Critics from which they gain at all: ten do, two lose (`benchmarks/PERFORMANCE.md`)."""

RowSum = Callable[[Params, Any, Any], tuple[Array, Any]]
"""Parameters, rows that gradients flow to and rows that they do not: a sum over the rows `[]`, and other sums."""


def piece_rows() -> int | None:
    """Return how many rows a wide evaluation takes at a time on this back end; None: all at once."""
    return PIECE_ROWS if jax.default_backend() == "cpu" else None


def sum_in_pieces(function: RowSum, size: int | None, params: Params, varied: Any, fixed: Any) -> tuple[Array, Any]:
    """Return `function(params, varied, fixed)`, a sum over the leading axis of the rows, from pieces of `size` rows.

    Each piece's gradient is computed right behind its value, while what it needs is still in the cache, and with no
    second forward pass; so the result can be differentiated once, by `params` and `varied`, in reverse mode. With no
    size, or rows that it does not divide into several, nothing is cut.
    """
    rows = jax.tree.leaves(varied)[0].shape[0]
    if size is None or rows <= size or rows % size:
        return function(params, varied, fixed)
    return _in_pieces(function, size, params, varied, fixed)


def _cut(rows: Any, size: int) -> Any:
    """Return pieces `[n, size, ...]` of rows `[n * size, ...]`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_pieces(function: RowSum, size: int, params: Params, varied: Any, fixed: Any) -> tuple[Array, Any]:
    pieces = _cut((varied, fixed), size)
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), jax.lax.map(lambda rows: function(params, *rows), pieces))


def _forward(function: RowSum, size: int, params: Params, varied: Any, fixed: Any) -> tuple[Any, Any]:
    pieces = _cut((varied, fixed), size)
    both = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)

    def step(totals: Any, rows: Any) -> tuple[Any, Any]:
        result, (grads, row_grads) = both(params, *rows)
        return jax.tree.map(jnp.add, totals, (result, grads)), row_grads

    shapes = jax.eval_shape(lambda p, rows: both(p, *rows), params, jax.tree.map(lambda leaf: leaf[0], pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[1][0]))
    (result, grads), row_grads = jax.lax.scan(step, zeros, pieces)
    return result, (grads, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), row_grads), fixed)


def _backward(function: RowSum, size: int, saved: Any, cotangent: Any) -> tuple[Any, Any, Any]:
    grads, row_grads, fixed = saved
    scaled = jax.tree.map(lambda leaf: cotangent[0] * leaf, (grads, row_grads))
    return *scaled, jax.tree.map(jnp.zeros_like, fixed)


_in_pieces.defvjp(_forward, _backward)


def working(agent: Any, seeds: int) -> Any:
    """Return an agent as its updates run fastest inside a program of `seeds` seeds: on a CPU, one seed's critics apart.

    Several seeds run batched anyway. `stored` undoes it before the program ends, so that no one else sees the form.
    """
    return _convert(agent, split_members) if _apart(seeds) else agent


def stored(agent: Any, seeds: int) -> Any:
    """Return what `working` gave, after its updates, in the form that is kept and saved."""
    return _convert(agent, stack_members) if _apart(seeds) else agent


def _apart(seeds: int) -> bool:
    return seeds == 1 and jax.default_backend() == "cpu"


def _convert(agent: Any, convert: Callable[[Params], Params]) -> Any:
    """Convert the parameters of an agent's critics, of their target and in their optimiser; of agents in it, too."""
    changes: dict[str, Any] = {}
    for name in [field.name for field in fields(agent)]:
        part = getattr(agent, name)
        if isinstance(part, Model) and isinstance(part.module, CriticEnsemble):
            if max(part.module.hidden_dims) < APART_FROM or part.module.num < APART_MEMBERS:
                continue
            changes[name] = part.replace(params=convert(part.params), opt_state=_in_state(part.opt_state, convert))
        elif isinstance(part, struct.PyTreeNode) and hasattr(part, "critic"):
            changes[name] = _convert(part, convert)
    if "critic" in changes and hasattr(agent, "target_critic"):
        changes["target_critic"] = convert(agent.target_critic)
    return agent.replace(**changes)


def _in_state(state: Any, convert: Callable[[Params], Params]) -> Any:
    """Convert what an optimiser keeps in the shape of the parameters."""
    shaped: Callable[[Any], bool] = lambda leaf: isinstance(leaf, dict) and "params" in leaf  # noqa: E731
    return jax.tree.map(lambda leaf: convert(leaf) if shaped(leaf) else leaf, state, is_leaf=shaped)
