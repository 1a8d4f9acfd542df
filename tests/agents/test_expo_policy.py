"""EXPO: the on-the-fly operator and its selection, alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents.expo import Choice, on_the_fly, select
from tests.helpers.tiny import ACTION_DIM, ROWS, moved
from tests.helpers.toy_expo import EDITS, KEY, N

SAMPLES = jax.random.uniform(jax.random.key(1), (N, ROWS, ACTION_DIM), minval=-1.0, maxval=1.0)


def fixed_edit(rng: Any, actions: Any) -> Any:
    return jnp.tanh(jax.random.normal(rng, actions.shape))


def fixed_score(rng: Any, actions: Any) -> Any:
    """Score by the distance to a random point."""
    return -jnp.sum(jnp.square(actions - jax.random.normal(rng, (ACTION_DIM,))), axis=-1)


def refuse(rng: Any, actions: Any) -> Any:
    raise AssertionError("must not be called")


def choice_of(scale: float = 0.3, n_edits: int = EDITS, **options: Any) -> Choice:
    return on_the_fly(SAMPLES, fixed_edit, fixed_score, KEY, n_edits=n_edits, scale=scale, **options)


def test_zero_scale_edits() -> None:
    """Scale zero repeats the base samples and is the best of N."""
    without, zero = choice_of(n_edits=0), choice_of(scale=0.0)
    np.testing.assert_array_equal(zero.candidates[N:], SAMPLES[:EDITS])
    np.testing.assert_array_equal(zero.actions, without.actions)
    assert moved(choice_of().actions, without.actions)


def test_best_of_n_without_edits() -> None:
    """Without edits it is the best of N."""
    choice = on_the_fly(SAMPLES, refuse, fixed_score, KEY, n_edits=0, scale=0.3)
    np.testing.assert_array_equal(choice.candidates, SAMPLES)
    best = np.asarray(choice.scores).argmax(axis=0)
    assert len(set(best)) > 1
    np.testing.assert_array_equal(choice.actions, np.asarray(SAMPLES)[best, np.arange(ROWS)])


def test_single_sample() -> None:
    """A single sample is neither edited nor scored."""
    choice = on_the_fly(SAMPLES[:1], refuse, refuse, KEY, n_edits=1, scale=0.3)
    np.testing.assert_array_equal(choice.actions, SAMPLES[0])
    assert not choice.place.any() and not choice.entropy.any()


def test_edits_within_bounds() -> None:
    """The first samples are edited within the scale and the box."""
    choice = choice_of(scale=0.7)
    assert choice.candidates.shape == (N + EDITS, ROWS, ACTION_DIM)
    np.testing.assert_array_equal(choice.candidates[:N], SAMPLES)
    edits = np.abs(choice.candidates[N:] - SAMPLES[:EDITS])
    assert 0.0 < edits.min() and 0.35 < edits.max() <= 0.7
    assert float(jnp.abs(choice.candidates).max()) == 1.0, "some edits reach beyond the box and are clipped"
    inner = SAMPLES[:EDITS] + 0.7 * fixed_edit(jax.random.split(KEY, 3)[0], SAMPLES[:EDITS])
    np.testing.assert_allclose(choice.candidates[N:], jnp.clip(inner, -1.0, 1.0), atol=1e-6)
    np.testing.assert_array_equal(choice.scores, fixed_score(jax.random.split(KEY, 3)[1], choice.candidates))


def test_highest_score_chosen() -> None:
    """The chosen score is the highest of all candidates."""
    choice = choice_of()
    won = np.asarray(choice.scores)[choice.place, np.arange(ROWS)]
    np.testing.assert_array_equal(won, choice.scores.max(axis=0))
    np.testing.assert_array_equal(choice.actions, np.asarray(choice.candidates)[choice.place, np.arange(ROWS)])
    places = np.asarray(choice.place)
    assert places.min() < N <= places.max(), "both kinds win somewhere"


def test_soft_selection() -> None:
    """Soft selection draws by the exponential of the score and knows its entropy."""
    scores, kappa = jnp.asarray([0.0, 1.0, 0.3]), 2.0
    weights = np.exp(kappa * np.asarray(scores))
    weights /= weights.sum()
    rows = jnp.broadcast_to(scores[:, None], (3, 20_000))
    places, entropy = select(rows, KEY, "soft", kappa)
    np.testing.assert_allclose(np.bincount(np.asarray(places)) / 20_000, weights, atol=0.015)
    np.testing.assert_allclose(entropy, -(weights * np.log(weights)).sum(), rtol=1e-5)
    best, nothing = select(scores, KEY, "max", kappa)
    assert int(best) == 1 and float(nothing) == 0.0
    sharp, entropy = select(scores, KEY, "soft", 1e3)
    assert int(sharp) == 1 and float(entropy) == pytest.approx(0.0, abs=1e-6)
