"""Replay: the ring against a deque, pending rows, sequences, next actions, sources, exact shares of dataset rows."""

from collections import deque
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from o2o.errors import ConfigError, DatasetError
from o2o.replay.buffer import FOLLOWING, OfflineData, ReplayBuffer, following_actions, sample_minibatches

KEY = jax.random.key(5)
add = jax.jit(ReplayBuffer.add, static_argnames="pending")
commit = jax.jit(ReplayBuffer.commit)
extend = jax.jit(ReplayBuffer.extend)
sample = jax.jit(ReplayBuffer.sample, static_argnames="shape")
sample_sequences = jax.jit(ReplayBuffer.sample_sequences, static_argnames=("shape", "horizon"))


def row(tag: float, end: float = 0.0) -> dict[str, Any]:
    """Return a transition whose every entry says `tag`."""
    return {
        "observations": np.full(2, tag, np.float32),
        "actions": np.full(1, tag, np.float32),
        "rewards": np.float32(tag),
        "masks": np.float32(1.0),
        "next_observations": np.full(2, tag + 0.5, np.float32),
        "ends": np.float32(end),
        "mc_returns": np.float32(0.0),
    }


def rows(tags: Any, ends: Any = None) -> dict[str, Any]:
    """Return transitions with these tags, leaves `[N, ...]`."""
    ends = np.zeros(len(tags)) if ends is None else ends
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(row, tags, ends))


def empty(capacity: int) -> ReplayBuffer:
    return ReplayBuffer.create(row(0.0), capacity)


def fill(buffer: ReplayBuffer, tags: Any, pending: bool = False) -> ReplayBuffer:
    for tag in tags:
        buffer = add(buffer, row(tag), pending=pending)
    return buffer


def contents(buffer: ReplayBuffer, key: str = "rewards") -> list[float]:
    """Return an entry of the stored rows, oldest first."""
    slots = (int(buffer.cursor) - int(buffer.size) + np.arange(int(buffer.size))) % buffer.capacity
    return np.asarray(buffer.rows[key])[slots].tolist()


def drawn(buffer: ReplayBuffer, draws: int = 400) -> set[float]:
    return set(np.asarray(sample(buffer, KEY, shape=(draws,))["rewards"]).tolist())


# ---------------------------------------------------------------- the ring


def test_wrap_keeps_newest_rows() -> None:
    """The ring keeps the newest rows in order when it wraps."""
    buffer = fill(empty(5), range(1, 13))
    assert buffer.capacity == 5 and int(buffer.size) == 5 and int(buffer.visible) == 5
    assert contents(buffer) == [8, 9, 10, 11, 12]
    assert drawn(buffer) == {8, 9, 10, 11, 12}
    batch = sample(buffer, KEY, shape=(3, 50))
    assert batch["observations"].shape == (3, 50, 2)
    np.testing.assert_array_equal(batch["observations"][..., 0], batch["rewards"])
    np.testing.assert_array_equal(batch["next_observations"], batch["observations"] + 0.5)


def test_partly_filled_ring() -> None:
    """A partly filled ring yields only what was stored."""
    assert drawn(fill(empty(50), [3, 4])) == {3, 4}


def test_extend_across_wrap() -> None:
    """`extend` appends in order across the wrap."""
    buffer = extend(fill(empty(7), [1, 2, 3, 4, 5]), rows([6, 7, 8, 9]))
    assert contents(buffer) == [3, 4, 5, 6, 7, 8, 9]
    assert contents(fill(buffer, [10])) == [4, 5, 6, 7, 8, 9, 10]
    assert contents(extend(empty(3), rows([1, 2, 3]))) == [1, 2, 3]
    with pytest.raises(ConfigError, match="4 rows do not fit a replay buffer of capacity 3"):
        empty(3).extend(rows([1, 2, 3, 4]))
    with pytest.raises(ConfigError, match="capacity is 0"):
        empty(0)


def test_pending_rows_not_sampled() -> None:
    """Pending rows are never sampled."""
    buffer = fill(fill(empty(10), [1, 2, 3]), [4, 5, 6, 7], pending=True)
    assert int(buffer.size) == 7 and int(buffer.visible) == 3
    assert drawn(buffer) == {1, 2, 3}
    # The ring overwrites visible rows while an episode waits; what waits stays hidden.
    buffer = fill(buffer, [8, 9, 10, 11], pending=True)
    assert int(buffer.visible) == 2 and drawn(buffer) == {2, 3}
    starts = sample_sequences(buffer, KEY, shape=(200,), horizon=2)
    assert set(np.asarray(starts["rewards"]).ravel().tolist()) == {2, 3}


@pytest.mark.parametrize("before", [0, 1, 4, 6])
def test_commit_sets_episode_returns(before: int) -> None:
    """`commit` puts returns on the episode's rows."""
    buffer = fill(empty(7), np.arange(before) - 100.0)
    buffer = fill(buffer, [1, 2, 3, 4], pending=True)
    returns = np.asarray([10, 20, 30, 40, -1, -1, -1, -1], np.float32)  # padded, as the loop does
    buffer = commit(buffer, returns, 4)
    assert int(buffer.pending) == 0 and int(buffer.visible) == min(before + 4, 7)
    assert contents(buffer)[-4:] == [1, 2, 3, 4]
    assert contents(buffer, "mc_returns")[-4:] == [10, 20, 30, 40]
    assert contents(buffer, "mc_returns")[:-4] == [0.0] * min(before, 3)
    assert drawn(buffer) == set(contents(buffer))


def test_empty_commit() -> None:
    """A commit of nothing changes nothing."""
    buffer = fill(empty(4), [1, 2, 3], pending=True)
    after = commit(buffer, np.full(2, 9.0, np.float32), 0)
    for one, two in zip(jax.tree.leaves(buffer), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, two)


def test_episode_longer_than_ring() -> None:
    """An episode longer than the ring keeps its newest rows."""
    buffer = fill(empty(3), range(1, 8), pending=True)
    assert int(buffer.pending) == 3 and int(buffer.visible) == 0
    buffer = commit(buffer, np.arange(10.0, 80.0, 10.0, dtype=np.float32), 7)
    assert contents(buffer) == [5, 6, 7] and contents(buffer, "mc_returns") == [50, 60, 70]
    assert int(buffer.pending) == 0 and drawn(buffer) == {5, 6, 7}


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.just(1)),
        st.tuples(st.just("pending"), st.integers(1, 6)),
        st.tuples(st.just("extend"), st.sampled_from([1, 3])),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(capacity=st.sampled_from([3, 5]), operations=OPERATIONS)
def test_ring_matches_deque(capacity: int, operations: list[tuple[str, int]]) -> None:
    """The ring agrees with a deque."""
    buffer, model, tag = empty(capacity), deque[tuple[float, float]](maxlen=capacity), 0.0
    for kind, count in operations:
        tags = [tag + i + 1 for i in range(count)]
        tag = tags[-1]
        visible = list(model)
        if kind == "extend":
            buffer = extend(buffer, rows(tags))
        else:
            buffer = fill(buffer, tags, pending=kind == "pending")
        model.extend((t, 0.0) for t in tags)
        if kind == "pending":
            left = max(len(visible) + count - capacity, 0)
            assert int(buffer.visible) == max(len(visible) - left, 0)
            buffer = commit(buffer, np.pad(np.float32(tags) * 2, (0, 6 - count)), count)
            for _ in range(min(count, capacity)):
                model.pop()
            model.extend((t, 2 * t) for t in tags[-capacity:])
        assert int(buffer.visible) == int(buffer.size) == len(model)
        assert list(zip(contents(buffer), contents(buffer, "mc_returns"), strict=True)) == list(model)
    if model:
        assert drawn(buffer) == {t for t, _ in model}


def test_methods_under_vmap() -> None:
    """The methods work under `vmap` and keep images."""
    example = {**row(0.0), "observations": {"camera": np.zeros((2, 2, 3), np.uint8), "state": np.zeros(2, np.float32)}}
    buffers = jax.vmap(lambda _: ReplayBuffer.create(example, 4))(jnp.arange(2))
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) + 200
    new = {**row(1.0), "observations": {"camera": image, "state": np.ones(2, np.float32)}}
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), new)
    buffers = jax.vmap(ReplayBuffer.add)(buffers, stacked)
    batch = jax.vmap(lambda b, k: b.sample(k, (3,)))(buffers, jax.random.split(KEY))
    assert batch["observations"]["camera"].dtype == np.uint8
    np.testing.assert_array_equal(batch["observations"]["camera"], np.broadcast_to(image, (2, 3, 2, 2, 3)))


# ---------------------------------------------------------------- sequences


@pytest.mark.parametrize("stored", [4, 6, 9])
def test_sequences_are_consecutive(stored: int) -> None:
    """Sequences are consecutive and never cross the cursor."""
    buffer = fill(empty(6), range(1, stored + 1))
    windows = np.asarray(sample_sequences(buffer, KEY, shape=(500,), horizon=3)["rewards"])
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1.0)
    oldest = max(stored - 6, 0) + 1
    assert set(windows[:, 0].tolist()) == set(range(oldest, stored - 1))


def test_valid_stops_after_end() -> None:
    """The `valid` column stops after an episode's end."""
    ends = [0, 0, 1, 0, 0, 0, 1, 0]
    buffer = extend(empty(8), rows(np.arange(8.0), ends))
    batch = sample_sequences(buffer, KEY, shape=(20, 20), horizon=4)
    assert batch["valid"].shape == (20, 20, 4) and batch["observations"].shape == (20, 20, 4, 2)
    seen = set()
    for tags, valid in zip(
        np.asarray(batch["rewards"]).reshape(-1, 4), np.asarray(batch["valid"]).reshape(-1, 4), strict=True
    ):
        start = int(tags[0])
        length = next((i + 1 for i in range(4) if ends[start + i]), 4)
        np.testing.assert_array_equal(valid, np.arange(4) < length)
        seen.add(start)
    assert seen == set(range(5))


def test_short_window_marked_invalid() -> None:
    """A window with too few rows behind it has the missing ones marked invalid."""
    buffer = fill(fill(empty(8), [1, 2]), [3, 4], pending=True)
    batch = sample_sequences(buffer, KEY, shape=(10,), horizon=4)
    np.testing.assert_array_equal(batch["valid"], np.broadcast_to([1.0, 1.0, 0.0, 0.0], (10, 4)))


# ---------------------------------------------------------------- next actions

NEXT = {"next_actions": np.zeros(1, np.float32), "next_valid": np.float32(0.0)}
"""The columns of an agent that needs the next action, for `row`."""


def known(buffer: ReplayBuffer) -> dict[float, float | None]:
    """Return the tag of every row that is drawn with its next action, None where there is none."""
    batch = sample(buffer.replace(pending=jnp.zeros((), jnp.int32)), KEY, shape=(200,))
    columns = (np.asarray(batch[key]).ravel().tolist() for key in ("rewards", "next_actions", "next_valid"))
    found = {(tag, action if valid else None) for tag, action, valid in zip(*columns, strict=True)}
    assert len(found) == len(dict(found)), "one row, one next action"
    return dict(found)


def test_dataset_next_actions_in_episode() -> None:
    """The next actions of a dataset stay in their episode.

    Episodes of 3 and 2 rows; the last row of each has none, whether or not the dataset marks the very last.
    """
    actions = np.asarray([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]], np.float32)
    for last in (0, 1):
        columns = following_actions(actions, np.asarray([0, 0, 1, 0, last]))
        np.testing.assert_array_equal(columns["next_valid"], [1, 1, 0, 1, 0])
        np.testing.assert_array_equal(columns["next_actions"], [[3, 4], [5, 6], [0, 0], [9, 10], [0, 0]])


def test_dataset_next_actions_on_demand() -> None:
    """The next actions of a dataset are made where they are needed."""
    data = rows(np.arange(1.0, 7.0), [0, 1, 0, 0, 0, 0])
    made = OfflineData.create(data, FOLLOWING, [(0, 4, 1.0), (4, 2, 1.0)]).rows
    np.testing.assert_array_equal(made["next_actions"][:, 0], [2, 0, 4, 0, 6, 0])  # row 3 ends its source
    np.testing.assert_array_equal(made["next_valid"], [1, 0, 1, 0, 1, 0])
    assert not set(FOLLOWING) & set(OfflineData.create(data).rows)
    given = {"next_actions": np.full((6, 1), 9.0, np.float32), "next_valid": np.ones(6, np.float32)}
    np.testing.assert_array_equal(OfflineData.create({**data, **given}, FOLLOWING).rows["next_actions"], 9.0)
    del data["ends"]
    with pytest.raises(DatasetError, match="no next_actions, next_valid, which the agent needs"):
        OfflineData.create(data, FOLLOWING)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ends=st.lists(st.booleans(), max_size=14), pending=st.booleans())
def test_ring_next_actions_in_episode(ends: list[bool], pending: bool) -> None:
    """The next actions of the ring are those of the next row of the episode.

    Over any ends, also across the wrap: the newest row has none yet, no row has that of another episode.
    """
    buffer, capacity = ReplayBuffer.create({**row(0.0), **NEXT}, 4), 4
    for i, end in enumerate(ends):
        buffer = add(buffer, row(i + 1.0, float(end)), pending=pending)
        stored = range(max(i + 1 - capacity, 0), i + 1)
        assert known(buffer) == {j + 1.0: j + 2.0 if j < i and not ends[j] else None for j in stored}


def test_broken_episode_no_next_action() -> None:
    """An episode broken off has no next action.

    `mark_ends` closes the episode of the newest row in the first of two rings only.
    """
    ring = fill(ReplayBuffer.create({**row(0.0), **NEXT}, 4), [1, 2])
    rings = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), ring).mark_ends(np.asarray([True, False]))
    rings = jax.vmap(lambda ring: ring.add(row(3.0)))(rings)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], rings) for i in (0, 1))
    assert known(first) == {1.0: 2.0, 2.0: None, 3.0: None} and known(second) == {1.0: 2.0, 2.0: 3.0, 3.0: None}


def test_next_actions_in_every_draw() -> None:
    """The next actions go through every draw.

    A ring that begins with a dataset, then grows by an episode; the batch says what the rows say.
    """
    data = OfflineData.create(rows([-3.0, -2.0, -1.0]), ("ends", "mc_returns", *FOLLOWING))
    buffer = ReplayBuffer.create(jax.tree.map(lambda leaf: leaf[0], data.rows), 5).extend(data.rows)
    buffer = fill(buffer, [1, 2, 3])
    expected = {-2.0: -1.0, -1.0: None, 1.0: 2.0, 2.0: 3.0, 3.0: None}
    assert known(buffer) == expected
    batch = sample_minibatches(KEY, data, buffer, 2, 64, 0.25)
    for tag, action, valid in zip(*(np.asarray(batch[key]).ravel() for key in ("rewards", *FOLLOWING)), strict=True):
        assert (action if valid else None) == {**expected, -3.0: -2.0}[tag]
    windows = sample_sequences(buffer, KEY, shape=(50,), horizon=2)
    inside = np.asarray(windows["next_valid"])[:, 0] > 0
    assert inside.any() and not inside.all()
    np.testing.assert_array_equal(windows["next_actions"][inside, 0], windows["actions"][inside, 1])


# ---------------------------------------------------------------- the dataset and its share


def test_missing_key_named() -> None:
    """A key that the agent needs and the dataset lacks is named."""
    data = rows([1, 2, 3])
    del data["mc_returns"]
    assert OfflineData.create(data).size == 3
    with pytest.raises(DatasetError, match="no mc_returns, which the agent needs") as error:
        OfflineData.create(data, needs=("mc_returns",))
    assert "observations" in str(error.value)
    del data["masks"]
    with pytest.raises(DatasetError, match="no masks, mc_returns"):
        OfflineData.create(data, needs=("mc_returns",))


def test_only_needed_columns_on_device() -> None:
    """Only what is needed goes to the device."""
    data = OfflineData.create({**rows([1.0, 2.0]), "notes": np.zeros(2)}, needs=("ends",))
    assert set(data.rows) == {"observations", "actions", "rewards", "masks", "next_observations", "ends"}


def test_single_source_drawn_uniformly() -> None:
    """Rows of one source are drawn uniformly."""
    tags = np.asarray(OfflineData.create(rows(np.arange(5.0))).sample(KEY, (40, 250))["rewards"])
    counts = np.bincount(tags.ravel().astype(int), minlength=5)
    assert counts.sum() == 10_000
    np.testing.assert_allclose(counts / 10_000, 0.2, atol=0.02)  # five standard deviations


def test_sources_drawn_by_weight() -> None:
    """Sources are drawn by weight, whatever their size."""
    data = OfflineData.create(rows(np.arange(12.0)), sources=[(0, 9, 1.0), (9, 2, 3.0), (11, 1, 0.0)])
    tags = np.asarray(jax.jit(lambda k: data.sample(k, (20_000,)))(KEY)["rewards"]).astype(int)
    counts = np.bincount(tags, minlength=12) / len(tags)
    np.testing.assert_allclose(counts[:9], 0.25 / 9, atol=0.006)
    np.testing.assert_allclose(counts[9:11], 0.375, atol=0.018)
    assert counts[11] == 0.0


@pytest.mark.parametrize("utd", [1, 4, 20])
def test_minibatch_dataset_share(utd: int) -> None:
    """Every minibatch has exactly its share of dataset rows."""
    camera = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    data = rows(-1.0 - np.arange(40.0))  # the dataset's rewards are negative, the buffer's positive
    image = {"camera": camera, "state": np.asarray(data["observations"])}
    data = {**data, "observations": image, "next_observations": image}
    offline = OfflineData.create(data, needs=("mc_returns", "ends"))
    example = jax.tree.map(lambda leaf: leaf[0], offline.rows)
    online = jax.tree.map(lambda leaf: leaf[:30], {**offline.rows, "rewards": 1.0 + jnp.arange(40.0)})
    buffer = ReplayBuffer.create(example, 64).extend(online)
    draw = jax.jit(partial(sample_minibatches, utd_ratio=utd, batch_size=256, offline_ratio=0.5))
    batch = draw(KEY, offline, buffer)
    rewards = np.asarray(batch["rewards"])
    assert rewards.shape == (utd, 256)
    np.testing.assert_array_equal((rewards < 0).sum(axis=1), 128)
    assert (rewards[:, :128] < 0).all()
    assert len({tuple(minibatch) for minibatch in rewards}) == utd
    assert batch["observations"]["camera"].dtype == np.uint8
    assert batch["observations"]["camera"].shape == (utd, 256, 1, 1, 1)
    np.testing.assert_array_equal(batch["observations"]["camera"][..., 0, 0, 0], np.abs(rewards) - 1.0)
    assert set(batch) == set(offline.rows) - {"ends"}


def test_dataset_share_limits() -> None:
    """A share of one draws only dataset rows; a share of zero, or no dataset, only online ones."""
    offline = OfflineData.create(rows(-1.0 - np.arange(4.0)), needs=("ends", "mc_returns"))
    buffer = fill(empty(4), [1, 2])
    draw = lambda data, ratio: np.asarray(sample_minibatches(KEY, data, buffer, 2, 8, ratio)["rewards"])  # noqa: E731
    assert (draw(offline, 1.0) < 0).all()
    assert (draw(offline, 0.0) > 0).all()
    assert (draw(None, 0.5) > 0).all()
    np.testing.assert_array_equal((draw(offline, 0.25) < 0).sum(axis=1), 2)
