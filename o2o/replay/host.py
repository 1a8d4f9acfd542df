"""Data too large for the device: observations in host memory, on disk where they grow, behind a prefetch thread.

The device keeps everything but the observations, and in their place a handle per row: -1 - i for row i of the dataset,
n for the run's own n-th transition. So a `DeviceReplay` of handles draws rows, windows and weights with the same code
and the same keys as a replay that lies on the device as a whole. What was drawn is then fetched.

While the device runs one update the thread fetches the rows of the next one: its key is known beforehand. Online the
guess assumes that one more row will have been stored. If that turns out wrong (an episode was revealed), the rows are
fetched again. Nothing depends on the thread's timing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from o2o.data.normalizer import Normalizer, normalize
from o2o.data.rows import Indexed
from o2o.errors import ConfigError, RunError
from o2o.nn.kernels import over_seeds
from o2o.replay.buffer import Frames, OfflineData, ReplayBuffer
from o2o.replay.device import DeviceReplay, Returns
from o2o.replay.row_store import ON_HOST, Handles, RowStore, begin_reading
from o2o.replay.source import BatchSource, DatasetRows, Fetched, Ring, Sampling
from o2o.types import Array, Batch, OnlineConfig


class HostData:
    """A dataset whose observations stay in host memory; `light` has handles in their place."""

    def __init__(self, light: OfflineData, heavy: Mapping[str, Any]) -> None:
        """Join the two; `heavy`: `ON_HOST`, leaves `[N, ...]` of NumPy arrays."""
        self.light = light
        self.heavy = {key: heavy[key] for key in ON_HOST}

    @classmethod
    def create(
        cls, rows: Mapping[str, Any], needs: Sequence[str] = (), sources: Sequence[tuple[int, int, float]] = ()
    ) -> Self:
        """Like `OfflineData.create`, observations left where they are."""
        handles = -1 - np.arange(len(rows["rewards"]), dtype=np.int32)
        light = OfflineData.create({**rows, **dict.fromkeys(ON_HOST, handles)}, needs, sources)
        return cls(light, {key: jax.tree.map(_here, rows[key]) for key in ON_HOST})

    @classmethod
    def take(cls, data: OfflineData) -> Self:
        """Bring a dataset's observations back from the device."""
        handles = -1 - jnp.arange(data.size, dtype=jnp.int32)
        shared: dict[int, np.ndarray] = {}

        def host(leaf: Any) -> Any:
            if not isinstance(leaf, Frames):
                return np.asarray(leaf)
            frames = shared.setdefault(id(leaf.frames), np.asarray(leaf.frames))
            return frames[: leaf.size] if leaf.index is None else Indexed(frames, np.asarray(leaf.index))

        heavy = {
            key: jax.tree.map(host, data.rows[key], is_leaf=lambda leaf: isinstance(leaf, Frames)) for key in ON_HOST
        }
        light = data.replace(rows={**data.rows, **{key: jnp.copy(handles) for key in ON_HOST}})
        return cls(light, heavy)

    @property
    def rows(self) -> Batch:
        """All rows, observations in host memory."""
        return {**self.light.rows, **self.heavy}

    @property
    def size(self) -> int:
        """Number of rows N."""
        return self.light.size

    def read(self, handles: Handles) -> dict[str, Any]:
        """Return the observations of handles `[...]`, leaves `[..., *row]`."""
        for leaf in jax.tree.leaves(self.heavy):
            begin_reading(leaf, -1 - handles)
        return jax.tree.map(lambda leaf: leaf[-1 - handles], self.heavy)


def _here(leaf: Any) -> Any:
    return leaf if isinstance(leaf, Indexed) else np.asarray(leaf)


@partial(jax.jit, static_argnames="sampling")
def _draw(source: DatasetRows | Ring, keys: Array, at: Array, *, sampling: Sampling) -> Batch:
    return source.minibatches(keys, at, sampling)


@partial(jax.jit, static_argnames=("sampling", "pending"))
def _draw_and_guess(
    source: Ring, keys: Array, at: Array, newest: Batch, *, sampling: Sampling, pending: bool
) -> tuple[Batch, Array]:
    """Return the batch of handles of gradient step `at`, and the handles that the next update call will draw.

    The guess assumes that one more row, with the handle behind that of `newest` `[S, ...]`, is stored by then.
    """

    def with_one_more(buffer: ReplayBuffer, row: Batch) -> ReplayBuffer:
        return buffer.add({**row, **{key: row[key] + 1 for key in ON_HOST}}, pending=pending)

    batch = source.minibatches(keys, at, sampling)
    following = source.replace(buffer=over_seeds(with_one_more, keys.shape[0])(source.buffer, newest))
    return batch, following.minibatches(keys, at + sampling.utd_ratio, sampling)["observations"]


_normalized = jax.jit(normalize)


class HostReplay:
    """A dataset and a ring per seed whose observations stay in host memory and in files."""

    kind = "host"

    def __init__(self, data: HostData, seeds: int, most: int, folder: Path | None, slack: int) -> None:
        """Serve `data`. The run's own observations go to files in `folder`; None: a temporary folder.

        The files hold `slack` rows more than the ring, so a checkpoint outlasts that many newer rows.
        """
        self.data, self.folder, self.slack = data, folder, max(slack, 1)
        self.handles = DeviceReplay(data.light, seeds, most)
        """The same replay, handles in place of observations."""
        self.store: RowStore | None = None
        self._look_only = False
        self._newest: Batch = {}
        self._pool = ThreadPoolExecutor(1, "o2o-prefetch")
        self._ahead: Future[tuple[Handles, dict[str, Any], bool]] | None = None

    @property
    def buffer(self) -> ReplayBuffer | None:
        """The rings on the device, leaves `[S, capacity, ...]`, handles in place of observations."""
        return self.handles.buffer

    def dataset(self, keys: Array, at: int, count: int, sampling: Sampling) -> Iterator[tuple[BatchSource, int]]:
        """Yield (source, updates to run with it) for `count` updates on dataset rows, from gradient step `at` on."""
        return self._prefetched(DatasetRows(self.data.light), keys, at, count, sampling, self.data.read)

    def burst(self, keys: Array, at: int, count: int, sampling: Sampling) -> Iterator[tuple[BatchSource, int]]:
        """Yield (source, updates to run with it) for `count` updates without a step in between."""
        return self._prefetched(self.handles.source(keys, at, sampling), keys, at, count, sampling, self._read)

    def _prefetched(
        self,
        source: DatasetRows | Ring,
        keys: Array,
        at: int,
        count: int,
        sampling: Sampling,
        read: Callable[[Handles], dict[str, Any]],
    ) -> Iterator[tuple[BatchSource, int]]:
        def fetched(light: Batch) -> Batch:
            return {**light, **jax.device_put(read(np.asarray(light["observations"])))}

        ahead = self._pool.submit(fetched, _draw(source, keys, at, sampling=sampling))
        for index in range(1, count + 1):
            batch = ahead.result()
            if index < count:
                light = _draw(source, keys, at + index * sampling.utd_ratio, sampling=sampling)
                ahead = self._pool.submit(fetched, light)
            yield Fetched(batch), 1

    def begin(
        self,
        keys: tuple[str, ...],
        steps: int,
        replay: str,
        returns: Returns | None,
        prioritised: bool = False,
        lanes: int = 1,
    ) -> None:
        """Allocate rings for `steps` environment steps per seed, and the files (see `DeviceReplay.begin`).

        Raises `ConfigError` for several environments per seed.
        """
        if lanes > 1:
            raise ConfigError(
                f"online.num_envs is {lanes}, and a replay in host memory takes one environment per seed: raise "
                "device_bytes, or set num_envs to 1"
            )
        self.handles.begin(keys, steps, replay, returns, prioritised)
        assert self.handles.buffer is not None
        seeds, capacity = self.handles.seeds, self.handles.buffer.capacity
        example = jax.tree.map(lambda leaf: np.broadcast_to(leaf[0], (seeds, *leaf.shape[1:])), self.data.heavy)
        self.store, self._ahead = RowStore(self.folder, example, capacity, self.slack), None

    def batch_shapes(self, sampling: Sampling) -> Batch:
        """Return shapes and types of one seed's minibatches, leaves `[utd, B, ...]`."""
        light = self.handles.batch_shapes(sampling)

        def whole(key: str) -> Any:
            lead = light[key].shape
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape[1:]), leaf.dtype), self.data.heavy[key]
            )

        return {**light, **{key: whole(key) for key in ON_HOST}}

    def add(self, rows: Batch, normalizer: Normalizer | None) -> None:
        """Store one raw transition per seed, leaves `[S, ...]`.

        Raises `RunError` if the run was opened to be looked at only, or the disk is full.
        """
        assert self.store is not None
        if self._look_only:
            raise RunError(
                f"this run was opened to be looked at, and {self.folder} is part of its checkpoints: go on by "
                "`o2o resume`, or with a copy of the run folder"
            )
        kept = {key: jax.tree.map(np.asarray, _normalized(normalizer, rows[key])) for key in ON_HOST}
        self._newest = {**rows, **dict.fromkeys(ON_HOST, self.store.add(kept))}
        self.handles.add(self._newest, None)
        if self.handles.returns is not None:
            self._newest["mc_returns"] = np.zeros(self.handles.seeds, np.float32)

    def source(self, keys: Array, at: int, sampling: Sampling) -> Fetched:
        """Return the batch of gradient step `at`; the rows of the next one are fetched meanwhile.

        Not of a draw by priorities, which the update is still to give.
        """
        assert self.store is not None
        ring, pending = self.handles.source(keys, at, sampling), self.handles.returns is not None
        newest = {key: self._newest[key] for key in ring.buffer.rows}
        batch, guess = _draw_and_guess(ring, keys, at, newest, sampling=sampling, pending=pending)
        batch = {**batch, **self._fetched(np.asarray(batch["observations"]))}
        if ring.buffer.priorities is None:
            self._ahead = self._pool.submit(self._fetch_ahead, guess, self.store.total)
        return Fetched(batch)

    def _read(self, handles: Handles, until: int | None = None) -> dict[str, Any]:
        assert self.store is not None
        return self.store.read(handles, self.data.heavy, self.store.total if until is None else until)

    def _fetch_ahead(self, guess: Any, until: int) -> tuple[Handles, dict[str, Any], bool]:
        """Fetch the rows that the next step will draw; on the device, unless the one it will store is among them."""
        handles = np.asarray(guess)
        whole = not np.any(handles == until)
        rows = self._read(handles, until)
        return handles, jax.device_put(rows) if whole else rows, whole

    def _fetched(self, handles: Handles) -> dict[str, Any]:
        """Return the rows of `handles`: those that the thread has fetched, if they are the same."""
        assert self.store is not None
        ahead, self._ahead = self._ahead, None
        guess, rows, whole = ahead.result() if ahead is not None else (None, {}, False)
        if guess is None or not np.array_equal(guess, handles):
            return jax.device_put(self._read(handles))
        if whole:
            return rows
        new = handles == self.store.total - 1
        seed = np.broadcast_to(np.arange(len(handles)).reshape(-1, *(1,) * (handles.ndim - 1)), handles.shape)[new]
        newest = self._read(handles.reshape(len(handles), -1)[:, :1] * 0 + self.store.total - 1)
        for old, row in zip(jax.tree.leaves(rows), jax.tree.leaves(newest), strict=True):
            old[new] = row[seed, 0]
        return jax.device_put(rows)

    def prioritise(self, slots: Array, priorities: Array) -> None:
        """Give the rows in `slots` `[S, utd, B]` of the last draw the `priorities` that an update found."""
        self.handles.prioritise(slots, priorities)

    def reveal(self, ended: np.ndarray) -> None:
        """Let the waiting rows of seeds whose episode has `ended` `[S]` be drawn (see `DeviceReplay.reveal`)."""
        self.handles.reveal(ended)

    def calls_due(self, env_steps: int, online: OnlineConfig, window: int) -> int:
        """Return the update calls that the environment step under way ends with."""
        return self.handles.calls_due(env_steps, online, window)

    def mark_ends(self, where: np.ndarray) -> None:
        """Make the newest row the last of its episode where `where` `[S]` is true."""
        self.handles.mark_ends(where)

    def grow(self, steps: int) -> None:
        """Raise `ConfigError` if the ring was allocated for fewer than `steps`: one on disk cannot grow."""
        if self.handles.buffer is not None and self.handles.missing(steps):
            planned = self.handles.planned
            raise ConfigError(
                f"the online phase was begun for {planned} steps, and a replay in host memory cannot grow to {steps}: "
                f"call begin_online({steps}) before the first step"
            )
        self.handles.grow(steps)

    def arrays(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the replay, by name; the observations are in the files."""
        return self.handles.arrays()

    def state(self) -> dict[str, Any]:
        """Return the host values that go with `arrays`, JSON-able."""
        return {**self.handles.state(), "kind": self.kind}

    def restore(self, arrays: dict[str, Any], state: dict[str, Any]) -> None:
        """Go on behind the newest row of a checkpoint's `arrays` and `state`."""
        assert self.store is not None
        self.handles.restore(arrays, state)
        buffer = arrays["buffer"]
        handles, cursor = np.asarray(buffer.rows["observations"]), int(buffer.cursor[0])
        newest = int(handles[0, cursor - 1]) if int(buffer.size[0]) else -1
        self.store.total, self._ahead = max(newest + 1, 0), None

    def spread(self, everywhere: Callable[[Any], Any], by_seed: Callable[[Any], Any]) -> None:
        """Place the handles: the dataset's on every device of the run, those of the rings by seed."""
        self.handles.spread(everywhere, by_seed)

    def look_only(self) -> None:
        """Refuse to store anything from now on: the files belong to a run that somebody else may be training."""
        self._look_only = True

    def sync(self) -> None:
        """Wait until the run's own rows are on the disk: a checkpoint refers to them."""
        if self.store is not None:
            self.store.sync()

    def close(self) -> None:
        """End the thread. A temporary folder vanishes with the store."""
        self._pool.shutdown(cancel_futures=True)
        self._ahead, self.store = None, None
