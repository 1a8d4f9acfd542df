"""Observation normalisation: the statistics, constant dimensions, and that it never changes by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.data.normalizer import Normalizer, normalize, normalized_rows
from o2o.errors import ConfigError

OBSERVATIONS = np.random.default_rng(0).normal([3.0, -50.0, 0.0], [2.0, 1e-3, 10.0], (5000, 3)).astype(np.float32)


def test_statistics_match_td3_bc() -> None:
    """The statistics are those of TD3+BC."""
    normalizer = Normalizer.fit(OBSERVATIONS)
    expected = OBSERVATIONS.astype(np.float64)
    np.testing.assert_allclose(normalizer.mean, expected.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(normalizer.std, expected.std(axis=0) + 1e-3, rtol=1e-6)
    assert normalizer.mean.dtype == normalizer.std.dtype == jnp.float32
    out = np.asarray(normalizer(OBSERVATIONS))
    np.testing.assert_allclose(out.mean(axis=0), 0.0, atol=1e-2)
    np.testing.assert_allclose(out.std(axis=0)[[0, 2]], 1.0, atol=1e-2)


def test_constant_dimension_only_centred() -> None:
    """A dimension that never varies is only centred."""
    observations = np.tile(np.asarray([7.0, 1e6, 0.0], np.float32), (100, 1))
    observations[:, 2] = np.linspace(-1, 1, 100)
    normalizer = Normalizer.fit(observations)
    np.testing.assert_array_equal(normalizer.std[:2], 1.0)
    np.testing.assert_allclose(normalizer(np.asarray([7.5, 1e6 + 3, 0.0], np.float32)), [0.5, 3.0, 0.0], atol=1e-6)


def test_leading_axes_under_jit_vmap() -> None:
    """Any leading axes are normalised, under `jit` and `vmap` too."""
    normalizer = Normalizer.fit(jnp.asarray(OBSERVATIONS))
    one = np.asarray(normalizer(OBSERVATIONS[0]))
    batch = OBSERVATIONS[:6].reshape(2, 3, 3)
    jitted = jax.jit(lambda n, o: n(o))(normalizer, batch)
    mapped = jax.vmap(normalize, in_axes=(None, 0))(normalizer, batch)
    np.testing.assert_allclose(jitted[0, 0], one, rtol=1e-6)
    np.testing.assert_allclose(jitted, mapped, rtol=1e-6)


def test_no_normalizer_is_identity() -> None:
    """Without a normalizer, observations pass untouched."""
    assert normalize(None, OBSERVATIONS) is OBSERVATIONS
    image = {"camera": np.zeros((2, 2, 3), np.uint8)}
    assert normalize(None, image) is image


def test_std_floor() -> None:
    """A floor holds the standard deviation up."""
    normalizer = Normalizer.fit(OBSERVATIONS, floor=0.1)
    deviations = OBSERVATIONS.astype(np.float64).std(axis=0)
    np.testing.assert_allclose(normalizer.std, [deviations[0], 0.1, deviations[2]], rtol=1e-6)
    np.testing.assert_allclose(Normalizer.fit(np.ones((5, 2), np.float32), floor=0.1).std, 0.1)
    with pytest.raises(ConfigError, match="std_floor is 0"):
        Normalizer.fit(OBSERVATIONS, floor=0.0)


def test_dict_normalises_state_only() -> None:
    """Of a dict, only the state is normalised."""
    others = {"camera": np.full((5000, 2, 2, 3), 7, np.uint8), "base_action": np.ones((5000, 2), np.float32)}
    observations = {"state": OBSERVATIONS, **others}
    normalizer = Normalizer.fit(observations)
    found = normalize(normalizer, observations)
    np.testing.assert_allclose(found["state"], normalizer(OBSERVATIONS))
    assert all(found[key] is others[key] for key in others)
    pair = {"observations": observations, "next_observations": observations}
    rows = normalized_rows(normalizer, {**pair, "actions": others["base_action"]})
    assert isinstance(rows["observations"]["state"], np.ndarray) and rows["observations"]["camera"].dtype == np.uint8
    assert rows["actions"] is others["base_action"]


def test_images_alone_refused() -> None:
    """Images alone are refused."""
    with pytest.raises(ConfigError, match="flat float32 observations, not on images"):
        Normalizer.fit({"camera": np.zeros((10, 2, 2, 3), np.uint8)})
