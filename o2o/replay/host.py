"""Data too large for the device: observations in host memory, on disk where they grow, behind a prefetch thread.

The device keeps all of `OfflineData` and `ReplayBuffer` but the observations, and in their place a handle per row:
-1 - i for row i of the dataset, n for the run's own n-th transition. So what is drawn, windows and weights included, is
drawn by the same code from the same keys as with everything on the device. `HostReplay` has the programs of
`o2o.train.programs`, those that draw cut in two: the draw gives handles, the rows are fetched, the update gets them.

While the device runs one update the thread fetches the rows of the next, whose draw is known beforehand: keys form a
chain that no update enters. Online it assumes that one more row will have been stored; where that turns out wrong (an
episode was committed) the rows are fetched again. Nothing depends on the thread's timing.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from o2o.data.normalizer import Normalizer, normalize
from o2o.errors import ConfigError, RunError
from o2o.replay.buffer import TRANSITION_KEYS, OfflineData, ReplayBuffer, capacity_for
from o2o.replay.row_store import ON_HOST, Handles, RowStore, begin_reading
from o2o.rl.chunks import planned_in_turn
from o2o.train import programs as dispatch
from o2o.train.programs import OnlineMode, OnlineState, over_seeds
from o2o.types import Array, Batch, Info

if TYPE_CHECKING:
    from o2o.train.trainer import Trainer

CPU_BYTES = 8 * 2**30


def device_limit(device_bytes: int | None) -> int:
    """Return the bytes that dataset and replay may take: the given ones; None: half the device's, 8 GiB on a CPU."""
    if device_bytes is not None:
        return device_bytes
    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] // 2 if "bytes_limit" in stats else CPU_BYTES


def place(
    rows: Mapping[str, Any],
    needs: Sequence[str],
    sources: Sequence[tuple[int, int, float]],
    device_bytes: int | None,
) -> "OfflineData | HostData":
    """Return a dataset on the device, or its observations left in host memory if it takes more than `device_bytes`."""
    large = row_bytes({key: rows[key] for key in (*TRANSITION_KEYS, *needs) if key in rows}) * len(rows["rewards"])
    return (HostData if large > device_limit(device_bytes) else OfflineData).create(rows, needs, sources)


def make_room(
    data: "OfflineData | HostData", replay_rows: int, device_bytes: int | None, host: bool | None = None
) -> "OfflineData | HostData":
    """Return `data`, its observations in host memory if with `replay_rows` of replay it is too large for the device.

    `host` decides it where not None: a checkpoint goes on as it was begun.
    """
    if isinstance(data, HostData):
        return data
    large = row_bytes(data.rows) * (data.size + replay_rows) > device_limit(device_bytes)
    return HostData.take(data) if (large if host is None else host) else data


def missing_rows(planned: int, steps: int, most: int) -> int:
    """Return how many rows a replay made for `planned` steps, `most` of which it keeps, lacks for `steps` of them."""
    return max(capacity_for(steps, most) - capacity_for(planned, most), 0)


def extend_room(trainer: "Trainer", steps: int) -> None:
    """Make room in a trainer's replay buffer for so many environment steps, if it was allocated for fewer."""
    state, planned = trainer.online_state, trainer.planned
    if steps <= planned or state is None or not isinstance(state.buffer, ReplayBuffer):
        return
    more = missing_rows(planned, steps, trainer.loop.replay_capacity)
    if more and isinstance(trainer.programs, HostReplay):
        raise ConfigError(
            f"the online phase was begun for {planned} steps, and a replay in host memory cannot grow to {steps}: call "
            f"begin_online({steps}) before the first step"
        )
    trainer.planned = steps
    if more:
        trainer.online_state = state._replace(buffer=state.buffer.grown(state.buffer.capacity + more))


def row_bytes(rows: Mapping[str, Any]) -> int:
    """Return the bytes of one row of `rows`, leaves `[N, ...]`."""
    return sum(int(np.prod(leaf.shape[1:])) * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(rows)))


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
        return cls(light, {key: jax.tree.map(np.asarray, rows[key]) for key in ON_HOST})

    @classmethod
    def take(cls, data: OfflineData) -> Self:
        """Bring a dataset's observations back from the device."""
        handles = -1 - jnp.arange(data.size, dtype=jnp.int32)
        heavy = {key: jax.tree.map(np.asarray, data.rows[key]) for key in ON_HOST}
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

    def batch_shapes(self, shape: tuple[int, ...], window: int = 1) -> Batch:
        """Return the shapes and types of what a draw of `shape` gives an agent with this `window`."""
        light = self.light.batch_shapes(shape, window)

        def whole(key: str) -> Any:
            lead = light[key].shape
            shape = lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
            return jax.tree.map(shape, self.heavy[key])

        return {**light, **{key: whole(key) for key in ON_HOST}}

    def read(self, handles: Handles) -> dict[str, Any]:
        """Return the observations of handles `[...]`, leaves `[..., *row]`."""
        for leaf in jax.tree.leaves(self.heavy):
            begin_reading(leaf, -1 - handles)
        return jax.tree.map(lambda leaf: leaf[-1 - handles], self.heavy)


@partial(jax.jit, static_argnames=("seeds", "batch_size", "window"))
def _draw_offline(rng: Array, data: OfflineData, *, seeds: int, batch_size: int, window: int) -> tuple[Array, Batch]:
    def one_seed(rng: Array) -> tuple[Array, Batch]:
        rng, key = jax.random.split(rng)
        return rng, data.draw(key, (1, batch_size), window)

    return over_seeds(one_seed, seeds)(rng)


@partial(jax.jit, static_argnames="mode")
def _draw_online(
    rng: Array, offline: OfflineData | None, buffer: ReplayBuffer, *, mode: OnlineMode
) -> tuple[Array, Batch]:
    def one_seed(rng: Array, buffer: ReplayBuffer) -> tuple[Array, Batch]:
        rng, key = jax.random.split(rng)
        return rng, mode.draw(key, offline, buffer, 1)

    return over_seeds(one_seed, mode.seeds)(rng, buffer)


@partial(jax.jit, static_argnames="seeds", donate_argnames="agent")
def _update(agent: Any, batch: Batch, totals: Info, *, seeds: int) -> tuple[Any, Info]:
    return dispatch.updated(agent, totals, batch, seeds)


@partial(jax.jit, static_argnames="mode")
def _draw_step(
    buffer: ReplayBuffer, rng: Array, offline: OfflineData | None, rows: Batch, *, mode: OnlineMode
) -> tuple[Array, Array, Batch, Array | None]:
    """Draw behind the insertion of `rows`; returns rng, the key for acting, the batch, and the next step's handles."""

    def one_seed(buffer: ReplayBuffer, rng: Array, row: Batch) -> tuple[Any, ...]:
        rng, batch_rng, act_rng = jax.random.split(rng, 3)
        if not mode.update:
            return rng, act_rng, {}, None
        batch = mode.draw(batch_rng, offline, buffer, mode.utd_ratio)
        following = buffer.add({**row, **{key: row[key] + 1 for key in ON_HOST}}, pending=mode.pending)
        ahead = mode.draw(jax.random.split(rng, 3)[1], offline, following, mode.utd_ratio)
        return rng, act_rng, batch, ahead["observations"]

    return over_seeds(one_seed, mode.seeds)(buffer, rng, rows)


@partial(jax.jit, static_argnames=("mode", "action_dim"), donate_argnames=("agent", "carry", "totals"))
def _learn_and_act(
    agent: Any,
    carry: Any,
    totals: Info,
    batch: Batch,
    rng: Array,
    normalizer: Normalizer | None,
    observations: Any,
    ended: Array,
    *,
    mode: OnlineMode,
    action_dim: int,
) -> tuple[Any, Any, Info, Array]:
    def act(agent: Any, carry: Any, rng: Array, seen: Any, ended: Array) -> tuple[Array, Any]:
        carry = dispatch.clear_carry(carry, agent.initial_carry((1,)), ended)
        return dispatch.choose(agent, normalizer, seen, carry, rng, mode.random, action_dim)

    if mode.update:
        agent, totals = dispatch.updated(agent, totals, batch, mode.seeds)
    action, carry = over_seeds(act, mode.seeds, in_turn=planned_in_turn(carry))(agent, carry, rng, observations, ended)
    return agent, carry, totals, action


_normalized = jax.jit(normalize)


class HostReplay:
    """The programs of `o2o.train.programs`, same names, for a `HostData` and a replay that stay on the host."""

    first_actions = staticmethod(dispatch.first_actions)
    commit_episodes = staticmethod(dispatch.commit_episodes)

    def __init__(self, folder: Path | None = None, slack: int = 1) -> None:
        """Keep the run's own rows in `folder` (None: a temporary one), `slack` more than the buffer is large."""
        self.folder, self.slack = folder, max(slack, 1)
        self.read_only = False  # the files are those of a run that somebody else may be training
        self.store: RowStore | None = None
        self._pool = ThreadPoolExecutor(1, "o2o-prefetch")
        self._ahead: Future[tuple[Handles, dict[str, Any], bool]] | None = None
        self._data: HostData | None = None

    def sync(self) -> None:
        """Wait until the run's own rows are on the disk: a checkpoint refers to them."""
        if self.store is not None:
            self.store.sync()

    def close(self) -> None:
        """End the thread; a temporary folder is removed."""
        self._pool.shutdown(cancel_futures=True)
        self._ahead, self.store = None, None

    def _updates(
        self, agent: Any, rng: Array, totals: Info, count: int, seeds: int, draw: Any, read: Any
    ) -> tuple[Any, Array, Info]:
        """Run `count` updates; `draw(rng)` gives the next rng and batch of handles, `read` the rows of handles."""

        def fetched(light: Batch) -> Batch:
            return {**light, **jax.device_put(read(np.asarray(light["observations"])))}

        rng, light = draw(rng)
        ahead = self._pool.submit(fetched, light)
        for left in reversed(range(count)):
            batch = ahead.result()
            if left:
                rng, light = draw(rng)
                ahead = self._pool.submit(fetched, light)
            jax.block_until_ready(totals)  # one update under way, one batch in waiting: no more on the device
            agent, totals = _update(agent, batch, totals, seeds=seeds)
        return agent, rng, totals

    def offline_updates(
        self, agent: Any, rng: Array, data: HostData, num_updates: Any, *, seeds: int, batch_size: int
    ) -> tuple[Any, Array, Info]:
        """Like `dispatch.offline_updates`."""
        count, window = int(num_updates), agent.needs.window
        zeros = over_seeds(lambda agent: dispatch.metric_zeros(agent, data), seeds)(agent)
        draw = partial(_draw_offline, data=data.light, seeds=seeds, batch_size=batch_size, window=window)
        agent, rng, totals = self._updates(agent, rng, zeros, count, seeds, draw, data.read)
        return agent, rng, jax.tree.map(lambda total: total / count, totals)

    def fresh_online_state(self, agent: Any, rng: Array, offline: HostData, capacity: int, append: bool) -> OnlineState:
        """Like `dispatch.fresh_online_state`; makes the files."""
        seeds = rng.shape[0]
        example = jax.tree.map(lambda leaf: np.broadcast_to(leaf[0], (seeds, *leaf.shape[1:])), offline.heavy)
        self.store, self._data, self._ahead = RowStore(self.folder, example, capacity, self.slack), offline, None
        return dispatch.fresh_online_state(agent, rng, offline, capacity, append)

    def stand_at(self, buffer: ReplayBuffer) -> None:
        """Go on behind the newest row of a restored buffer, leaves `[S, capacity]`."""
        assert self.store is not None
        handles, cursor = np.asarray(buffer.rows["observations"]), int(buffer.cursor[0])
        newest = int(handles[0, cursor - 1]) if int(buffer.size[0]) else -1
        self.store.total, self._ahead = max(newest + 1, 0), None

    def _read(self, handles: Handles, until: int | None = None) -> dict[str, Any]:
        assert self.store is not None and self._data is not None
        return self.store.read(handles, self._data.heavy, self.store.total if until is None else until)

    def initial_updates(
        self, state: OnlineState, offline: HostData | None, count: Any, *, mode: OnlineMode
    ) -> OnlineState:
        """Like `dispatch.initial_updates`."""
        light = None if offline is None else offline.light
        draw = partial(_draw_online, offline=light, buffer=state.buffer, mode=mode)
        agent, rng, totals = self._updates(
            state.agent, state.rng, state.totals, int(count), mode.seeds, draw, self._read
        )
        return state._replace(agent=agent, rng=rng, totals=totals)

    def online_step(
        self,
        state: OnlineState,
        offline: HostData | None,
        normalizer: Normalizer | None,
        rows: Batch,
        observations: Any,
        ended: Any,
        *,
        mode: OnlineMode,
    ) -> tuple[OnlineState, Array]:
        """Like `dispatch.online_step`: store, draw, fetch; then learn and act while the next rows are fetched."""
        assert self.store is not None
        if self.read_only:
            raise RunError(
                f"this run was opened to be looked at, and {self.folder} is part of its checkpoints: go on by "
                "`o2o resume`, or with a copy of the run folder"
            )
        kept = {key: jax.tree.map(np.asarray, _normalized(normalizer, rows[key])) for key in ON_HOST}
        handles = self.store.add(kept)
        light = {**rows, **dict.fromkeys(ON_HOST, handles)}
        data = None if offline is None else offline.light
        buffer = dispatch.insert(state.buffer, None, light, seeds=mode.seeds, pending=mode.pending)
        rng, act_rng, batch, guess = _draw_step(buffer, state.rng, data, light, mode=mode)
        if mode.update:
            batch = {**batch, **self._fetched(np.asarray(batch["observations"]))}
            self._ahead = self._pool.submit(self._fetch_ahead, guess, self.store.total)
        first = mode.before_learning()
        agent, carry, totals, action = _learn_and_act(
            state.agent, state.carry, state.totals, batch if first.update else {}, act_rng, normalizer, observations,
            ended, mode=first, action_dim=buffer.rows["actions"].shape[-1],
        )  # fmt: skip
        if mode.update and mode.overlap:
            agent, totals = _update(agent, batch, totals, seeds=mode.seeds)
        return OnlineState(agent, buffer, carry, rng, totals), action

    def _fetch_ahead(self, guess: Any, until: int) -> tuple[Handles, dict[str, Any], bool]:
        """Fetch the rows that the next step will draw; on the device, unless the one it will store is among them."""
        handles = np.asarray(guess)
        whole = not np.any(handles == until)
        rows = self._read(handles, until)
        return handles, jax.device_put(rows) if whole else rows, whole

    def _fetched(self, handles: Handles) -> dict[str, Any]:
        """Return the rows of `handles`, those that the thread has fetched where they are the same."""
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
