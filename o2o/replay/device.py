"""Dataset and replay on the device: minibatches are drawn inside the jitted programs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.data.datasets import monte_carlo_returns
from o2o.data.normalizer import Normalizer, normalize
from o2o.errors import ConfigError
from o2o.nn.kernels import over_seeds
from o2o.replay.buffer import TRANSITION_KEYS, OfflineData, ReplayBuffer, capacity_for, take
from o2o.replay.source import BatchSource, DatasetRows, Ring, Sampling, batch_shapes
from o2o.types import Array, Batch, OnlineConfig


@dataclass(frozen=True)
class Returns:
    """How Monte-Carlo returns of finished episodes are computed (`mc_returns`)."""

    discount: float
    failure: float | None
    """Reward per step for ever behind a failed episode of a sparse task; None for other tasks."""


@partial(jax.jit, static_argnames="pending", donate_argnames="buffer")
def insert(buffer: ReplayBuffer, normalizer: Normalizer | None, rows: Batch, *, pending: bool) -> ReplayBuffer:
    """Store one raw transition per environment, `rows` `[S * N, ...]`, normalised; `pending` hides it until `reveal`.

    A program of its own: in one that also draws, XLA copies the whole buffer in every step.
    """

    return stored(buffer, normalizer, rows, pending)


def stored(buffer: ReplayBuffer, normalizer: Normalizer | None, rows: Batch, pending: bool = False) -> ReplayBuffer:
    """Return rings `[S]` with one raw transition per environment more, `rows` `[S * N, ...]`."""

    def one_seed(buffer: ReplayBuffer, row: Batch) -> ReplayBuffer:
        row = {key: normalize(normalizer, v) if key.endswith("observations") else v for key, v in row.items()}
        return buffer.add(row, pending=pending) if buffer.lanes == 1 else buffer.extend(row)

    if (lanes := buffer.lanes) > 1:
        rows = jax.tree.map(lambda leaf: leaf.reshape(-1, lanes, *leaf.shape[1:]), rows)
    return over_seeds(one_seed, buffer.cursor.shape[0])(buffer, rows)


@partial(jax.jit, donate_argnames="buffer")
def commit(buffer: ReplayBuffer, mc_returns: Array, counts: Array) -> ReplayBuffer:
    """Make the newest `counts` `[S]` rows visible with their returns-to-go `mc_returns` `[S, L]`."""
    return over_seeds(lambda b, g, n: b.commit(g, n), buffer.cursor.shape[0])(buffer, mc_returns, counts)


@partial(jax.jit, donate_argnames="buffer")
def prioritise(buffer: ReplayBuffer, slots: Array, priorities: Array) -> ReplayBuffer:
    """Give the rows in `slots` `[S, utd, B]` new `priorities` of the same shape."""
    return over_seeds(lambda b, s, p: b.prioritise(s, p), buffer.cursor.shape[0])(buffer, slots, priorities)


class LiveRing(struct.PyTreeNode):
    """The rings inside a program that plays, stores, draws and learns."""

    buffer: ReplayBuffer
    count: Array
    """Rows that were stored in each ring so far, `[]`."""

    def calls_due(self, env_steps: Array, online: OnlineConfig, window: int) -> Array:
        """Return the update calls that the environment step under way ends with, `[]` (`DeviceReplay.calls_due`)."""
        return jnp.where(self.count > (window - 1) * online.num_envs, online.calls_due(env_steps), 0)

    def add(self, rows: Batch, normalizer: Normalizer | None) -> "LiveRing":
        """Store one raw transition per environment, leaves `[S, N, ...]`."""
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)
        return LiveRing(stored(self.buffer, normalizer, flat), self.count + self.buffer.lanes)

    def source(self, offline: OfflineData | None, normalizer: Normalizer | None) -> Ring:
        """Return what an update call draws from; with `offline` that too."""
        return Ring(self.buffer, offline)

    def prioritise(self, slots: Array, priorities: Array) -> "LiveRing":
        """Give the rows in `slots` `[S, utd, B]` of the last draw new `priorities`."""
        return LiveRing(prioritise(self.buffer, slots, priorities), self.count)


class DeviceReplay:
    """A dataset, and from `begin` on one ring buffer per seed, on the device."""

    kind = "device"

    def __init__(self, data: OfflineData, seeds: int, most: int) -> None:
        """Serve `data` to `seeds` agents; a ring keeps at most `most` transitions of the run's own."""
        self.data, self.seeds, self.most = data, seeds, most
        self.buffer: ReplayBuffer | None = None
        self.planned = 0
        """Environment steps that the ring was allocated for."""
        self.added = 0
        """Transitions of the run's own, per seed."""
        self.appended = 0
        """Rows of the dataset that the ring began with."""
        self.returns: Returns | None = None
        self.waiting: list[list[tuple[float, float]]] = [[] for _ in range(seeds)]
        """(reward, mask) of each seed's rows that wait for the end of their episode."""
        self._mixed = False

    def dataset(self, keys: Array, at: int, count: int, sampling: Sampling) -> Iterator[tuple[BatchSource, int]]:
        """Yield (source, updates to run with it) for `count` updates on dataset rows, from gradient step `at` on."""
        yield DatasetRows(self.data), count

    def begin(
        self,
        keys: tuple[str, ...],
        steps: int,
        replay: str,
        returns: Returns | None,
        prioritised: bool = False,
        lanes: int = 1,
    ) -> None:
        """Allocate rings for `steps` environment steps per seed, with the batch keys `keys` beyond the usual five.

        `lanes` environments per seed take turns.

        `replay` "append": they begin with the dataset; "mixed": minibatches hold dataset rows too. `returns`: rows
        are hidden until their episode ends and their `mc_returns` are known. `prioritised`: rows are drawn by priority.
        """
        rows = {key: self.data.rows[key] for key in (*TRANSITION_KEYS, *keys, "ends")}
        self.appended = self.data.size if replay == "append" else 0
        capacity = capacity_for(steps, self.most) + self.appended
        buffer = ReplayBuffer.create(take(rows, 0), capacity + -capacity % lanes, prioritised, lanes)
        buffer = buffer.extend(take(rows, slice(None))) if self.appended else buffer
        self.buffer = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.seeds, *leaf.shape)).copy(), buffer)
        self.planned, self.returns, self._mixed = steps, returns, replay == "mixed"

    def source(self, keys: Array, at: int, sampling: Sampling) -> Ring:
        """Return what the update call of gradient step `at` draws from."""
        return self._ring()

    def _ring(self) -> Ring:
        assert self.buffer is not None
        return Ring(self.buffer, self.offline)

    def burst(self, keys: Array, at: int, count: int, sampling: Sampling) -> Iterator[tuple[BatchSource, int]]:
        """Yield (source, updates to run with it) for `count` updates without a step in between."""
        yield self.source(keys, at, sampling), count

    def batch_shapes(self, sampling: Sampling) -> Batch:
        """Return shapes and types of one seed's minibatches, leaves `[utd, B, ...]`."""
        source = DatasetRows(self.data) if self.buffer is None else self._ring()
        return batch_shapes(source, self.seeds, sampling)

    def add(self, rows: Batch, normalizer: Normalizer | None) -> None:
        """Store one raw transition per environment, leaves `[S * N, ...]`."""
        assert self.buffer is not None
        if self.returns is not None:
            rows = {**rows, "mc_returns": np.zeros(self.seeds, np.float32)}
            for seed, waiting in enumerate(self.waiting):
                waiting.append((float(rows["rewards"][seed]), float(rows["masks"][seed])))
        self.buffer = insert(self.buffer, normalizer, rows, pending=self.returns is not None)
        self.added += len(rows["rewards"]) // self.seeds

    def prioritise(self, slots: Array, priorities: Array) -> None:
        """Give the rows in `slots` `[S, utd, B]` of the last draw the `priorities` that an update found."""
        assert self.buffer is not None
        self.buffer = prioritise(self.buffer, slots, priorities)

    def reveal(self, ended: np.ndarray) -> None:
        """Let the waiting rows of seeds whose episode has `ended` `[S]` be drawn, with their returns-to-go.

        Raises `ConfigError` if an episode is longer than the ring.
        """
        if self.returns is None or self.buffer is None or not np.any(ended):
            return
        longest = max(len(self.waiting[seed]) for seed in np.flatnonzero(ended))
        if longest > self.buffer.capacity:
            raise ConfigError(f"an episode of {longest} steps does not fit the replay buffer; raise replay_capacity")
        length = 1 << max(longest - 1, 0).bit_length()  # a power of two: few shapes are compiled
        returns, counts = np.zeros((self.seeds, length), np.float32), np.zeros(self.seeds, np.int32)
        for seed in np.flatnonzero(ended):
            rewards, masks = np.asarray(self.waiting[seed], np.float32).reshape(-1, 2).T
            ends = np.zeros(len(rewards), np.float32)
            ends[-1:] = 1.0
            discount, failure = self.returns.discount, self.returns.failure
            returns[seed, : len(rewards)] = monte_carlo_returns(rewards, masks, ends, discount, failure)
            counts[seed], self.waiting[seed] = len(rewards), []
        if counts.any():
            self.buffer = commit(self.buffer, returns, counts)

    @property
    def visible(self) -> int:
        """Rows that can be drawn, of the seed that has the fewest."""
        return self.appended + self.added - max(map(len, self.waiting))

    def calls_due(self, env_steps: int, online: OnlineConfig, window: int) -> int:
        """Return the update calls that the environment step under way ends with; none before a window can be drawn."""
        drawable = self.visible > (window - 1) * online.num_envs
        return online.calls_due(env_steps) if drawable else 0

    def live(self) -> LiveRing:
        """Return the rings as a program takes them that plays too; `settle` takes them back."""
        assert self.buffer is not None
        return LiveRing(self.buffer, jnp.int32(self.appended + self.added))

    @property
    def offline(self) -> OfflineData | None:
        """The dataset, where minibatches hold rows of it online too."""
        return self.data if self._mixed else None

    def settle(self, live: LiveRing, rows: int) -> None:
        """Take back what a program has stored `rows` transitions per seed in."""
        self.buffer, self.added = live.buffer, self.added + rows

    def mark_ends(self, where: np.ndarray) -> None:
        """Make the newest row the last of its episode where `where` `[S * N]` is true."""
        if self.buffer is not None:
            self.buffer = self.buffer.mark_ends(where)

    def missing(self, steps: int) -> int:
        """Return how many rows the ring lacks for `steps` environment steps."""
        return max(capacity_for(steps, self.most) - capacity_for(self.planned, self.most), 0)

    def grow(self, steps: int) -> None:
        """Make room for `steps` environment steps, if the ring was allocated for fewer."""
        if self.buffer is None or steps <= self.planned:
            return
        if more := self.missing(steps):
            self.buffer = self.buffer.grown(self.buffer.capacity + more + -more % self.buffer.lanes)
        self.planned = steps

    def arrays(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the replay, by name."""
        return {} if self.buffer is None else {"buffer": self.buffer}

    def state(self) -> dict[str, Any]:
        """Return the host values that go with `arrays`, JSON-able."""
        waiting = self.waiting if self.returns is not None else []
        return {"kind": self.kind, "planned": self.planned, "added": self.added, "waiting": waiting}

    def restore(self, arrays: dict[str, Any], state: dict[str, Any]) -> None:
        """Go on from the `arrays` and the `state` of a checkpoint, once begun."""
        self.buffer, self.added = arrays["buffer"], state["added"]
        if self.returns is not None:
            self.waiting = [[(reward, mask) for reward, mask in rows] for rows in state["waiting"]]

    def spread(self, everywhere: Callable[[Any], Any], by_seed: Callable[[Any], Any]) -> None:
        """Place the dataset on every device of the run, and rings by seed."""
        self.data, self.buffer = everywhere(self.data), by_seed(self.buffer)

    def look_only(self) -> None:
        """Refuse to store anything: the run was opened to be looked at. Nothing to do where rows are on the device."""

    def sync(self) -> None:
        """Wait until what a checkpoint refers to is on the disk; nothing is where rows are on the device."""

    def close(self) -> None:
        """Release threads and files; there are none."""
