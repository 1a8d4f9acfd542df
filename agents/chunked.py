"""What agents that play chunks of actions share: the queue, windows of one row, the flow they draw chunks from.

A chunk is h actions in a row, one vector of n = h A numbers, played open loop. With h = 1 rows are plain transitions
and there is no queue.
"""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from o2o.agents.minibatches import each_minibatch, minibatches_in
from o2o.nn.generative import Flow, Guidance
from o2o.nn.modules import Model
from o2o.rl.chunks import ActionQueue, fresh_queue, play
from o2o.rl.windows import Chunks, chunk_transitions
from o2o.types import Agent, Array, Batch, Carry, Info, Params


class ByChunks(Agent):
    """Lets an agent of single actions act by chunks. It stands first among the bases: `class RLPD(ByChunks, SAC)`.

    To the agent a chunk is one action, and a transition leads from the start of one chunk to the start of the next.
    """

    actor: Any
    config: Any = struct.field(pytree_node=False)

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run the class's update on leaves `[utd, B, ...]`, with chunks `[utd, B, h, ...]`."""
        return super().update(chunk_transitions(batch, self.config))

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return the class's actions `[..., A]`, one by one where they are chunks, and the queues without them."""
        act = super().sample_actions
        return play(self.config.chunk, carry, lambda: act(observations, None, rng, deterministic)[0])

    def initial_carry(self, batch_shape: tuple[int, ...]) -> ActionQueue | None:
        """Return empty queues `[*batch_shape, h, A]`; `None` with h = 1."""
        return fresh_queue(self.config.chunk, batch_shape, self.actor.module.action_dim // self.config.chunk)


class OfChunks(Agent):
    """An agent whose networks know chunks of `config.chunk` actions."""

    config: Any = struct.field(pytree_node=False)
    action_dim: int = struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        """Numbers of a chunk, n = h A."""
        return self.config.chunk * self.action_dim


class Chunked(OfChunks):
    """A policy over chunks of `config.chunk` actions; it defines `play`, and `step` on windows."""

    rng: Array

    def play(self, observations: Array, rng: Array, deterministic: bool) -> Array:
        """Return the chunks `[..., n]` in [-1, 1] that are played at observations `[..., D]`."""
        raise NotImplementedError

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step all networks on windows `[B, h, ...]`."""
        raise NotImplementedError

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Take one step per minibatch of the leaves `[utd, B, h, ...]`, with h = 1 `[utd, B, ...]`; mean metrics.

        Raises `DatasetError` for leaves without their leading axis.
        """
        minibatches_in(batch)  # raises before an axis is put where the rows' should be
        if self.needs.window == 1:
            batch = {**batch, "valid": jnp.ones_like(batch["rewards"])}
            batch = {key: jnp.expand_dims(value, 2) for key, value in batch.items()}
        return each_minibatch(lambda agent, rows: agent._step(rows), self, batch)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return the next actions `[..., A]` of the chunks being played, and the queues without them.

        A new chunk is chosen where a queue is empty.
        """
        return play(self.config.chunk, carry, lambda: self.play(observations, rng, deterministic))

    def initial_carry(self, batch_shape: tuple[int, ...]) -> ActionQueue | None:
        """Return empty queues `[*batch_shape, h, A]`; `None` with h = 1."""
        return fresh_queue(self.config.chunk, batch_shape, self.action_dim)


class ChunkedFlow(Chunked):
    """A flow over chunks that plays the best of `config.num_samples` by Q (`score`), guided by `config.guidance`."""

    actor: Model
    """The flow's velocity v(s, x, t)."""
    critic: Model
    target_critic: Params

    def score(self, observations: Array, chunks: Array) -> Array:
        """Return the values `[...]` that chunks `[..., n]` are ranked by."""
        raise NotImplementedError

    def q_value(self, observations: Array, actions: Array) -> Array | None:
        """Return what actions `[..., A]` are ranked by, `[...]`; None: the critics judge whole chunks."""
        return self.score(observations, actions) if self.config.chunk == 1 else None

    def flow_loss(self, params: Params, chunks: Chunks, rng: Array) -> tuple[Array, Info]:
        """Return the mean over all entries of the flow's squared error; invalid entries count as zeros."""

        def velocity(x: Array, t: Array) -> Array:
            return self.actor(chunks.observations, x, t, params=params)

        errors = Flow(self.config.flow_steps).loss(velocity, chunks.actions, rng)
        loss = jnp.mean(chunks.entries * errors)
        return loss, {"actor/loss": loss}

    def flow_chunks(self, observations: Array, noise: Array, guidance: Guidance | None = None) -> Array:
        """Return the flow's chunks `[..., n]` from `noise [..., n]`, with `guidance` pushed up Q; axes broadcast."""

        def velocity(x: Array, t: Array) -> Array:
            return self.actor(observations, x, t)

        def value(x: Array) -> Array:
            assert guidance is not None
            params = self.target_critic if guidance.critics == "target" else self.critic.params
            q = self.critic(observations, x, params=params)
            return jnp.min(q, axis=0) if guidance.aggregate == "min" else jnp.mean(q, axis=0)

        field = velocity if guidance is None else guidance.guided(velocity, value)
        return Flow(self.config.flow_steps).sample(field, noise, self.rng)

    def propose(
        self, observations: Array, rng: Array, deterministic: bool = False, guidance: Guidance | None = None
    ) -> Array:
        """Return the best of `num_samples` chunks, `[..., n]` in [-1, 1], at observations `[..., D]`.

        `deterministic` starts from fixed noise: zero and fixed draws, the same for every observation.
        """
        count, lead = self.config.num_samples, observations.shape[:-1]
        noise = chunk_noise(rng, count, lead, self.size, deterministic)
        candidates = self.flow_chunks(observations, noise, guidance)
        if count == 1:
            return candidates[0]
        best = jnp.argmax(self.score(observations, candidates), axis=0)[None, ..., None]
        return jnp.take_along_axis(candidates, best, axis=0)[0]

    def play(self, observations: Array, rng: Array, deterministic: bool) -> Array:
        """Return the chunks `[..., n]` in [-1, 1] that are played at observations `[..., D]`."""
        return self.propose(observations, rng, deterministic, self.config.guidance)


def chunk_noise(rng: Array, count: int, lead: tuple[int, ...], size: int, deterministic: bool) -> Array:
    """Return noise `[count, *lead, size]`; `deterministic`: zero and `count - 1` fixed draws, for all of `lead`."""
    if not deterministic:
        return jax.random.normal(rng, (count, *lead, size))
    fixed = jax.random.normal(jax.random.key(0), (count, size)).at[0].set(0.0)
    return jnp.broadcast_to(fixed.reshape(count, *[1] * len(lead), size), (count, *lead, size))
