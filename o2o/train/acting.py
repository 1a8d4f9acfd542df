"""Acting: raw observations are normalised and go through agents' policies to actions in [-1, 1]."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o2o.data.normalizer import Normalizer, normalize
from o2o.nn.kernels import over_seeds
from o2o.nn.modules import where_leading
from o2o.rl.chunks import outdated, planned_in_turn
from o2o.types import Array, Carry


def act(
    agent: Any, normalizer: Normalizer | None, observations: Any, carry: Carry, rng: Array, deterministic: bool = False
) -> tuple[Array, Carry]:
    """Return one agent's actions `[n, A]` for raw observations `[n, D]`, and its next carry."""
    return agent.sample_actions(normalize(normalizer, observations), carry, rng, deterministic)


@partial(jax.jit, static_argnames="deterministic")
def act_side_by_side(
    agents: Any, normalizer: Normalizer | None, observations: Any, carry: Carry, keys: Array, deterministic: bool
) -> tuple[Array, Carry]:
    """Return actions `[S, n, A]` of stacked agents `[S]` for raw observations `[S, n, D]`, and their next carries.

    `keys` `[S]` are the agents' random keys of this step.
    """

    def one_seed(agent: Any, observations: Any, carry: Carry, key: Array) -> tuple[Array, Carry]:
        return act(agent, normalizer, observations, carry, key, deterministic)

    seeds = jax.tree.leaves(observations)[0].shape[0]
    return over_seeds(one_seed, seeds, in_turn=planned_in_turn(carry))(agents, observations, carry, keys)


def stack_of_one(agent: Any) -> Any:
    """Return one agent as stacked agents `[1]`."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], agent)


def clear_carry(carry: Carry, fresh: Carry, where: Any) -> Carry:
    """Put `fresh` where `where` `[...]` is true, leaves `[..., *]`: a policy's memory ends with its episode."""
    return where_leading(where, fresh, carry)


@jax.jit
def _keys_at(keys: Array, step: int) -> Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)


def keys_of_steps(seeds: Sequence[int]) -> Iterator[Array]:
    """Yield the random keys `[S]` of every step; agent k's depend on `seeds[k]` alone."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return (_keys_at(keys, step) for step in count())


class Agents:
    """A `Policy` (`o2o.data.rollout`): S agents side by side, each in n slots; slot `s * n + i` is agent s's."""

    def __init__(
        self, agents: Any, normalizer: Normalizer | None, n: int, keys: Iterator[Array], deterministic: bool = True
    ) -> None:
        """Let stacked `agents` `[S]` act; `keys` yields the random keys `[S]` of every step."""
        self._agents, self._normalizer, self._keys, self._deterministic = agents, normalizer, keys, deterministic
        self._fresh = jax.vmap(lambda agent: agent.initial_carry((n,)))(agents)
        self._carry = self._fresh
        self._shape = (jax.tree.leaves(agents)[0].shape[0], n)

    def begin(self, episodes: Mapping[int, int]) -> None:
        """Clear the memory of these slots."""
        self._clear(self._where(episodes))

    def interrupt(self, slots: Sequence[int]) -> None:
        """Drop the chunks that these slots are playing; other memories outlive a human's takeover."""
        self._clear(outdated(self._carry, np.zeros(self._shape, bool), self._where(slots)))

    def act(self, observations: Sequence[Any]) -> np.ndarray:
        """Return actions `[S * n, A]`."""
        stacked = jax.tree.map(
            lambda *leaves: np.stack(leaves).reshape(*self._shape, *np.shape(leaves[0])), *observations
        )
        actions, self._carry = act_side_by_side(
            self._agents, self._normalizer, stacked, self._carry, next(self._keys), self._deterministic
        )
        actions = np.asarray(actions)
        return actions.reshape(-1, actions.shape[-1])

    def _where(self, slots: Mapping[int, int] | Sequence[int]) -> np.ndarray:
        where = np.zeros(self._shape, bool)
        where.reshape(-1)[list(slots)] = True
        return where

    def _clear(self, where: np.ndarray) -> None:
        if self._carry is not None and where.any():
            self._carry = clear_carry(self._carry, self._fresh, where)
