"""Distributions: densities against SciPy-free references, quadrature and change of variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.nn.distributions import Normal, TanhNormal

MEAN = jnp.array([0.3, -0.8])
STD = jnp.array([0.5, 1.2])


def normal_density(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Return the textbook density of N(mean, std^2)."""
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))


def test_normal_log_prob() -> None:
    """The normal's log probability is the sum of the textbook log densities."""
    actions = np.array([[0.1, -0.2], [1.5, 0.4]])
    expected = np.log(normal_density(actions[:, 0], 0.3, 0.5)) + np.log(normal_density(actions[:, 1], -0.8, 1.2))
    np.testing.assert_allclose(Normal(MEAN, STD).log_prob(jnp.asarray(actions)), expected, rtol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.4), (-1.0, 0.8), (0.0, 0.1)])
def test_tanh_normal_integrates_to_one(mean: float, std: float) -> None:
    """The density of the tanh normal integrates to one."""
    edges = np.linspace(-0.99999, 0.99999, 40_001)
    dist = TanhNormal(jnp.array([mean]), jnp.array([std]))
    density = np.exp(np.asarray(dist.log_prob(jnp.asarray(edges)[:, None])))
    assert np.trapezoid(density, edges) == pytest.approx(1.0, abs=2e-3)


def test_tanh_normal_log_prob() -> None:
    """The tanh normal's log probability matches the numerical change of variables."""
    pre_tanh = np.array([-2.0, -0.5, 0.0, 0.3, 1.7])
    step = 1e-6
    slope = (np.tanh(pre_tanh + step) - np.tanh(pre_tanh - step)) / (2 * step)
    expected = np.log(normal_density(pre_tanh, 0.2, 0.9)) - np.log(slope)
    dist = TanhNormal(jnp.array([0.2]), jnp.array([0.9]))
    np.testing.assert_allclose(dist.log_prob(jnp.asarray(np.tanh(pre_tanh))[:, None]), expected, atol=1e-4)


def test_tanh_normal_sample_log_prob() -> None:
    """`sample_and_log_prob` of the tanh normal agrees with `log_prob`."""
    dist = TanhNormal(jnp.tile(MEAN, (5, 1)), jnp.tile(STD, (5, 1)))
    actions, log_prob = dist.sample_and_log_prob(jax.random.key(0), (7,))
    assert actions.shape == (7, 5, 2) and log_prob.shape == (7, 5)
    np.testing.assert_allclose(dist.log_prob(actions), log_prob, atol=2e-3)
    np.testing.assert_array_equal(dist.sample(jax.random.key(0), (7,)), actions)


def test_tanh_normal_entropy() -> None:
    """The tanh normal's entropy estimate matches quadrature."""
    dist = TanhNormal(jnp.array([0.4]), jnp.array([0.6]))
    edges = np.linspace(-0.99999, 0.99999, 40_001)
    log_density = np.asarray(dist.log_prob(jnp.asarray(edges)[:, None]))
    entropy = -np.trapezoid(np.exp(log_density) * log_density, edges)
    _, log_prob = dist.sample_and_log_prob(jax.random.key(1), (20_000,))
    assert -float(log_prob.mean()) == pytest.approx(entropy, abs=0.02)


def test_tanh_normal_finite_at_bounds() -> None:
    """The tanh normal is finite, with its gradients, at and near the bounds."""

    def log_prob(mean: jax.Array, actions: jax.Array) -> jax.Array:
        return TanhNormal(mean, STD).log_prob(actions).sum()

    for bound in (1.0, -1.0, 0.99999):
        value, grads = jax.value_and_grad(log_prob)(MEAN, jnp.full((2,), bound))
        assert np.isfinite(value) and np.all(np.isfinite(grads))
    _, far = TanhNormal(jnp.array([30.0]), jnp.array([1.0])).sample_and_log_prob(jax.random.key(0))
    assert np.isfinite(far)


def test_distribution_modes() -> None:
    """The modes are the mean and its tanh."""
    np.testing.assert_array_equal(Normal(MEAN, STD).mode(), MEAN)
    np.testing.assert_allclose(TanhNormal(MEAN, STD).mode(), np.tanh(MEAN), rtol=1e-6)


def test_samples_are_reparameterised() -> None:
    grads = jax.grad(lambda mean: TanhNormal(mean, STD).sample(jax.random.key(3)).sum())(MEAN)
    actions = TanhNormal(MEAN, STD).sample(jax.random.key(3))
    np.testing.assert_allclose(grads, 1.0 - np.square(actions), rtol=1e-4)


def test_normal_sample_moments() -> None:
    """Samples of the normal have the stated moments."""
    actions = Normal(MEAN, STD).sample(jax.random.key(4), (20_000,))
    np.testing.assert_allclose(actions.mean(axis=0), MEAN, atol=0.03)
    np.testing.assert_allclose(actions.std(axis=0), STD, atol=0.03)
