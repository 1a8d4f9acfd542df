"""N simulators side by side, with a reset of their own, a time limit and a task's conventions.

`Batch.step` is the pure twin of the wrappers that `o2o.envs.make` puts around a Gymnasium environment. Its transition
keeps the true last observation of an episode; `masks` are 1 - terminated and do not know the time limit.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.data.task import Task
from o2o.keys import WORLD, key_at
from o2o.nn.modules import where_leading
from o2o.simulators.protocol import Simulator
from o2o.types import Array


class Worlds(struct.PyTreeNode):
    """N environments and the episodes under way in them, leaves `[N, ...]`."""

    state: Any
    """The simulators' states."""
    observations: Array
    """What the policy sees next, float32 `[N, D]`."""
    key: Array
    """Key of each environment; that of an episode derives from it and the episode's number."""
    episode: Array
    length: Array
    """Steps of the episode so far."""
    total: Array
    """Its raw return so far."""
    success: Array
    """Whether a step of it succeeded."""


class Ends(NamedTuple):
    """What is to be said of the episodes that end in a step, all `[N]`; the others' numbers are those so far."""

    ended: Array
    returns: Array
    lengths: Array
    success: Array


@dataclass(frozen=True)
class Batch:
    """A simulator as a task's environment: what does not change from step to step. Hashable, so programs know it."""

    simulator: Simulator
    task: Task
    spec: ObservationSpec
    action_map: ActionMap
    limit: int | None = None
    """Steps after which an episode is cut; None: never."""
    terminate: bool = True
    """Whether success ends an episode where the task says so: in training, not in evaluation."""

    @classmethod
    def of(cls, simulator: Simulator, task: Task, limit: int | None = None, terminate: bool = True) -> "Batch":
        """Return the environment of a task with observations and actions mapped as `o2o.envs.make` maps them."""
        spec = ObservationSpec.from_space(simulator.observation_space, task.achieved_goal)
        return cls(simulator, task, spec, ActionMap.from_space(simulator.action_space), limit, terminate)

    @property
    def knows_success(self) -> bool:
        """Whether an episode can be said to have succeeded or failed."""
        task = self.task
        return (task.has_success or task.binary) and (self._reports or task.success_reward is not None)

    @property
    def _reports(self) -> bool:
        state = jax.eval_shape(self.simulator.reset, jax.random.key(0))
        action = jax.ShapeDtypeStruct(self.action_map.shape, jnp.float32)
        return jax.eval_shape(self.simulator.step, state, action)[1].success is not None

    def reset(self, key: Array, n: int) -> Worlds:
        """Begin the first episodes of `n` environments."""
        keys = jax.vmap(lambda i: key_at(key, WORLD, i))(jnp.arange(n))
        zero = jnp.zeros(n)
        count = jnp.zeros(n, jnp.int32)
        state = jax.vmap(self._begin)(keys, count)
        return Worlds(
            state=state,
            observations=jax.vmap(self._observe)(state),
            key=keys,
            episode=count,
            length=count,
            total=zero,
            success=zero > 0,
        )

    def step(self, worlds: Worlds, actions: Array) -> tuple[Worlds, dict[str, Array], Ends]:
        """Play actions `[N, A]` in [-1, 1]; episodes that end begin anew.

        Returns the transition, leaves `[N, ...]` as `o2o.types.Batch` and `ends`; its `next_observations` are the true
        ones, those of `Worlds` the next episode's.
        """
        state, outcome = jax.vmap(self.simulator.step)(worlds.state, self._to_env(actions))
        raw, succeeded = jnp.asarray(outcome.reward, jnp.float32), self._success(outcome)
        terminated = jnp.asarray(outcome.terminated, bool)
        if self.terminate and self.task.terminate_on_success:
            terminated |= succeeded
        length, total, success = worlds.length + 1, worlds.total + raw, worlds.success | succeeded
        ended = terminated if self.limit is None else terminated | (length >= self.limit)
        observations = jax.vmap(self._observe)(state)
        row = {
            "observations": worlds.observations,
            "actions": jnp.clip(actions, -1.0, 1.0),
            "rewards": self._rewards(raw, succeeded),
            "masks": 1.0 - terminated.astype(jnp.float32),
            "next_observations": observations,
            "ends": ended.astype(jnp.float32),
        }
        episode = worlds.episode + ended

        def begun() -> tuple[Any, Array]:
            fresh = jax.vmap(self._begin)(worlds.key, episode)
            return where_leading(ended, (fresh, jax.vmap(self._observe)(fresh)), (state, observations))

        state, current = jax.lax.cond(ended.any(), begun, lambda: (state, observations))
        going = ~ended
        after = Worlds(
            state=state,
            observations=current,
            key=worlds.key,
            episode=episode,
            length=length * going,
            total=total * going,
            success=success & going,
        )
        return after, row, Ends(ended, total, length, success)

    def _begin(self, key: Array, episode: Array) -> Any:
        return self.simulator.reset(jax.random.fold_in(key, episode))

    def _observe(self, state: Any) -> Array:
        """Return one environment's observation `[D]`, as `ObservationSpec.flatten` does."""
        whole, parts = self.simulator.observe(state), []
        for leaf in self.spec.leaves:
            entry = whole
            for name in leaf.path:
                entry = cast(Any, entry)[name]
            parts.append(jnp.asarray(entry, jnp.float32).reshape(-1))
        return jnp.concatenate(parts)

    def _to_env(self, actions: Array) -> Array:
        """Return actions `[N, *shape]` in the environment's units, as `ActionMap.to_env` does."""
        low, high = (np.asarray(bound, np.float32) for bound in (self.action_map.low, self.action_map.high))
        mapped = (high + low) / 2 + (high - low) / 2 * jnp.clip(actions, -1.0, 1.0)
        mapped = jnp.clip(mapped, *self.action_map.float32_bounds)
        return mapped.reshape(actions.shape[0], *self.action_map.shape)

    def _success(self, outcome: Any) -> Array:
        """Return the success `[N]` of a step, as `Task.success` does; false where it is not known."""
        if not (self.task.has_success or self.task.binary):
            return jnp.zeros(outcome.reward.shape, bool)
        if outcome.success is not None:
            return jnp.asarray(outcome.success, bool)
        if self.task.success_reward is not None:
            return outcome.reward >= self.task.success_reward
        return jnp.zeros(outcome.reward.shape, bool)

    def _rewards(self, raw: Array, success: Array) -> Array:
        """Return the transformed rewards `[N]`, as `Task.rewards` does."""
        base = success.astype(jnp.float32) - 1.0 if self.task.binary else raw
        return self.task.reward_scale * base + self.task.reward_bias
