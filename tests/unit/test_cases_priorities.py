"""Draws by priority: their frequencies, which rows they reach, and how priorities are given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.replay.buffer import BLOCK, OfflineData, ReplayBuffer, draw_by_weight, sample_minibatches

KEY = jax.random.key(3)
weigh = jax.jit(draw_by_weight, static_argnames="shape")
sample = jax.jit(ReplayBuffer.sample, static_argnames="shape")
add = jax.jit(ReplayBuffer.add, static_argnames="pending")
mixed = jax.jit(sample_minibatches, static_argnums=(3, 4, 5))
windows = jax.jit(ReplayBuffer.sample_sequences, static_argnames=("shape", "horizon"))


def rows(tags: Any, ends: Any = 0.0) -> dict[str, Any]:
    """Return transitions whose every entry says its tag, leaves `[N, ...]`."""
    tags = np.asarray(tags, np.float32)
    columns = dict.fromkeys(("observations", "next_observations", "actions"), tags[:, None])
    return {**columns, "rewards": tags, "masks": np.ones_like(tags), "ends": np.broadcast_to(ends, tags.shape)}


def ring(tags: Any, capacity: int, prioritised: bool = True) -> ReplayBuffer:
    """Return a ring that has seen rows with these tags, one after the other."""
    table = rows(tags)
    buffer = ReplayBuffer.create(jax.tree.map(lambda leaf: leaf[0], table), capacity, prioritised)
    for i in range(len(tags)):
        buffer = add(buffer, jax.tree.map(lambda leaf, i=i: leaf[i], table))
    return buffer


def test_frequencies_follow_weights() -> None:
    """Of 10,000 draws each row has its share: chi squared is that of 2249 free numbers. Zeros have none."""
    weights = np.random.default_rng(0).exponential(size=3000)
    weights[::4] = 0.0
    weights[BLOCK : BLOCK + 100] *= 50.0
    drawn = np.asarray(weigh(KEY, jnp.asarray(weights, jnp.float32), shape=(10, 1000)))
    counts = np.bincount(drawn.reshape(-1), minlength=3000)
    assert counts.sum() == 10_000 and len(counts) == 3000 and counts[weights == 0].sum() == 0
    wanted = 10_000 * weights[weights > 0] / weights.sum()
    free = len(wanted) - 1
    chi = np.sum((counts[weights > 0] - wanted) ** 2 / wanted)
    assert abs(chi - free) < 5 * np.sqrt(2 * free + np.sum(1 / wanted))


def test_shares_survive_many_rows() -> None:
    """Among two million equal rows the last thousand are drawn as often as the first; one sum of float32 would blur."""
    drawn = np.asarray(weigh(KEY, jnp.ones(2_000_000), shape=(8000,)))
    counts, _ = np.histogram(drawn, 8, (0, 2_000_000))
    assert abs(counts - 1000).max() < 5 * np.sqrt(875) and abs(np.mean(drawn % 2) - 0.5) < 5 * 0.5 / np.sqrt(8000)
    assert len(np.unique(drawn)) > 7950


def test_lone_row_always_drawn() -> None:
    """A weight that all others vanish beside is drawn, first, last and alone."""
    for at in (0, BLOCK - 1, BLOCK, 2999):
        drawn = weigh(KEY, jnp.zeros(3000).at[at].set(1e-30), shape=(50,))
        assert set(np.asarray(drawn).tolist()) == {at}


def test_new_rows_have_highest_priority() -> None:
    """The first has 1, each later one the highest so far; so has every row of a dataset that the ring begins with."""
    buffer = ring([1, 2], 4)
    assert buffer.priorities is not None and buffer.priorities.tolist() == [1, 1, 0, 0]
    buffer = buffer.prioritise(jnp.asarray([0, 1]), jnp.asarray([0.5, 7.0]))
    buffer = buffer.extend(rows([3, 4]))
    assert buffer.priorities is not None and buffer.priorities.tolist() == [0.5, 7, 7, 7]
    buffer = buffer.prioritise(jnp.arange(1, 4), jnp.full(3, 0.25)).add(jax.tree.map(lambda x: x[0], rows([5])))
    assert buffer.priorities is not None and buffer.priorities.tolist() == [0.5, 0.25, 0.25, 0.25]


def test_twice_drawn_row_gets_higher() -> None:
    """Of two new priorities for one row the higher one counts, whatever it had; a place behind the ring is left out."""
    buffer = ring([1, 2, 3], 3).prioritise(jnp.asarray([[0, 2], [0, 3]]), jnp.asarray([[0.2, 5.0], [0.4, 9.0]]))
    assert buffer.priorities is not None
    np.testing.assert_allclose(buffer.priorities, [0.4, 1.0, 5.0])


def test_draws_by_priority_with_odds() -> None:
    """Priorities 1, 1 and 6 beside a mean of 8/3: odds 3/8, 3/8 and 9/4, and as many draws."""
    buffer = ring([10, 20, 30, 40], 3).prioritise(jnp.arange(3), jnp.asarray([6.0, 1.0, 1.0]))  # 40 is in slot 0
    batch = sample(buffer, KEY, shape=(8, 500))
    for slot, tag, odds in ((0, 40, 9 / 4), (1, 20, 3 / 8), (2, 30, 3 / 8)):
        where = np.asarray(batch["slots"]) == slot
        assert abs(where.mean() - odds / 3) < 0.04
        assert set(np.asarray(batch["rewards"])[where].tolist()) == {tag}
        np.testing.assert_allclose(np.asarray(batch["odds"])[where], odds, rtol=1e-5)


def test_hidden_rows_not_drawn() -> None:
    """Rows that wait for their episode's end are not drawn, however high their priority, and count for no odds."""
    buffer = ring([1, 2], 5)
    for tag in (3, 4):
        buffer = add(buffer, jax.tree.map(lambda x: x[0], rows([tag])), pending=True)
    batch = sample(buffer.prioritise(jnp.asarray([2]), jnp.asarray([1e6])), KEY, shape=(200,))
    assert set(np.asarray(batch["rewards"]).tolist()) == {1, 2}
    np.testing.assert_allclose(batch["odds"], 1.0)


def test_window_drawn_by_first_row() -> None:
    """A window begins by the priority of its first row and never crosses the cursor."""
    buffer = ring(range(1, 8), 5)  # 3 to 7 are left, oldest first; windows of three begin at 3, 4 or 5
    heavy = jnp.asarray([2.0, 1e3, 1e3, 1.0, 1.0])  # slots: 6, 7, 3, 4, 5
    batch = windows(buffer.prioritise(jnp.arange(5), heavy), KEY, shape=(400,), horizon=3)
    tags = np.asarray(batch["rewards"])
    np.testing.assert_array_equal(tags, tags[:, :1] + np.arange(3))
    assert set(tags[:, 0].tolist()) <= {3, 4, 5} and (tags[:, 0] == 3).mean() > 0.97
    np.testing.assert_array_equal(np.asarray(batch["slots"])[tags[:, 0] == 3], 2)


def test_dataset_rows_drawn_evenly() -> None:
    """In a mixed minibatch the dataset's rows have odds of 1 and no place: their priorities go nowhere."""
    buffer = ring([1, 2, 3], 3).prioritise(jnp.arange(3), jnp.asarray([1.0, 1.0, 4.0]))
    data = OfflineData.create(rows([70, 80]))
    batch = mixed(KEY, data, buffer, 2, 8, 0.5)
    old = np.asarray(batch["rewards"]) > 50
    assert old[:, :4].all() and not old[:, 4:].any()
    assert set(np.asarray(batch["slots"])[old].tolist()) == {3} and set(np.asarray(batch["odds"])[old].tolist()) == {1}
    given = buffer.prioritise(batch["slots"], jnp.where(old, 99.0, 2.0))
    assert given.priorities is not None and float(given.priorities.max()) <= 4.0


@pytest.mark.parametrize("stored", [2, 5])
def test_grown_ring_keeps_priorities(stored: int) -> None:
    """A ring with more room draws its rows by the same priorities, whether it had wrapped or not."""
    buffer = ring(range(1, stored + 1), 3)
    buffer = buffer.prioritise(jnp.arange(3), jnp.where(buffer.rows["rewards"] == stored, 8.0, 0.5))
    wide = jax.tree.map(lambda leaf: leaf[0], jax.tree.map(lambda leaf: leaf[None], buffer).grown(7))
    tags, priorities = np.asarray(wide.rows["rewards"]), np.asarray(wide.priorities)
    assert priorities[tags == stored] == 8.0 and (priorities[(tags > 0) & (tags != stored)] == 0.5).all()
    assert np.mean(np.asarray(sample(wide, KEY, shape=(300,))["rewards"]) == stored) > 0.8


def test_even_ring_unchanged() -> None:
    """A ring without priorities has no array for them, and its program neither sums nor gives anything more."""
    buffer = ring([1, 2, 3], 3, prioritised=False)
    assert buffer.priorities is None and not {"slots", "odds"} & sample(buffer, KEY, shape=(4,)).keys()
    assert "cumsum" not in str(jax.make_jaxpr(lambda b, k: b.sample(k, (4,)))(buffer, KEY))
