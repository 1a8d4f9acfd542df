"""Networks: shapes, ensembles, initial values, optimisers by value."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from o2o.nn.distributions import Normal, TanhNormal
from o2o.nn.modules import (
    MLP,
    Adam,
    CriticEnsemble,
    EnsembleDense,
    EnsembleLayerNorm,
    GaussianActor,
    Model,
    Scalar,
    Value,
    kernel_init,
    take_members,
)

KEY = jax.random.key(0)
OBSERVATIONS = jax.random.normal(jax.random.key(1), (6, 3))
ACTIONS = jnp.tanh(jax.random.normal(jax.random.key(2), (6, 2)))


def apply(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return a module's output (Linen's own type is a union with its mutable collections)."""
    return module.apply(*args, **kwargs)


def init(module: nn.Module, *args: Any) -> Any:
    """Return a module's fresh parameters."""
    return module.init(*args)


def orthogonal_gain(kernel: jax.Array) -> float:
    """Return the gain of a kernel `[in, out]` whose singular values must all be equal."""
    singular = np.linalg.svd(np.asarray(kernel), compute_uv=False)
    np.testing.assert_allclose(singular, singular[0], rtol=1e-4)
    return float(singular[0])


def test_ensemble_members_differ() -> None:
    """The ensemble's members differ and have the right shape."""
    critic = CriticEnsemble((8, 8), num=4)
    q = apply(critic, init(critic, KEY, OBSERVATIONS, ACTIONS), OBSERVATIONS, ACTIONS)
    assert q.shape == (4, 6)
    for first in range(4):
        for second in range(first):
            assert not np.allclose(q[first], q[second])


@pytest.mark.parametrize("shared_output", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_taken_members_match_ensemble(shared_output: bool, layer_norm: bool) -> None:
    """Members taken alone equal the rows of the full ensemble."""
    critic = CriticEnsemble((8, 8), num=5, layer_norm=layer_norm, shared_output=shared_output)
    params = init(critic, KEY, OBSERVATIONS, ACTIONS)
    members = jnp.array([3, 1, 3])
    full = apply(critic, params, OBSERVATIONS, ACTIONS)
    taken = apply(critic.clone(num=3), take_members(params, members), OBSERVATIONS, ACTIONS)
    np.testing.assert_allclose(taken, full[members], rtol=1e-5, atol=1e-6)


def test_shared_output_layer() -> None:
    """A shared output has one layer, and the default has one per member."""
    own = init(CriticEnsemble((8,), num=4), KEY, OBSERVATIONS, ACTIONS)["params"]
    shared = init(CriticEnsemble((8,), num=4, shared_output=True), KEY, OBSERVATIONS, ACTIONS)["params"]
    assert own["output"]["kernel"].shape == (4, 8, 1)
    assert shared["shared_output"]["kernel"].shape == (8, 1)
    assert orthogonal_gain(shared["shared_output"]["kernel"]) == pytest.approx(np.sqrt(2), rel=1e-4)


def test_ensemble_matches_dense_loop() -> None:
    """The ensemble equals a loop over plain dense layers."""
    critic = CriticEnsemble((8,), num=3)
    params = init(critic, KEY, OBSERVATIONS, ACTIONS)
    q = apply(critic, params, OBSERVATIONS, ACTIONS)
    x = np.concatenate([OBSERVATIONS, ACTIONS], axis=-1)
    hidden, output = params["params"]["dense_0"], params["params"]["output"]
    for i in range(3):
        h = np.maximum(x @ np.asarray(hidden["kernel"][i]) + np.asarray(hidden["bias"][i]), 0.0)
        expected = h @ np.asarray(output["kernel"][i]) + np.asarray(output["bias"][i])
        np.testing.assert_allclose(q[i], expected[:, 0], rtol=1e-4, atol=1e-5)


def test_members_are_independent() -> None:
    """One member does not depend on the others."""
    critic = CriticEnsemble((8, 8), num=3)
    params = init(critic, KEY, OBSERVATIONS, ACTIONS)
    grads = jax.grad(lambda p: apply(critic, p, OBSERVATIONS, ACTIONS)[1].sum())(params)
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf[0], np.zeros_like(leaf[0]))
        np.testing.assert_array_equal(leaf[2], np.zeros_like(leaf[2]))


def test_critic_broadcasts_actions() -> None:
    """The critic broadcasts many actions over one observation."""
    critic = CriticEnsemble((8,), num=2)
    params = init(critic, KEY, OBSERVATIONS, ACTIONS)
    many = jax.random.normal(KEY, (5, 6, 2))
    q = apply(critic, params, OBSERVATIONS, many)
    assert q.shape == (2, 5, 6)
    np.testing.assert_allclose(q[:, 3], apply(critic, params, OBSERVATIONS, many[3]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_ensemble_dense_keeps_batch_axes(stacked: bool) -> None:
    """The ensemble's dense layer keeps the batch axes."""
    layer = EnsembleDense(3, 4, stacked=stacked)
    x = jax.random.normal(KEY, (3, 5, 7, 2) if stacked else (5, 7, 2))
    assert apply(layer, init(layer, KEY, x), x).shape == (3, 5, 7, 4)


def test_ensemble_layer_norm_matches_flax() -> None:
    """The ensemble's layer norm equals Flax's layer norm for each member."""
    x = 3.0 + 2.0 * jax.random.normal(KEY, (2, 5, 8))
    scale, bias = jax.random.normal(jax.random.key(1), (2, 8)), jax.random.normal(jax.random.key(2), (2, 8))
    ours = apply(EnsembleLayerNorm(2), {"params": {"scale": scale, "bias": bias}}, x)
    for i in range(2):
        theirs = apply(nn.LayerNorm(), {"params": {"scale": scale[i], "bias": bias[i]}}, x[i])
        np.testing.assert_allclose(ours[i], theirs, rtol=1e-4, atol=1e-5)


def test_mlp_layer_order() -> None:
    """The MLP's order is dense, layer norm, ReLU, after the last layer too."""
    mlp = MLP((8, 4), layer_norm=True)
    params = init(mlp, KEY, OBSERVATIONS)
    x = np.asarray(OBSERVATIONS)
    for i in range(2):
        dense, norm = params["params"][f"Dense_{i}"], params["params"][f"LayerNorm_{i}"]
        x = x @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = np.maximum(x * np.asarray(norm["scale"]) + np.asarray(norm["bias"]), 0.0)
    np.testing.assert_allclose(apply(mlp, params, OBSERVATIONS), x, rtol=1e-3, atol=1e-4)


def test_initial_gains_and_biases() -> None:
    """The initial kernels have the stated orthogonal gains, and the biases are zero."""
    params = init(MLP((8, 8), last_gain=0.01), KEY, OBSERVATIONS)["params"]
    assert orthogonal_gain(params["Dense_0"]["kernel"]) == pytest.approx(np.sqrt(2), rel=1e-4)
    assert orthogonal_gain(params["Dense_1"]["kernel"]) == pytest.approx(0.01, rel=1e-4)
    assert not np.any(params["Dense_1"]["bias"])
    critic = init(CriticEnsemble((8, 8), num=2, last_gain=0.01), KEY, OBSERVATIONS, ACTIONS)["params"]
    assert orthogonal_gain(critic["dense_0"]["kernel"][1]) == pytest.approx(np.sqrt(2), rel=1e-4)
    assert orthogonal_gain(critic["dense_1"]["kernel"][1]) == pytest.approx(0.01, rel=1e-4)


def test_ensemble_fan_in() -> None:
    """The ensemble's fan-in ignores the member axis."""
    single = kernel_init("lecun")(KEY, (64, 64))
    stacked = init(EnsembleDense(10, 64, init_scheme="lecun", stacked=False), KEY, jnp.zeros((2, 64)))
    assert float(stacked["params"]["kernel"].std()) == pytest.approx(float(single.std()), rel=0.1)


def test_dropout_only_in_training() -> None:
    """Dropout acts only in training and keeps the mean."""
    mlp = MLP((256,), dropout=0.5)
    params = init(mlp, KEY, OBSERVATIONS)
    quiet = apply(mlp, params, OBSERVATIONS)
    np.testing.assert_array_equal(quiet, apply(mlp, params, OBSERVATIONS))
    noisy = apply(mlp, params, OBSERVATIONS, training=True, rngs={"dropout": KEY})
    assert not np.allclose(quiet, noisy)
    assert float(noisy.mean()) == pytest.approx(float(quiet.mean()), rel=0.15)


def test_actor_heads_and_bounds() -> None:
    """Each of the actor's heads has its distribution and keeps its bounds."""
    free = GaussianActor((8,), 2, std_mode="uniform", squash=False, tanh_mean=True, log_std_min=-5.0, log_std_max=2.0)
    params = init(free, KEY, OBSERVATIONS)
    np.testing.assert_array_equal(params["params"]["log_std"], np.zeros(2))
    dist = apply(free, params, OBSERVATIONS)
    assert isinstance(dist, Normal) and dist.mean.shape == dist.std.shape == (6, 2)
    assert np.all(np.abs(dist.mean) < 1.0)
    np.testing.assert_array_equal(dist.std, np.ones((6, 2)))
    params["params"]["log_std"] = jnp.array([-50.0, 50.0])
    np.testing.assert_allclose(apply(free, params, OBSERVATIONS).std[0], np.exp([-5.0, 2.0]), rtol=1e-5)
    head = GaussianActor((8,), 2)
    squashed = apply(head, init(head, KEY, OBSERVATIONS), OBSERVATIONS)
    assert isinstance(squashed, TanhNormal) and not np.allclose(squashed.std[0], squashed.std[1])


def test_std_clipped_to_range() -> None:
    """The standard deviation is clipped to its range."""
    actor = GaussianActor((8,), 2, std_mode="uniform")
    params = init(actor, KEY, OBSERVATIONS)
    params["params"]["log_std"] = jnp.array([-50.0, 50.0])
    np.testing.assert_allclose(apply(actor, params, OBSERVATIONS).std[0], [1e-5, 10.0], rtol=1e-5)


def test_value_and_scalar_shapes() -> None:
    """The value network and the scalar have their shapes."""
    value = Value((8,))
    assert apply(value, init(value, KEY, OBSERVATIONS), OBSERVATIONS).shape == (6,)
    scalar = apply(Scalar(0.7), init(Scalar(0.7), KEY))
    assert scalar.shape == () and float(scalar) == pytest.approx(0.7)


def test_first_adam_step_size() -> None:
    """The first Adam step moves by the learning rate."""
    model = Model.create(KEY, Scalar(1.0), Adam(0.1))
    grads = jax.grad(lambda params: 3.0 * model(params=params))(model.params)
    assert float(model.apply_gradients(grads)()) == pytest.approx(0.9, abs=1e-5)


def test_cosine_decay_reaches_zero() -> None:
    model = Model.create(KEY, Scalar(1.0), Adam(0.1, decay_steps=4))
    values = [float(model())]
    for _ in range(6):
        model = model.apply_gradients(jax.grad(lambda params: model(params=params))(model.params))  # noqa: B023
        values.append(float(model()))
    steps = -np.diff(values)
    expected = [0.1 * 0.5 * (1 + np.cos(np.pi * min(i, 4) / 4)) for i in range(6)]
    np.testing.assert_allclose(steps, expected, atol=1e-5)


def test_compare_by_value() -> None:
    """Optimisers and modules compare by value."""
    assert Adam(1e-3, 5) == Adam(1e-3, 5) and hash(Adam(1e-3, 5)) == hash(Adam(1e-3, 5))
    assert Adam(1e-3) != Adam(1e-4)
    first = Model.create(KEY, Value((8,)), Adam(), OBSERVATIONS)
    second = Model.create(jax.random.key(9), Value((8,)), Adam(), OBSERVATIONS)
    assert jax.tree.structure(first) == jax.tree.structure(second)


def test_weight_decay_without_gradient() -> None:
    """Weight decay shrinks parameters without a gradient."""
    model = Model.create(KEY, Scalar(1.0), Adam(0.1, weight_decay=0.5))
    assert isinstance(model.optimizer.build(), optax.GradientTransformation)
    still = model.apply_gradients(jax.tree.map(jnp.zeros_like, model.params))
    assert float(still()) == pytest.approx(1.0 - 0.1 * 0.5, abs=1e-5)
