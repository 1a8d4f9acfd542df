"""The forms in which a CPU runs updates give what the plain ones give, to float tolerance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o import dispatch, layout
from o2o.buffer import OfflineData
from o2o.networks import CriticEnsemble, EnsembleDense, split_members, stack_members, take_members
from tests.contract import QUICK, ROWS, Case, make_batch
from tests.tiny import forget_many_programs

KEY = jax.random.key(5)


def differing(ours: Any, plain: Any, tolerance: float) -> tuple[int, int]:
    """Return how many numbers differ by more than `tolerance`, and how many there are."""
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True)
    counts = [
        (int(np.sum(np.abs(np.asarray(a) - np.asarray(b)) > tolerance)), a.size)
        for a, b in pairs
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    return sum(bad for bad, _ in counts), sum(size for _, size in counts)


WITH_CRITICS = (
    "iql", "calql", "rlpd", "wsrl", "expo", "qc", "residual", "famo2o_cql", "ibrl",
)  # fmt: skip
"""Agents that do different things with their critics; the others are among these in this respect."""


@pytest.mark.parametrize("name", WITH_CRITICS)
def test_an_update_with_separate_members_equals_the_stacked_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's first steps have the size of the rate whatever the gradient: a gradient of 0 may come out either way."""
    forget_many_programs()
    monkeypatch.setattr(layout, "APART_FROM", 0)
    monkeypatch.setattr(layout, "APART_MEMBERS", 0)
    case = Case(name, "online")
    split = layout._convert(case.agent, split_members)
    assert jax.tree.structure(split) != jax.tree.structure(case.agent)

    separate = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)
    agent, info = separate(split, case.batch(3))
    agent = layout._convert(agent, stack_members)
    plain, plain_info = case.updated
    bad, size = differing(agent, plain, 1e-5)
    assert size > 500 and bad <= 0.01 * size, f"{bad} of {size} numbers differ"
    for key in plain_info:
        np.testing.assert_allclose(info[key], plain_info[key], rtol=1e-3, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("shared_output", [False, True])
def test_separate_members_are_the_stacked_ones_and_can_be_drawn(shared_output: bool) -> None:
    critic = CriticEnsemble((16, 16), num=5, layer_norm=True, shared_output=shared_output)
    observations, actions = jax.random.normal(KEY, (7, 3)), jax.random.normal(jax.random.key(6), (4, 7, 2))
    params: Any = critic.init(KEY, observations, actions)
    split = split_members(params)
    assert len(split["params"]["dense_0"]["kernel"]) == 5 and jax.tree.structure(split) != jax.tree.structure(params)
    values: Any = critic.apply(params, observations, actions)
    assert values.shape == (5, 4, 7) and np.std(values) > 0.01
    np.testing.assert_allclose(critic.apply(split, observations, actions), values, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    for one, other in zip(jax.tree.leaves(stack_members(split)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    drawn = take_members(split, jnp.array([3, 1]))
    two: Any = critic.clone(num=2).apply(drawn, observations, actions)
    np.testing.assert_allclose(two, values[jnp.array([3, 1])], rtol=1e-5, atol=1e-5)


def test_centred_weights_are_a_layer_norms_first_half() -> None:
    x = jax.random.normal(KEY, (3, 6, 4))
    plain, centred = EnsembleDense(3, 8), EnsembleDense(3, 8, centred=True)
    params = plain.init(KEY, x)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(KEY, leaf.shape), params)
    product: Any = plain.apply(params, x)
    wanted = product - product.mean(axis=-1, keepdims=True)
    assert np.abs(product.mean(axis=-1)).max() > 0.1
    np.testing.assert_allclose(centred.apply(params, x), wanted, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_one_seed_on_a_cpu_works_with_separate_members_and_stores_stacked_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Case("rlpd", "offline").agent
    tree = jax.tree.structure(agent)
    assert jax.tree.structure(layout.working(agent, 1)) == tree  # too small to be worth it
    monkeypatch.setattr(layout, "APART_FROM", 0)
    monkeypatch.setattr(layout, "APART_MEMBERS", 0)
    assert layout.working(agent, 2) is agent and layout.stored(agent, 2) is agent
    working = layout.working(agent, 1)
    if jax.default_backend() != "cpu":
        assert working is agent
        return
    for split in (working.critic.params, working.target_critic, working.critic.opt_state[0].mu):
        assert isinstance(split["params"]["dense_0"]["kernel"], tuple)
    assert jax.tree.structure(layout.stored(working, 1)) == tree


def test_a_sum_in_pieces_has_the_values_and_gradients_of_the_whole() -> None:
    x, y = jax.random.normal(KEY, (12, 3)), jax.random.normal(jax.random.key(1), (12,))

    def function(params: Any, varied: Any, fixed: Any) -> Any:
        error = jnp.tanh(fixed @ params["w"]) * varied
        return jnp.sum(error**2), {"largest": jnp.sum(error > 0.5)}

    def loss(params: Any, varied: Any, size: int | None) -> Any:
        total, info = layout.sum_in_pieces(function, size, params, varied, x)
        return 0.5 * total, info

    params = {"w": jnp.array([0.5, -1.0, 2.0])}
    whole = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, y, None)
    for size in (3, 4, 5, 12):  # 5 does not divide the rows: nothing is cut
        pieces = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)(params, y, size)
        assert int(pieces[0][1]["largest"]) == int(whole[0][1]["largest"]) > 0
        for one, other in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    value, _ = loss(params, y, 4)
    np.testing.assert_allclose(value, whole[0][0], rtol=1e-6)
    text = str(jax.make_jaxpr(lambda p: jax.grad(lambda q: loss(q, y, 4)[0])(p))(params))
    assert text.count("scan[") == 1  # one pass: the gradient comes with the value


def test_a_step_copies_nothing_of_the_size_of_the_replay_buffer() -> None:
    """Neither storing a row nor learning from a million of them needs room for another one."""
    agent = jax.tree.map(lambda leaf: leaf[None], Case("iql", "online").agent)
    rows = {key: leaf[0] for key, leaf in make_batch(1).items() if key != "mc_returns"} | {"ends": jnp.zeros(ROWS)}
    data = OfflineData.create(jax.tree.map(np.asarray, rows), ("ends",))
    keys = jax.random.split(KEY, 1)
    state = jax.eval_shape(lambda a: dispatch.fresh_online_state(a, keys, data, 1_000_000, append=False), agent)
    one = {key: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for key, leaf in data.rows.items()}
    mode = dispatch.OnlineMode(1, True, False, False, 1, ROWS, 0.0)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.buffer))
    ended = jax.ShapeDtypeStruct((1,), bool)
    insert = dispatch.insert.lower(state.buffer, None, one, seeds=1, pending=False)
    learn = dispatch.learn_and_choose.lower(
        state.agent,
        state.carry,
        state.rng,
        state.totals,
        state.buffer,
        None,
        None,
        one["observations"],
        ended,
        mode=mode,
    )
    assert size > 40e6
    for lowered in (insert, learn):
        memory: Any = lowered.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.02 * size
    assert insert.compile().memory_analysis().alias_size_in_bytes > 0.9 * size  # type: ignore[union-attr]
