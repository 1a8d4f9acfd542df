"""Replay on the device: pytrees of arrays, sampled inside the jit.

`ReplayBuffer` is a ring of transitions in order of time. Its newest `pending` rows are stored but not sampled: an agent
that needs Monte-Carlo returns sees an episode only once it has ended (the WSRL repository's Cal-QL loop).
`OfflineData` is a fixed dataset, one or several sources with weights. `sample_minibatches` joins the two so that every
minibatch has exactly its share of dataset rows, for any UTD (RLPD interleaves them).

Both also give windows of rows in a row, cut at any offset. A window joins neither rows over the ring's cursor nor two
sources; behind an episode's end its rows are marked invalid.

A ring may have priorities, by which it draws. They are set anew for the rows that an update has learnt from.

Both give the action of the next step to an agent that needs it, under the keys `FOLLOWING`. The dataset's are made once
(`following_actions`); the ring looks at the row behind each drawn one and stores nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.data.rows import Indexed
from o2o.errors import ConfigError, DatasetError
from o2o.types import Array, Batch

TRANSITION_KEYS = ("observations", "actions", "rewards", "masks", "next_observations")
FOLLOWING = ("next_actions", "next_valid")
"""`next_actions [..., A]`: the action executed in the next step of the same episode. `next_valid [...]`: 1 where there
is one. Both are 0 in the last row of an episode, and in the newest row of an episode under way."""


class Frames(struct.PyTreeNode):
    """Rows `[N, ...]` that are frames of an array `[F, ...]` on the device: `frames[index]`, or the first N of them.

    A dataset's observations and next observations share one. Reads like an array: `shape`, `dtype`, `x[i]`.
    """

    frames: Array
    index: Array | None
    size: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows `[N, ...]`."""
        return (self.size, *self.frames.shape[1:])

    @property
    def dtype(self) -> Any:
        """The type of the numbers."""
        return self.frames.dtype

    def __getitem__(self, rows: Any) -> Array:
        """Return rows by number, mask or slice."""
        if self.index is not None:
            return self.frames[self.index[rows]]
        return (self.frames[: self.size] if isinstance(rows, slice) else self.frames)[rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all rows in host memory."""
        return np.asarray(self[:], dtype)


def take(rows: Batch, index: Any) -> Batch:
    """Return the rows `index` of entries that are arrays or `Frames`."""
    return jax.tree.map(lambda leaf: leaf[index], rows, is_leaf=lambda leaf: isinstance(leaf, Frames))


def one_row(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return shape and type of a single row of entries that are arrays, `Frames` or `Indexed`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
        dict(rows),
        is_leaf=lambda leaf: isinstance(leaf, Frames),
    )


def _on_device(now: Any, after: Any) -> tuple[Any, Any]:
    """Return observations and next observations on the device: as `Frames` where they share theirs on the host."""
    if isinstance(now, Mapping):
        pairs = {key: _on_device(now[key], after[key]) for key in now}
        return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}
    if isinstance(after, Indexed) and after.heads(now):
        frames = jax.device_put(after.frames)
        return Frames(frames, None, len(now)), Frames(frames, jnp.asarray(after.index), len(now))
    return jnp.asarray(now), jnp.asarray(after)


def _windows(batch: Batch, inside: Array) -> Batch:
    """Add `valid` to windows `[..., W]`: 1 up to and including the first end, while `inside [..., W]`."""
    ends = batch["ends"].astype(jnp.float32)
    ended_before = jnp.cumsum(ends, axis=-1) - ends
    return {**batch, "ends": ends, "valid": ((ended_before == 0) & inside).astype(jnp.float32)}


def following_actions(actions: Any, ends: Any) -> Batch:
    """Return the columns `FOLLOWING` for `actions [N, A]` in order of time; `ends [N]` is 1 at the end of each episode.

    No row lies behind the last one, so it has no next action, whatever its `ends` says.
    """
    valid = 1.0 - jnp.asarray(ends, jnp.float32).at[-1].set(1.0)
    return {"next_actions": valid[:, None] * jnp.roll(jnp.asarray(actions), -1, axis=0), "next_valid": valid}


class OfflineData(struct.PyTreeNode):
    """A dataset resident on the device: leaves `[N, ...]`, sources `[K]` with the probability of each."""

    rows: Batch
    starts: Array
    sizes: Array
    logits: Array

    @classmethod
    def create(
        cls, rows: Mapping[str, Any], needs: Sequence[str] = (), sources: Sequence[tuple[int, int, float]] = ()
    ) -> Self:
        """Move the transition keys and `needs` to the device; `sources` are (start, size, weight), default one.

        Next actions that are needed and not among `rows` are made from the actions and `ends`.
        Raises `DatasetError` if a needed key is absent.
        """
        made = FOLLOWING if "ends" in rows else ()
        missing = [key for key in (*TRANSITION_KEYS, *needs) if key not in (*rows, *made)]
        if missing:
            raise DatasetError(
                f"dataset has no {', '.join(missing)}, which the agent needs; found {', '.join(sorted(rows))}: "
                "load it with o2o.data.datasets.load, which computes them"
            )
        table = list(sources) or [(0, len(rows["rewards"]), 1.0)]
        if "ends" in rows:  # the next source, or what an agent appends, begins a new episode
            last = jnp.asarray([start + size - 1 for start, size, _ in table])
            rows = {**rows, "ends": jnp.asarray(rows["ends"]).at[last].set(True)}
        if set(made) & set(needs):
            rows = {**following_actions(rows["actions"], rows["ends"]), **rows}
        now, after = _on_device(rows["observations"], rows["next_observations"])
        kept = {key: jnp.asarray(rows[key]) for key in (*TRANSITION_KEYS, *needs) if not key.endswith("observations")}
        kept |= {"observations": now, "next_observations": after}
        weights = np.asarray([weight for _, _, weight in table], np.float64)
        with np.errstate(divide="ignore"):
            logits = np.log(weights / weights.sum())
        return cls(
            rows=kept,
            starts=jnp.asarray([start for start, _, _ in table], jnp.int32),
            sizes=jnp.asarray([size for _, size, _ in table], jnp.int32),
            logits=jnp.asarray(logits, jnp.float32),
        )

    @property
    def size(self) -> int:
        """Number of rows N."""
        return self.rows["rewards"].shape[0]

    def sample(self, rng: Array, shape: tuple[int, ...]) -> Batch:
        """Draw rows uniformly with replacement (within a source drawn by weight); leaves `[*shape, ...]`."""
        if self.starts.shape[0] == 1:
            indices = jax.random.randint(rng, shape, 0, self.size)
        else:
            source_rng, row_rng = jax.random.split(rng)
            source = jax.random.categorical(source_rng, self.logits, shape=shape)
            indices = self.starts[source] + jax.random.randint(row_rng, shape, 0, self.sizes[source])
        return take(self.rows, indices)

    def sample_sequences(self, rng: Array, shape: tuple[int, ...], horizon: int) -> Batch:
        """Draw windows of `horizon` rows in a row, leaves `[*shape, horizon, ...]`, each in one source; needs `ends`.

        `valid [*shape, horizon]` is 1 up to and including the first row with `ends` = 1, and 0 behind it; also 0 behind
        the last row of a source that is shorter than the window.
        """
        first, size = jnp.zeros((), jnp.int32), jnp.asarray(self.size, jnp.int32)
        if self.starts.shape[0] > 1:
            source_rng, rng = jax.random.split(rng)
            source = jax.random.categorical(source_rng, self.logits, shape=shape)
            first, size = self.starts[source], self.sizes[source]
        begin = jax.random.randint(rng, shape, 0, jnp.maximum(size - horizon + 1, 1))
        positions = begin[..., None] + jnp.arange(horizon)
        inside = positions < size[..., None]
        slots = jnp.where(inside, first[..., None] + positions, self.size - 1)
        return _windows(take(self.rows, slots), inside)

    def draw(self, rng: Array, shape: tuple[int, ...], window: int = 1) -> Batch:
        """Draw what an agent with this `window` learns from: rows, or windows of them (`window` > 1)."""
        return self.sample(rng, shape) if window == 1 else self.sample_sequences(rng, shape, window)


BLOCK = 1024
"""Weights that are summed together."""


def draw_by_weight(rng: Array, weights: Array, shape: tuple[int, ...]) -> Array:
    """Draw indices `shape` of `weights [N]`, i with probability w_i / sum of w, and never one of weight 0.

    A block of rows is drawn first and then a row of it: one float32 sum over all rows would be too coarse.
    """
    block_rng, row_rng = jax.random.split(rng)
    blocks = jnp.pad(weights, (0, -weights.shape[0] % BLOCK)).reshape(-1, BLOCK)
    block = _index_at(jax.random.uniform(block_rng, shape), blocks.sum(axis=1))
    return block * BLOCK + _index_at(jax.random.uniform(row_rng, shape), blocks[block])


def _index_at(share: Array, weights: Array) -> Array:
    """Return the first index `[...]` at which the running sum of `weights [..., n]` exceeds `share` of its total."""
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -1.0)  # rounded ones need not rise from row to row
    return jnp.argmax(sums > (share * sums.max(axis=-1))[..., None], axis=-1)


SMALLEST_BUFFER = 10_000
"""Rows allocated for a shorter run, so that it can go on and hold whole episodes."""


def capacity_for(steps: int, most: int) -> int:
    """Return the rows to allocate for a run of so many steps that keeps `most` of its own."""
    return min(most, max(steps, SMALLEST_BUFFER))


def check_window(agent: Any, rows: int, place: str) -> None:
    """Raise `ConfigError` if `place` can hold fewer `rows` than the agent wants in a row."""
    if agent.needs.window > rows:
        raise ConfigError(
            f"the agent learns from {agent.needs.window} steps in a row, {place} holds {rows}; shorten its chunk or "
            "horizon, or give it more data"
        )


class ReplayBuffer(struct.PyTreeNode):
    """A ring of transitions, leaves `[capacity, ...]`; all methods are pure and jit-able."""

    rows: Batch
    cursor: Array
    size: Array
    pending: Array
    following: tuple[str, ...] = struct.field(pytree_node=False, default=())
    """Which of `FOLLOWING` a draw gives."""
    lanes: int = struct.field(pytree_node=False, default=1)
    """Environments whose rows take turns: the next step of an episode lies so many rows behind."""
    priorities: Array | None = None
    """`[capacity]`, what rows are drawn in proportion to, 0 in empty slots; None: they are drawn evenly."""

    @classmethod
    def create(cls, example: Batch, capacity: int, prioritised: bool = False, lanes: int = 1) -> Self:
        """Allocate `capacity` rows shaped like one `example` transition (leaves without a leading axis).

        Of `FOLLOWING` those in the example are given by every draw; this takes `ends`. If `prioritised`, draws give
        `slots` and `odds` too (`o2o.types.Needs.priorities`).
        """
        if capacity < 1:
            raise ConfigError(f"replay capacity is {capacity}; it must be at least 1")
        stored = {key: leaf for key, leaf in example.items() if key not in FOLLOWING}
        rows = jax.tree.map(lambda leaf: jnp.zeros((capacity, *np.shape(leaf)), jnp.asarray(leaf).dtype), stored)
        zero = jnp.zeros((), jnp.int32)
        following = tuple(key for key in FOLLOWING if key in example)
        priorities = jnp.zeros(capacity) if prioritised else None
        return cls(rows, zero, zero, zero, following, lanes, priorities)

    @property
    def capacity(self) -> int:
        """Rows the ring can hold."""
        return self.rows["rewards"].shape[-1]

    def add(self, row: Batch, pending: bool = False) -> Self:
        """Store one transition (leaves without a leading axis); `pending` hides it until `commit`."""
        rows = jax.tree.map(
            lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, jnp.asarray(new, leaf.dtype), self.cursor, 0),
            self.rows,
            {key: row[key] for key in self.rows},
        )
        return self.replace(
            rows=rows,
            priorities=self._with_new(self.cursor),
            cursor=(self.cursor + 1) % self.capacity,
            size=jnp.minimum(self.size + 1, self.capacity),
            pending=jnp.minimum(self.pending + 1, self.capacity) if pending else self.pending,
        )

    def extend(self, rows: Batch) -> Self:
        """Store `[N, ...]` transitions in order; N must not exceed the capacity."""
        count = rows["rewards"].shape[0]
        if count > self.capacity:
            raise ConfigError(
                f"{count} rows do not fit a replay buffer of capacity {self.capacity}; raise the capacity"
            )
        slots = (self.cursor + jnp.arange(count)) % self.capacity
        stored = jax.tree.map(
            lambda leaf, new: leaf.at[slots].set(jnp.asarray(new, leaf.dtype)),
            self.rows,
            {key: rows[key] for key in self.rows},
        )
        return self.replace(
            rows=stored,
            priorities=self._with_new(slots),
            cursor=(self.cursor + count) % self.capacity,
            size=jnp.minimum(self.size + count, self.capacity),
        )

    def _with_new(self, slots: Array) -> Array | None:
        """Return the priorities once new rows, which get the highest of all, are in `slots`; 1 if there is none."""
        if self.priorities is None:
            return None
        highest = jnp.max(self.priorities)
        return self.priorities.at[slots].set(jnp.where(highest > 0, highest, 1.0))

    def prioritise(self, slots: Array, priorities: Array) -> Self:
        """Give rows in `slots` new `priorities`, `[...]` both; one that stands there twice gets the higher one.

        Places behind the last slot are left out.
        """
        assert self.priorities is not None
        cleared = self.priorities.at[slots].set(0.0, mode="drop")
        return self.replace(priorities=cleared.at[slots].max(priorities, mode="drop"))

    def commit(self, mc_returns: Array, count: Array) -> Self:
        """Show the newest `count` rows and give them their returns-to-go `mc_returns [L]` (padded behind `count`).

        An episode longer than the ring keeps its newest rows.
        """
        offsets = jnp.arange(mc_returns.shape[0])
        stored_still = (offsets < count) & (offsets >= count - self.capacity)
        slots = jnp.where(stored_still, (self.cursor - count + offsets) % self.capacity, self.capacity)
        stored = self.rows["mc_returns"].at[slots].set(mc_returns, mode="drop")
        return self.replace(rows={**self.rows, "mc_returns": stored}, pending=jnp.maximum(self.pending - count, 0))

    def grown(self, capacity: int) -> Self:
        """Return buffers stacked `[S]`, equally full, with room for `capacity` rows instead of fewer."""
        more, full = capacity - self.capacity, int(self.size[0]) == self.capacity
        shift = -int(self.cursor[0]) if full else 0  # the oldest row comes first

        def wider(leaf: Array) -> Array:
            return jnp.pad(jnp.roll(leaf, shift, axis=1), [(0, 0), (0, more), *((0, 0) for _ in leaf.shape[2:])])

        rows, priorities = jax.tree.map(wider, (self.rows, self.priorities))
        return self.replace(rows=rows, priorities=priorities, cursor=jnp.copy(self.size) if full else self.cursor)

    def mark_ends(self, where: Any) -> Self:
        """Of buffers stacked `[S]`: end the episodes of the newest rows (`ends` = 1) where `where` `[S * lanes]` is."""
        ends = self.rows["ends"]
        newest = (self.cursor[:, None] - self.lanes + jnp.arange(self.lanes)) % ends.shape[1]
        given = jnp.asarray(where, ends.dtype).reshape(newest.shape)
        return self.replace(rows={**self.rows, "ends": ends.at[jnp.arange(len(ends))[:, None], newest].max(given)})

    @property
    def visible(self) -> Array:
        """Number of rows that can be sampled, `[]`."""
        return self.size - self.pending

    def _slots(self, age_order: Array) -> Array:
        """Map positions in order of age (0 = oldest) to ring slots."""
        return (self.cursor - self.size + age_order) % self.capacity

    def _take(self, age_order: Array) -> Batch:
        """Return the rows at positions `[...]` in order of age, with their next actions where they are wanted."""
        slots = self._slots(age_order)
        batch = jax.tree.map(lambda leaf: leaf[slots], self.rows)
        if not self.following:
            return batch
        valid = jnp.where(age_order + self.lanes < self.size, 1.0 - batch["ends"], 0.0)
        actions = self.rows["actions"][self._slots(age_order + self.lanes)]
        made = {"next_actions": valid[..., None] * actions, "next_valid": valid}
        return {**batch, **{key: made[key] for key in self.following}}

    def _draw_ages(self, rng: Array, shape: tuple[int, ...], count: Array) -> tuple[Array, Batch]:
        """Draw positions in order of age below `count`, evenly or by priority, and what to say of such a draw."""
        if self.priorities is None:
            return jax.random.randint(rng, shape, 0, count), {}
        ages = (jnp.arange(self.capacity) - self.cursor + self.size) % self.capacity
        weights = jnp.where(ages < count, self.priorities, 0.0)
        slots = draw_by_weight(rng, weights, shape)
        return ages[slots], {"slots": slots, "odds": weights[slots] * count / jnp.sum(weights)}

    def sample(self, rng: Array, shape: tuple[int, ...]) -> Batch:
        """Draw visible rows with replacement, evenly or by priority; leaves `[*shape, ...]`. There must be one."""
        ages, told = self._draw_ages(rng, shape, jnp.maximum(self.visible, 1))
        return {**self._take(ages), **told}

    def sample_sequences(self, rng: Array, shape: tuple[int, ...], horizon: int) -> Batch:
        """Draw windows of `horizon` steps in a row, leaves `[*shape, horizon, ...]`, which never cross the cursor.

        `valid [*shape, horizon]` is 1 up to and including the first row with `ends` = 1, and 0 behind it; also 0 where
        fewer than `horizon` rows are visible.
        """
        starts, told = self._draw_ages(rng, shape, jnp.maximum(self.visible - (horizon - 1) * self.lanes, 1))
        positions = starts[..., None] + jnp.arange(horizon) * self.lanes
        return {**_windows(self._take(positions), positions < self.visible), **told}

    def draw(self, rng: Array, shape: tuple[int, ...], window: int = 1) -> Batch:
        """Draw what an agent with this `window` learns from: rows, or windows of them (`window` > 1)."""
        return self.sample(rng, shape) if window == 1 else self.sample_sequences(rng, shape, window)


def sample_minibatches(
    rng: Array,
    offline: OfflineData | None,
    buffer: ReplayBuffer,
    utd_ratio: int,
    batch_size: int,
    offline_ratio: float,
    window: int = 1,
) -> Batch:
    """Draw `[utd, B, ...]`; with `offline`, each minibatch begins with round(B * offline_ratio) dataset rows.

    With `window` W > 1 the leaves are `[utd, B, W, ...]`, and `ends` and `valid` `[utd, B, W]` come with them. Of a
    buffer with priorities come `slots` and `odds` `[utd, B]`: behind the last slot, and 1, for dataset rows.
    """
    keys = [key for key in (*buffer.rows, *buffer.following) if key != "ends"]
    keys += ["ends", "valid"] if window > 1 else []
    keys += [] if buffer.priorities is None else ["slots", "odds"]
    offline_rows = 0 if offline is None else round(batch_size * offline_ratio)
    offline_rng, online_rng = jax.random.split(rng)
    parts = []
    if offline is not None and offline_rows:
        shape = (utd_ratio, offline_rows)
        rows = offline.draw(offline_rng, shape, window)
        even = {"slots": jnp.full(shape, buffer.capacity), "odds": jnp.ones(shape)}
        parts.append(rows if buffer.priorities is None else {**rows, **even})
    if offline_rows < batch_size:
        parts.append(buffer.draw(online_rng, (utd_ratio, batch_size - offline_rows), window))
    return {
        key: jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *(p[key] for p in parts)) for key in keys
    }
