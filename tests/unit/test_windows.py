"""Windows: what a batch of them is, drawn from a dataset, from a replay buffer, and from both."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.replay.buffer import OfflineData, ReplayBuffer, sample_minibatches

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


def test_windows_of_a_dataset_are_rows_in_a_row_of_one_episode() -> None:
    data = OfflineData.create(rows(10, (3, 9)), ("ends",))
    batch = data.sample_sequences(KEY, (2, 200), 3)
    assert batch["observations"].shape == (2, 200, 3, 2) and batch["ends"].dtype == jnp.float32
    tags, valid = tags_of(batch)
    np.testing.assert_array_equal(np.diff(tags, axis=1), 1.0)
    assert set(tags[:, 0].tolist()) == set(range(1, 9))
    for window, counts in zip(tags, valid, strict=True):
        length = 4 - int(window[0]) + 1 if window[0] <= 4 else 3
        np.testing.assert_array_equal(counts, np.arange(3) < length)


def test_windows_stay_within_their_source_and_sources_keep_their_weights() -> None:
    data = OfflineData.create(rows(12), ("ends",), [(0, 8, 1.0), (8, 2, 3.0), (10, 2, 0.0)])
    tags, valid = tags_of(jax.jit(lambda key: data.sample_sequences(key, (4000,), 3))(KEY))
    second = tags[:, 0] > 8
    np.testing.assert_allclose(second.mean(), 0.75, atol=0.03)
    np.testing.assert_array_equal(np.diff(tags[~second], axis=1), 1.0)
    assert tags[~second].max() == 8 and (valid[~second] == 1).all()
    np.testing.assert_array_equal(np.unique(tags[second][:, :2], axis=0), [[9, 10]])
    np.testing.assert_array_equal(np.unique(valid[second], axis=0), [[1, 1, 0]])
    assert data.rows["ends"].tolist() == [i in (7, 9, 11) for i in range(12)], "every source ends an episode"


def test_what_is_appended_to_the_dataset_is_not_joined_with_it() -> None:
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
def test_windows_of_minibatches_cross_neither_the_cursor_nor_an_end_and_keep_their_shares(stored: int) -> None:
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
