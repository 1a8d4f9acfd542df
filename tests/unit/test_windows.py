"""Windows: drawn from a dataset, a replay buffer or both; cut into n-step returns and chunks, with numbers by hand."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.replay.buffer import OfflineData, ReplayBuffer, sample_minibatches
from o2o.rl.windows import chunk_rows, last_valid, n_step_rows, repeat_last

KEY = jax.random.key(11)


def rows(count: int, ends: Any = (), sign: float = 1.0) -> dict[str, Any]:
    """Return transitions tagged sign * 1, 2, ...; `ends` are positions."""
    tags = sign * np.arange(1.0, count + 1, dtype=np.float32)
    column = lambda width: np.repeat(tags[:, None], width, axis=1)  # noqa: E731
    flags = np.isin(np.arange(count), ends)
    return {
        "observations": column(2),
        "actions": column(1),
        "rewards": tags,
        "masks": np.ones(count, np.float32),
        "next_observations": column(2),
        "ends": flags,
    }


def tags_of(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return tags and validity of windows, `[n, W]` each."""
    width = batch["rewards"].shape[-1]
    return np.asarray(batch["rewards"]).reshape(-1, width), np.asarray(batch["valid"]).reshape(-1, width)


def test_dataset_windows_are_consecutive() -> None:
    """Windows of a dataset are consecutive rows of one episode."""
    data = OfflineData.create(rows(10, (3, 9)), ("ends",))
    batch = data.sample_sequences(KEY, (2, 200), 3)
    assert batch["observations"].shape == (2, 200, 3, 2) and batch["ends"].dtype == jnp.float32
    tags, valid = tags_of(batch)
    np.testing.assert_array_equal(np.diff(tags, axis=1), 1.0)
    assert set(tags[:, 0].tolist()) == set(range(1, 9))
    for window, counts in zip(tags, valid, strict=True):
        length = 4 - int(window[0]) + 1 if window[0] <= 4 else 3
        np.testing.assert_array_equal(counts, np.arange(3) < length)


def test_windows_stay_in_source() -> None:
    """Windows stay within their source, and sources keep their weights."""
    data = OfflineData.create(rows(12), ("ends",), [(0, 8, 1.0), (8, 2, 3.0), (10, 2, 0.0)])
    tags, valid = tags_of(jax.jit(lambda key: data.sample_sequences(key, (4000,), 3))(KEY))
    second = tags[:, 0] > 8
    np.testing.assert_allclose(second.mean(), 0.75, atol=0.03)
    np.testing.assert_array_equal(np.diff(tags[~second], axis=1), 1.0)
    assert tags[~second].max() == 8 and (valid[~second] == 1).all()
    np.testing.assert_array_equal(np.unique(tags[second][:, :2], axis=0), [[9, 10]])
    np.testing.assert_array_equal(np.unique(valid[second], axis=0), [[1, 1, 0]])
    assert data.rows["ends"].tolist() == [i in (7, 9, 11) for i in range(12)], "every source ends an episode"


def test_appended_rows_not_joined() -> None:
    """What is appended to the dataset is not joined with it."""
    data = OfflineData.create(rows(5), ("ends",))
    example = jax.tree.map(lambda leaf: leaf[0], data.rows)
    buffer = ReplayBuffer.create(example, 8).extend(data.rows)
    for row in (jax.tree.map(lambda leaf, i=i: leaf[i], rows(3, (), -1.0)) for i in range(2)):
        buffer = buffer.add(row)
    tags, valid = tags_of(buffer.sample_sequences(KEY, (300,), 3))
    crossing = (tags[:, 0] > 0) & (tags[:, -1] < 0)
    assert crossing.any()
    np.testing.assert_array_equal(valid[crossing] == 1, tags[crossing] > 0)
    assert set(tags[~crossing][:, 0].tolist()) <= {1.0, 2.0, 3.0} and (valid[~crossing] == 1).all()


@pytest.mark.parametrize("stored", [9, 12, 17])
def test_minibatch_windows(stored: int) -> None:
    """Windows of minibatches cross neither the cursor nor an end, and keep their shares."""
    offline = OfflineData.create(rows(20, (6,), -1.0), ("ends",))
    buffer = ReplayBuffer.create(jax.tree.map(lambda leaf: leaf[0], offline.rows), 9)
    add = jax.jit(ReplayBuffer.add)
    table = rows(stored, (stored - 4,))
    for i in range(stored):
        buffer = add(buffer, jax.tree.map(lambda leaf, i=i: leaf[i], table))
    draw = jax.jit(partial(sample_minibatches, utd_ratio=3, batch_size=64, offline_ratio=0.25, window=3))
    batch = draw(KEY, offline, buffer)
    assert set(batch) == {*offline.rows, "valid"} and batch["actions"].shape == (3, 64, 3, 1)
    tags, valid = tags_of(batch)
    from_data = (np.asarray(batch["rewards"])[..., 0] < 0).sum(axis=1)
    np.testing.assert_array_equal(from_data, 16)
    np.testing.assert_array_equal(np.abs(np.diff(tags, axis=1)), 1.0)
    online = tags[:, 0] > 0
    assert tags[online].min() == stored - 8, "the oldest row that the ring still holds"
    stops = tags[online] == stored - 3
    after = np.cumsum(stops, axis=1) - stops
    np.testing.assert_array_equal(valid[online], after == 0)


def test_plain_batches_hold_no_window() -> None:
    offline = OfflineData.create(rows(20), ("ends",))
    buffer = ReplayBuffer.create(jax.tree.map(lambda leaf: leaf[0], offline.rows), 9).extend(rows(4))
    batch = sample_minibatches(KEY, offline, buffer, 2, 8, 0.5)
    assert set(batch) == set(offline.rows) - {"ends"} and batch["rewards"].shape == (2, 8)


# n-step returns and chunks ------------------------------------------------------------------------------------------

END = {  # ends, masks, valid of windows of three rows
    "none": ([0, 0, 0], [1, 1, 1], [1, 1, 1]),
    "limit inside": ([0, 1, 0], [1, 1, 1], [1, 1, 0]),
    "terminal inside": ([0, 1, 0], [1, 0, 1], [1, 1, 0]),
    "limit last": ([0, 0, 1], [1, 1, 1], [1, 1, 1]),
    "terminal last": ([0, 0, 1], [1, 1, 0], [1, 1, 1]),
    "terminal first, another behind": ([1, 1, 0], [0, 0, 1], [1, 0, 0]),
}


def window(kind: str, lead: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return a window `[*lead, 3, ...]` with rewards 1, 2, 4, actions (1, -1), (2, -2), (3, -3) and states 10, 20, 30.

    Next states are 11, 21, 31.
    """
    ends, masks, valid = (jnp.asarray(flags, jnp.float32) for flags in END[kind])
    steps = jnp.asarray([1.0, 2.0, 3.0])
    batch = {
        "observations": {"state": 10.0 * steps[:, None], "camera": jnp.ones((3, 2, 2, 1)) * steps[:, None, None, None]},
        "actions": jnp.stack([steps, -steps], axis=-1),
        "rewards": jnp.asarray([1.0, 2.0, 4.0]),
        "masks": masks,
        "next_observations": {"state": 10.0 * steps[:, None] + 1.0},
        "ends": ends,
        "valid": valid,
    }
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*lead, *leaf.shape)), batch)


@functools.cache
def all_windows() -> dict[str, Any]:
    """Return the windows of all kinds, leaves `[kinds, 2, 3, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(window(kind, (2,)) for kind in END))


@pytest.mark.parametrize(
    ("n", "timeouts", "rewards", "masks", "following"),
    [
        (3, "terminal", [3, 2, 2, 3, 3, 1], [0.125, 0, 0, 0, 0, 0], [31, 21, 21, 31, 31, 11]),
        (3, "bootstrap", [3, 2, 2, 3, 3, 1], [0.125, 0.25, 0, 0.125, 0, 0], [31, 21, 21, 31, 31, 11]),
        (2, "terminal", [2, 2, 2, 2, 2, 1], [0.25, 0, 0, 0.25, 0.25, 0], [21, 21, 21, 21, 21, 11]),
        (2, "bootstrap", [2, 2, 2, 2, 2, 1], [0.25, 0.25, 0, 0.25, 0.25, 0], [21, 21, 21, 21, 21, 11]),
        (1, "terminal", [1, 1, 1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5, 0.5, 0], [11, 11, 11, 11, 11, 11]),
    ],
)
def test_n_step_rows(n: int, timeouts: Any, rewards: list[float], masks: list[float], following: list[float]) -> None:
    """The n-step rows equal those made by hand.

    One number for each kind of window. Discount 0.5: rewards 1, 2, 4 are worth 1, 1, 1.
    """
    rows = jax.jit(lambda batch: n_step_rows(batch, n, 0.5, timeouts))(all_windows())
    for column in range(2):
        np.testing.assert_array_equal(rows["rewards"][:, column], rewards)
        np.testing.assert_array_equal(rows["masks"][:, column], masks)
        np.testing.assert_array_equal(rows["next_observations"]["state"][:, column, 0], following)
    np.testing.assert_array_equal(rows["observations"]["state"], np.full((len(END), 2, 1), 10.0))
    np.testing.assert_array_equal(rows["actions"], np.broadcast_to([1.0, -1.0], (len(END), 2, 2)))
    assert rows["observations"]["camera"].shape == (len(END), 2, 2, 2, 1)


def test_last_valid_and_repeat_last() -> None:
    """The last valid row of a window is found, and its action is repeated behind it."""
    assert [int(last_valid(window(kind)["valid"])) for kind in END] == [2, 1, 1, 2, 2, 0]
    batch = window("limit inside")
    np.testing.assert_array_equal(repeat_last(batch["actions"], batch["valid"])[:, 0], [1, 2, 2])
    batch = window("terminal first, another behind")
    np.testing.assert_array_equal(repeat_last(batch["actions"], batch["valid"])[:, 1], [-1, -1, -1])


@pytest.mark.parametrize(
    ("pad", "valid", "actions", "entries"),
    [
        (
            True,
            [1, 0, 1, 1, 1, 1],
            [[1, 2, 3], [1, 2, 2], [1, 2, 2], [1, 2, 3], [1, 2, 3], [1, 1, 1]],
            [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
        ),
        (
            False,
            [1, 0, 0, 1, 1, 0],
            [[1, 2, 3]] * 6,
            [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]],
        ),
    ],
)
def test_chunk_rows(pad: bool, valid: list[int], actions: list[list[int]], entries: list[list[int]]) -> None:
    """The chunk rows equal those made by hand.

    One number or row for each kind of window. Discount 0.5; each action is (x, -x).
    """
    states = {key: all_windows()[key]["state"] for key in ("observations", "next_observations")}
    chunks = jax.jit(lambda batch: chunk_rows(batch, 0.5, pad))({**all_windows(), **states})
    np.testing.assert_array_equal(chunks.returns[:, 0], [3, 2, 2, 3, 3, 1])
    np.testing.assert_array_equal(chunks.masks[:, 0], [1, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(chunks.valid[:, 1], valid)
    np.testing.assert_array_equal(chunks.actions[:, 1], np.stack([actions, np.negative(actions)], -1).reshape(6, 6))
    np.testing.assert_array_equal(chunks.entries[:, 1], np.repeat(entries, 2, axis=-1))
    np.testing.assert_array_equal(chunks.observations, np.full((6, 2, 1), 10.0))
    np.testing.assert_array_equal(chunks.next_observations, np.full((6, 2, 1), 31.0))
