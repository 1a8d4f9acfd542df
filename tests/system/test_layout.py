"""The forms in which a CPU runs updates give what the plain ones give, to float tolerance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.nn import kernels as layout
from o2o.nn.modules import CriticEnsemble, EnsembleDense, take_members
from o2o.replay.buffer import OfflineData, ReplayBuffer
from o2o.replay.device import DeviceReplay, insert
from o2o.replay.source import Ring, Sampling, batch_shapes
from o2o.train import programs
from o2o.types import Array
from tests.helpers.contract import QUICK, ROWS, Case, make_batch
from tests.helpers.tiny import forget_many_programs

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


def value_and_grads(function: Any, *args: Any) -> Any:
    """Return a function's values, and the gradients of a sum of them that no two entries share a weight in."""

    def weighed(*args: Any) -> Any:
        values = function(*args)
        return jnp.sum(values * jnp.cos(jnp.arange(values.size)).reshape(values.shape)), values

    grads, values = jax.grad(weighed, argnums=tuple(range(len(args))), has_aux=True)(*args)
    return values, grads


def draws(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def plain_norm(x: Any, scale: Any, bias: Any, lead: int) -> Any:
    spread = lambda row: row.reshape(*row.shape[:lead], *(1,) * (x.ndim - row.ndim), row.shape[-1])  # noqa: E731
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-3) * spread(scale) + spread(bias)


CASES = {
    "one layer": (layout.product, lambda x, w: x @ w, draws((4, 5, 3), (3, 6))),
    "a layer each": (layout.product, lambda x, w: jnp.einsum("e...i,eio->e...o", x, w), draws((2, 4, 5, 3), (2, 3, 6))),
    "one bias": (layout.add_row, lambda x, row: x + row, draws((4, 5, 6), (6,))),
    "a bias each": (layout.add_row, lambda x, row: x + row[:, None, None], draws((2, 4, 5, 6), (2, 6))),
    "centring": (layout.centred, lambda x: x - jnp.mean(x, axis=-1, keepdims=True), draws((2, 4, 6))),
    "one norm": (
        lambda x, s, b: layout.unit_rows(x, s, b, 1e-3), lambda x, s, b: plain_norm(x, s, b, 0),
        draws((4, 5, 6), (6,), (6,)),
    ),
    "a norm each": (
        lambda x, s, b: layout.unit_rows(x, s, b, 1e-3), lambda x, s, b: plain_norm(x, s, b, 1),
        draws((2, 4, 5, 6), (2, 6), (2, 6)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("back_end", ["cpu", "gpu"])
def test_values_and_gradients(case: str, back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are the plain ones."""
    monkeypatch.setattr(jax, "default_backend", lambda: back_end)
    ours, plain, args = CASES[case]
    wanted = value_and_grads(plain, *args)
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(wanted))
    mapped = jax.vmap(lambda *one: value_and_grads(ours, *one))(*(jnp.stack([arg, 2.0 * arg]) for arg in args))
    twice = value_and_grads(plain, *(2.0 * arg for arg in args))
    for found, expected in ((value_and_grads(ours, *args), wanted), (mapped, (wanted, twice))):
        if found is mapped:
            expected = jax.tree.map(lambda *both: jnp.stack(both), *expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_cpu_only_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows and means are products on a CPU only."""
    x = jnp.ones((4, 6))
    for back_end, products in (("cpu", 2), ("gpu", 0)):
        monkeypatch.setattr(jax, "default_backend", lambda name=back_end: name)
        text = str(jax.make_jaxpr(lambda x: (layout.sum_rows(x), layout.mean_features(x)))(x))
        assert text.count("dot_general") == products


WITH_CRITICS = ("iql", "calql", "rlpd", "expo", "qc", "residual")
"""Agents that do different things with their critics; the others are among these in this respect."""


@pytest.mark.parametrize("name", WITH_CRITICS)
def test_cpu_update_matches_plain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update as a CPU runs it equals the plain one.

    Adam's first steps have the size of the rate whatever the gradient: a gradient of 0 may come out either way.
    """
    forget_many_programs()
    case = Case(name, "online")
    ours, our_info = case.updated
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    update = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)
    agent, info = update(case.agent, case.batch(3))
    bad, size = differing(agent, ours, 1e-5)
    assert size > 500 and bad <= 0.01 * size, f"{bad} of {size} numbers differ"
    for key in info:
        np.testing.assert_allclose(our_info[key], info[key], rtol=1e-3, atol=1e-4, err_msg=key)


def test_drawn_members() -> None:
    """Members that were drawn are evaluated alone."""
    critic = CriticEnsemble((16, 16), num=5, layer_norm=True)
    observations, actions = jax.random.normal(KEY, (7, 3)), jax.random.normal(jax.random.key(6), (4, 7, 2))
    params: Any = critic.init(KEY, observations, actions)
    values: Any = critic.apply(params, observations, actions)
    assert values.shape == (5, 4, 7) and np.std(values) > 0.01
    two: Any = critic.clone(num=2).apply(take_members(params, jnp.array([3, 1])), observations, actions)
    np.testing.assert_allclose(two, values[jnp.array([3, 1])], rtol=1e-5, atol=1e-5)


def test_centred_weights() -> None:
    """Centred weights are a layer norm's first half."""
    x = jax.random.normal(KEY, (3, 6, 4))
    plain, centred = EnsembleDense(3, 8), EnsembleDense(3, 8, centred=True)
    params = plain.init(KEY, x)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(KEY, leaf.shape), params)
    product: Any = plain.apply(params, x)
    wanted = product - product.mean(axis=-1, keepdims=True)
    assert np.abs(product.mean(axis=-1)).max() > 0.1
    np.testing.assert_allclose(centred.apply(params, x), wanted, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def stacked(seeds: int) -> tuple[Any, OfflineData]:
    """Return different agents `[S]` in online form and a dataset of `ROWS` rows."""
    case = Case("iql", "online")
    agent = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(case.create(jax.random.key(s)) for s in range(seeds)))
    rows = {key: leaf[0] for key, leaf in make_batch(1).items() if key != "mc_returns"} | {"ends": jnp.zeros(ROWS)}
    return agent, OfflineData.create(jax.tree.map(np.asarray, rows), ("ends",))


def test_sequential_seeds_match_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that follow one another learn what batched ones learn."""
    agent, data = stacked(2)
    keys = jax.random.split(KEY, 2)
    replay, sampling = DeviceReplay(data, 2, 16), Sampling(4, 2)
    replay.begin((), 16, "append", None)
    totals = programs.zeros_of(lambda a, b: a.update(b), agent, replay.batch_shapes(sampling))
    (source, _), *_ = replay.dataset(keys, 0, 3, sampling)
    ring = replay.source(keys, 0, sampling)

    def offline(agent: Any, keys: Any) -> Any:
        return programs.updates.__wrapped__(agent, totals, source, keys, 0, 3, sampling=sampling)

    def online(agent: Any, keys: Any) -> Any:
        return programs.learn.__wrapped__(agent, totals, ring, keys, 0, sampling=sampling)

    for program in (offline, online):  # not compiled ones: what is compiled does not know the threshold
        batched = jax.jit(lambda *args, p=program: p(*args))(agent, keys)
        with monkeypatch.context() as patch:
            patch.setattr(layout, "BATCHED_NUMBERS", 1)
            traced = jax.jit(lambda *args, p=program: p(*args)).trace(agent, keys)
        assert "length=2" in str(traced.jaxpr)
        in_turn = traced.lower().compile()(agent, keys)
        bad, size = differing(in_turn, batched, 1e-5)
        moved, _ = differing(in_turn[0], agent, 1e-5)
        assert moved > 0.3 * size and bad <= 0.01 * size, f"{bad} of {size} numbers differ"


def test_seed_layout_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of seeds goes by their size, on a CPU only."""
    small, large = ({"w": jax.ShapeDtypeStruct((3, size), jnp.float32)} for size in (10_000, 3_000_000))
    assert not layout.seeds_in_turn(small) and layout.seeds_in_turn(large)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not layout.seeds_in_turn(large)


def test_untaken_branch_skipped() -> None:
    """A branch that no seed takes is not computed for batched ones."""

    def step(flag: Array, x: Array) -> Array:
        return layout.branch(flag, lambda x: x @ x, lambda x: x - 1.0, x)

    x = jnp.stack([jnp.full((2, 2), value) for value in (1.0, 2.0, 3.0)])
    for flags in ([False, False, False], [True, False, True], [True, True, True]):
        want = [each @ each if flag else each - 1.0 for flag, each in zip(flags, x, strict=True)]
        np.testing.assert_array_equal(jax.jit(jax.vmap(step))(jnp.asarray(flags), x), jnp.stack(want))
        each = [jax.jit(step)(jnp.asarray(flag), one) for flag, one in zip(flags, x, strict=True)]
        np.testing.assert_array_equal(jnp.stack(each), jnp.stack(want))
    program = jax.make_jaxpr(jax.vmap(step))(jnp.zeros(3, bool), x)
    outside = [equation.primitive.name for equation in program.eqns]
    assert "cond" in outside and "dot_general" not in outside
    alike = jax.vmap(step, in_axes=(None, 0))(jnp.asarray(True), x)
    np.testing.assert_array_equal(alike, x @ x)


@pytest.mark.parametrize(("seeds", "batched"), [(1, True), (2, True), (2, False)])
def test_step_copies_no_buffer(seeds: int, batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step copies nothing of the size of the replay buffer.

    Neither storing a row nor learning from a million of them needs room for another one.
    """
    if not batched:
        monkeypatch.setattr(layout, "BATCHED_NUMBERS", 1)
        jax.clear_caches()  # what is compiled does not know the threshold
    agent, data = stacked(seeds)
    keys = jax.random.split(KEY, seeds)
    sampling = Sampling(ROWS)

    def begin() -> ReplayBuffer:
        replay = DeviceReplay(data, seeds, 1_000_000)
        replay.begin((), 1_000_000, "online", None)
        assert replay.buffer is not None
        return replay.buffer

    buffer = jax.eval_shape(begin)
    ring = Ring(buffer, None)
    totals = programs.zeros_of(lambda a, b: a.update(b), agent, batch_shapes(ring, seeds, sampling))
    one = {key: jax.ShapeDtypeStruct((seeds, *leaf.shape[1:]), leaf.dtype) for key, leaf in data.rows.items()}
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(buffer))
    over = jax.ShapeDtypeStruct((seeds, 1), bool)
    seen = jax.ShapeDtypeStruct((seeds, 1, *one["observations"].shape[1:]), jnp.float32)
    stored = insert.lower(buffer, None, one, pending=False)
    learnt = programs.learn_and_act.lower(
        agent, totals, None, ring, None, keys, 0, seen, over, 0,
        sampling=sampling, action_dim=one["actions"].shape[-1], random=False,
    )  # fmt: skip
    assert size > seeds * 40e6
    for lowered in (stored, learnt):
        memory: Any = lowered.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.02 * size
    assert stored.compile().memory_analysis().alias_size_in_bytes > 0.9 * size  # type: ignore[union-attr]
