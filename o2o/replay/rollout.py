"""The rows of one rollout of an on-policy agent, in host memory until it is full."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.data.normalizer import Normalizer
from o2o.replay.buffer import TRANSITION_KEYS, OfflineData, one_row
from o2o.replay.host import HostData
from o2o.replay.source import RolloutRows, Sampling
from o2o.types import Array, Batch, OnlineConfig


class LiveRollout(struct.PyTreeNode):
    """A rollout inside a program that plays, stores and learns."""

    rows: Batch
    at: Array
    """Steps stored since the last update, `[]`."""

    @property
    def _length(self) -> int:
        return self.rows["rewards"].shape[1]

    def calls_due(self, env_steps: Array, online: OnlineConfig, window: int) -> Array:
        """Return 1 if the environment step under way fills the rollout, else 0, `[]`."""
        return (self.at + 1 == self._length).astype(jnp.int32)

    def add(self, rows: Batch, normalizer: Normalizer | None) -> "LiveRollout":
        """Store one raw transition per environment, leaves `[S, N, ...]`."""
        kept = jax.tree.map(
            lambda leaf, row: jax.lax.dynamic_update_index_in_dim(leaf, row.astype(leaf.dtype), self.at, 1),
            self.rows,
            {key: rows[key] for key in self.rows},
        )
        return LiveRollout(kept, (self.at + 1) % self._length)

    def source(self, offline: None, normalizer: Normalizer | None) -> RolloutRows:
        """Return the rollout, to be learnt from as a whole."""
        return RolloutRows(self.rows, normalizer)

    def prioritise(self, slots: Array, priorities: Array) -> "LiveRollout":
        """Return itself: a rollout is learnt from as a whole."""
        return self


class Rollout:
    """Rows `[S, T, N, ...]` in order of time, of N environments per seed; learnt from once, then written over."""

    kind = "rollout"
    offline = None

    def __init__(self, data: OfflineData | HostData, seeds: int, length: int, num_envs: int) -> None:
        """Make room for `length` steps of `num_envs` environments per seed, for rows like those of `data`."""
        self.data, self.length, self.places = data, length, (seeds, num_envs)
        row = one_row({key: data.rows[key] for key in (*TRANSITION_KEYS, "ends")})
        shape = (seeds, length, num_envs)
        self.rows: Batch = jax.tree.map(lambda leaf: np.zeros((*shape, *leaf.shape), leaf.dtype), row)
        self.rows["ends"] = self.rows["ends"].astype(np.float32)
        self.at = 0
        """Steps stored since the last update."""
        self._normalizer: Normalizer | None = None

    def add(self, rows: Batch, normalizer: Normalizer | None) -> None:
        """Store one raw transition per environment, leaves `[S * N, ...]`."""
        if self.at == self.length:
            self.at = 0

        def store(leaf: np.ndarray, row: np.ndarray) -> None:
            leaf[:, self.at] = np.reshape(row, (*self.places, *row.shape[1:]))

        jax.tree.map(store, self.rows, {key: rows[key] for key in self.rows})
        self.at, self._normalizer = self.at + 1, normalizer

    def reveal(self, ended: np.ndarray) -> None:
        """Do nothing: rows are learnt from when the rollout is full."""

    def calls_due(self, env_steps: int, online: OnlineConfig, window: int) -> int:
        """Return 1 if the environment step under way fills the rollout, else 0."""
        return int(self.at % self.length + 1 == self.length)

    def live(self) -> "LiveRollout":
        """Return the rollout as a program takes it that plays too; `settle` takes it back."""
        return LiveRollout(self.rows, jnp.int32(self.at % self.length))

    def settle(self, live: "LiveRollout", rows: int) -> None:
        """Take back what a program has stored `rows` transitions per seed in."""
        self.rows, self.at = live.rows, int(live.at)

    def source(self, keys: Array, at: int, sampling: Sampling) -> RolloutRows:
        """Return the rollout, to be learnt from as a whole."""
        return RolloutRows(self.rows, self._normalizer)

    def batch_shapes(self, sampling: Sampling) -> Batch:
        """Return shapes and types of one seed's rollout, leaves `[T, N, ...]`."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.rows)

    def mark_ends(self, where: np.ndarray) -> None:
        """Make the newest row the last of its episode where `where` `[S * N]` is true."""
        if self.at % self.length:
            ends = self.rows["ends"][:, self.at - 1]
            np.maximum(ends, np.reshape(where, self.places), out=ends)

    def grow(self, steps: int) -> None:
        """Do nothing: a rollout is as long as it is."""

    def arrays(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the rollout, by name."""
        return {"buffer": self.rows}

    def state(self) -> dict[str, Any]:
        """Return the host values that go with `arrays`, JSON-able."""
        return {"kind": self.kind, "at": self.at}

    def restore(self, arrays: dict[str, Any], state: dict[str, Any]) -> None:
        """Go on from the `arrays` and the `state` of a checkpoint."""
        self.rows, self.at = jax.tree.map(np.array, arrays["buffer"]), state["at"]

    def spread(self, everywhere: Callable[[Any], Any], by_seed: Callable[[Any], Any]) -> None:
        """Do nothing: programs place the rows as they take them."""

    def look_only(self) -> None:
        """Do nothing: nothing is on disk."""

    def sync(self) -> None:
        """Do nothing: nothing is on disk."""

    def close(self) -> None:
        """Do nothing: nothing is open."""
