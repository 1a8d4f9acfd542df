"""Tests of o2o.rl.chunks: the queue hands out a chunk in order, and asks for a new one only when it is empty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.errors import ConfigError
from o2o.rl.chunks import ActionQueue, empty_queue, next_action

PLACES, DIM = 4, 2


def numbered(start: float, batch: tuple[int, ...] = (), steps: int = PLACES) -> jax.Array:
    """Return a chunk whose entry j is filled with start + j."""
    return jnp.broadcast_to(start + jnp.arange(float(steps))[:, None], (*batch, steps, DIM))


def test_fresh_queue_is_empty():
    """A fresh queue is empty and has room for a chunk."""
    queue = empty_queue((3,), PLACES, DIM)
    assert queue.actions.shape == (3, PLACES, DIM) and queue.actions.dtype == jnp.float32
    assert queue.left.tolist() == [0, 0, 0] and queue.left.dtype == jnp.int32


@pytest.mark.parametrize("execute", [1, 3, PLACES])
def test_chunk_executed_in_order(execute):
    """Executed actions are the chunk's entries in order, and a query comes every `execute` steps."""
    queries = []

    def propose():
        queries.append(None)
        return numbered(10.0 * len(queries))

    queue, taken, left = empty_queue((), PLACES, DIM), [], []
    with jax.disable_jit():
        for _ in range(2 * execute):
            action, queue = next_action(queue, propose, execute)
            taken.append(float(action[0]))
            left.append(int(queue.left))
    assert taken == [10.0 * query + j for query in (1, 2) for j in range(execute)]
    assert left == list(range(execute - 1, -1, -1)) * 2
    assert len(queries) == 2


def test_queue_holds_whole_chunk():
    """The queue holds a whole chunk after each query."""
    _, queue = next_action(empty_queue((), PLACES, DIM), lambda: numbered(1.0), PLACES)
    assert int(queue.left) == PLACES - 1
    np.testing.assert_array_equal(np.asarray(queue.actions)[: PLACES - 1, 0], [2.0, 3.0, 4.0])


def test_batch_members_at_own_positions():
    """Members of a batch stand at different positions of their chunks."""
    queue = ActionQueue(actions=jnp.stack([numbered(0.0), numbered(5.0)]), left=jnp.asarray([0, 2], jnp.int32))
    action, queue = jax.jit(lambda q: next_action(q, lambda: numbered(100.0, (2,)), 3))(queue)
    assert action[:, 0].tolist() == [100.0, 5.0]
    assert queue.left.tolist() == [2, 1]
    assert queue.actions[:, 0, 0].tolist() == [101.0, 6.0]


def test_no_proposal_while_queues_filled():
    """Nothing is proposed while every queue has actions left."""
    queue = ActionQueue(numbered(1.0, (2,)), jnp.asarray([1, 3], jnp.int32))
    with jax.disable_jit():
        action, _ = next_action(queue, lambda: pytest.fail("proposed with a full queue"), PLACES)
    assert action[:, 0].tolist() == [1.0, 1.0]


def test_vmapped_queues_match_single():
    """Queues under `vmap` equal each queue by itself."""
    queue = ActionQueue(jnp.stack([numbered(0.0), numbered(5.0)]), jnp.asarray([0, 2], jnp.int32))
    chunks = jnp.stack([numbered(20.0), numbered(30.0)])
    action, after = jax.vmap(lambda q, c: next_action(q, lambda: c, PLACES))(queue, chunks)
    for member in range(2):
        one = jax.tree.map(lambda leaf, m=member: leaf[m], queue)
        alone, alone_after = next_action(one, lambda m=member: chunks[m], PLACES)
        np.testing.assert_array_equal(action[member], alone)
        assert int(after.left[member]) == int(alone_after.left)


def test_vmapped_queues_ask_when_empty():
    """Queues under `vmap` ask only when one is empty."""
    weights = jnp.ones((3, 3))

    def step(queue):
        return next_action(queue, lambda: numbered(0.0) + (weights @ weights)[0, 0], PLACES)

    queues = ActionQueue(jnp.stack([numbered(1.0), numbered(2.0)]), jnp.asarray([1, 2], jnp.int32))
    program = jax.make_jaxpr(jax.vmap(step))(queues)
    outside = [equation.primitive.name for equation in program.eqns]
    assert "cond" in outside and "dot_general" not in outside
    assert jax.vmap(step)(queues)[0][:, 0].tolist() == [1.0, 2.0]
    emptied = queues._replace(left=jnp.asarray([0, 2], jnp.int32))
    assert jax.vmap(step)(emptied)[0][:, 0].tolist() == [3.0, 2.0]


def test_long_proposal_is_cut():
    """A proposal longer than the queue is cut to what is executed."""
    action, queue = next_action(empty_queue((), 2, DIM), lambda: numbered(1.0, steps=7), 2)
    assert float(action[0]) == 1.0 and int(queue.left) == 1 and float(queue.actions[0, 0]) == 2.0


def test_impossible_lengths_refused():
    """Impossible lengths are refused and named."""
    with pytest.raises(ConfigError, match="horizon must be at least 1"):
        empty_queue((), 0, DIM)
    with pytest.raises(ConfigError, match="the queue has 4 places"):
        next_action(empty_queue((), PLACES, DIM), lambda: numbered(0.0), 5)
    with pytest.raises(ConfigError, match="at least 3 steps"):
        next_action(empty_queue((), PLACES, DIM), lambda: numbered(0.0, steps=2), 3)
