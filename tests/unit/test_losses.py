"""Losses: numbers worked by hand, limits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.nn.modules import sample_members
from o2o.rl import losses


def test_td_target_values() -> None:
    """The TD target equals the one computed by hand."""
    targets = losses.td_target(jnp.array([1.0, -2.0]), jnp.array([1.0, 0.0]), jnp.array([10.0, 99.0]), 0.9)
    np.testing.assert_allclose(targets, [10.0, -2.0], rtol=1e-6)


def test_td_target_passes_no_gradient() -> None:
    ones = jnp.ones(3)
    grads = jax.grad(lambda v: losses.td_target(ones, ones, v, 0.9).sum())(ones)
    np.testing.assert_array_equal(grads, np.zeros(3))


def test_sample_members_replacement() -> None:
    """Ensemble members are sampled without and with replacement."""
    rngs = jax.random.split(jax.random.key(0), 300)
    distinct = np.asarray(jax.vmap(lambda rng: sample_members(rng, 4, 2, replace=False))(rngs))
    repeated = np.asarray(jax.vmap(lambda rng: sample_members(rng, 4, 2, replace=True))(rngs))
    assert np.all(distinct[:, 0] != distinct[:, 1])
    assert 0.15 < np.mean(repeated[:, 0] == repeated[:, 1]) < 0.35
    assert set(distinct.ravel()) == {0, 1, 2, 3}


def test_critic_loss_averages() -> None:
    """The critic loss averages over the members and the batch."""
    q = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    assert float(losses.critic_loss(q, jnp.array([1.0, 1.0]))) == pytest.approx((0 + 1 + 4 + 16) / 4)


def test_sac_actor_loss_values() -> None:
    """The SAC actor loss equals the one computed by hand."""
    loss = losses.sac_actor_loss(jnp.array([-1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.array(0.5))
    assert float(loss) == pytest.approx(((-0.5 - 3.0) + (1.0 - 4.0)) / 2)


@pytest.mark.parametrize(("entropy", "sign"), [(-3.0, -1.0), (-1.0, 1.0), (-2.0, 0.0)])
def test_temperature_follows_entropy(entropy: float, sign: float) -> None:
    """The temperature grows if and only if the entropy is below its target."""
    grad = jax.grad(losses.temperature_loss)(jnp.array(0.3), jnp.array(entropy), -2.0)
    assert np.sign(float(grad)) == sign  # a descent step moves alpha against the sign


def test_temperature_loss_stops_gradient() -> None:
    """The temperature loss passes no gradient to the entropy."""
    assert float(jax.grad(losses.temperature_loss, argnums=1)(jnp.array(0.3), jnp.array(-1.0), -2.0)) == 0.0


def test_expectile_loss_values() -> None:
    """The expectile loss equals the one computed by hand."""
    difference = jnp.array([2.0, -1.0])
    assert float(losses.expectile_loss(difference, 0.9)) == pytest.approx((0.9 * 4 + 0.1 * 1) / 2)
    assert float(losses.expectile_loss(difference, 0.5)) == pytest.approx(0.5 * (4 + 1) / 2)


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_expectile_minimiser(expectile: float) -> None:
    """The minimiser of the expectile loss solves its first-order condition."""
    samples = jnp.array([0.0, 1.0, 2.0, 7.0])
    descend = lambda _, v: v - 0.5 * jax.grad(lambda v: losses.expectile_loss(samples - v, expectile))(v)  # noqa: E731
    value = jax.jit(lambda v: jax.lax.fori_loop(0, 500, descend, v))(jnp.array(0.0))
    above = np.maximum(np.asarray(samples) - float(value), 0).sum()
    below = np.maximum(float(value) - np.asarray(samples), 0).sum()
    assert expectile * above == pytest.approx((1 - expectile) * below, rel=1e-3)
    assert (float(value) == pytest.approx(2.5, abs=1e-3)) == (expectile == 0.5)


def test_advantage_weights() -> None:
    """The advantage weights equal those computed by hand, with their cap and limits."""
    advantages = jnp.array([0.0, 1.0, -1.0, 50.0, 1e30, -1e30])
    weights = np.asarray(losses.advantage_weights(advantages, 2.0))
    np.testing.assert_allclose(weights, [1.0, np.exp(2), np.exp(-2), 100.0, 100.0, 0.0], rtol=1e-5)
    np.testing.assert_array_equal(losses.advantage_weights(advantages[:4], 0.0), np.ones(4))
    half = losses.advantage_weights(advantages.astype(jnp.bfloat16), 10.0)
    assert np.all(np.isfinite(np.asarray(half, np.float32)))


def test_conservative_gap_values() -> None:
    """The conservative gap equals the one computed by hand."""
    z = jnp.log(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
    gap = losses.conservative_gap(z, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(gap, [np.log(4.0), np.log(8.0) - 1.0], rtol=1e-6)


def test_conservative_gap_soft_maximum() -> None:
    """The conservative gap is a soft maximum over the proposals less the data's value."""
    z = jnp.array([[1.0], [5.0], [2.0]])
    soft = np.log(np.exp(1.0) + np.exp(5.0) + np.exp(2.0))
    assert float(losses.conservative_gap(z, jnp.array([0.5]))[0]) == pytest.approx(soft - 0.5, rel=1e-6)


def test_conservative_gap_log_volume() -> None:
    """The conservative gap with uniform proposals and a Q of zero is the log volume."""
    dims, samples = 3, 10
    entries = jnp.zeros((samples, 4)) - dims * jnp.log(0.5)
    gap = losses.conservative_gap(entries, jnp.zeros(4))
    np.testing.assert_allclose(gap, np.full(4, dims * np.log(2.0) + np.log(samples)), rtol=1e-6)


def test_conservative_gap_shapes() -> None:
    """The conservative gap keeps its shapes and the ensemble axis."""
    z = jax.random.normal(jax.random.key(0), (3, 5, 4))
    q = jax.random.normal(jax.random.key(1), (3, 4))
    gap = losses.conservative_gap(z, q)
    assert gap.shape == (3, 4)
    np.testing.assert_allclose(gap[1], losses.conservative_gap(z[1], q[1]), rtol=1e-6)
