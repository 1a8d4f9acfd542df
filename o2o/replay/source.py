"""Where minibatches come from, as pytrees that jitted programs draw from.

One set of training programs serves every kind of replay: a program gets a `BatchSource` and calls `minibatches`. Rows
on the device are drawn inside the program; rows that were fetched from host memory are already a batch.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import jax
from flax import struct

from o2o.data.normalizer import Normalizer, normalize
from o2o.keys import DATA, key_at
from o2o.nn.kernels import over_seeds
from o2o.replay.buffer import OfflineData, ReplayBuffer, sample_minibatches
from o2o.types import Array, Batch


class Sampling(NamedTuple):
    """How minibatches are drawn; static, so each value is one compiled program."""

    batch_size: int
    utd_ratio: int = 1
    """Minibatches of one update call."""
    offline_ratio: float = 0.0
    """Share of dataset rows in each minibatch."""
    window: int = 1
    """Rows in a row that each entry holds."""


class BatchSource(Protocol):
    """Minibatches for all seeds."""

    shared: ClassVar[bool]
    """Whether all seeds draw from the same rows, which then need no seed axis."""

    def minibatches(self, keys: Array, at: Array, sampling: Sampling) -> Batch:
        """Return the batch of gradient step `at` `[]` for seeds with keys `[S]`, leaves `[S, utd, B, ...]`."""
        ...


class DatasetRows(struct.PyTreeNode):
    """Rows of a dataset on the device, the same for every seed."""

    data: OfflineData
    shared: ClassVar[bool] = True

    def one_seed(self, key: Array, at: Array, sampling: Sampling) -> Batch:
        """Return the batch of one seed, leaves `[utd, B, ...]`."""
        shape = (sampling.utd_ratio, sampling.batch_size)
        return self.data.draw(key_at(key, DATA, at), shape, sampling.window)

    def minibatches(self, keys: Array, at: Array, sampling: Sampling) -> Batch:
        """Return the batch of gradient step `at`, leaves `[S, utd, B, ...]`."""
        return over_seeds(lambda key: self.one_seed(key, at, sampling), keys.shape[0])(keys)


class Ring(struct.PyTreeNode):
    """Rows of the run's own ring buffers, leaves `[S, capacity, ...]`, mixed with a share of dataset rows."""

    buffer: ReplayBuffer
    offline: OfflineData | None
    shared: ClassVar[bool] = False

    def minibatches(self, keys: Array, at: Array, sampling: Sampling) -> Batch:
        """Return the batch of gradient step `at`, leaves `[S, utd, B, ...]`."""

        def draw(key: Array, buffer: ReplayBuffer) -> Batch:
            return sample_minibatches(
                key_at(key, DATA, at),
                self.offline,
                buffer,
                sampling.utd_ratio,
                sampling.batch_size,
                sampling.offline_ratio,
                sampling.window,
            )

        return over_seeds(draw, keys.shape[0])(keys, self.buffer)


class Fetched(struct.PyTreeNode):
    """A batch that was drawn before, leaves `[S, utd, B, ...]`."""

    batch: Batch
    shared: ClassVar[bool] = False

    def minibatches(self, keys: Array, at: Array, sampling: Sampling) -> Batch:
        """Return the batch."""
        return self.batch


class RolloutRows(struct.PyTreeNode):
    """A whole rollout in order of time, raw rows `[S, T, N, ...]` of N environments per seed."""

    rows: Batch
    normalizer: Normalizer | None
    shared: ClassVar[bool] = False

    def minibatches(self, keys: Array, at: Array, sampling: Sampling) -> Batch:
        """Return the rows with normalised observations."""
        return {
            key: normalize(self.normalizer, rows) if key.endswith("observations") else rows
            for key, rows in self.rows.items()
        }


def batch_shapes(source: BatchSource, seeds: int, sampling: Sampling) -> Any:
    """Return shapes and types of one seed's batch, leaves `[utd, B, ...]`."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), seeds))
    batch = jax.eval_shape(lambda s, k: s.minibatches(k, 0, sampling), source, keys)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
