"""Statistics against numbers worked out by hand or by another route."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from o2o.errors import ConfigError
from o2o.report.stats import aggregate, curve, interval, iqm, mean, probability_of_improvement


def row(phase, env_steps, gradient_steps, seed, value, metric="return"):
    return {"phase": phase, "env_steps": env_steps, "gradient_steps": gradient_steps, "seed": seed, metric: value}


def test_iqm_drops_outer_quarters():
    """The IQM drops a quarter on each side."""
    assert iqm([0, 1, 2, 3, 4, 5, 6, 100]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert iqm([-50, 1, 2, 4]) == pytest.approx(1.5)
    assert iqm([1.0, 2.0, 6.0]) == pytest.approx(3.0), "with three scores nothing is dropped"
    np.testing.assert_allclose(iqm(np.array([[3, 1, 2, 9], [0, 0, 1, 1]])), [2.5, 0.5])


def test_mean_interval_matches_theory():
    """The interval of the mean agrees with the normal theory."""
    scores = np.random.default_rng(3).normal(2.0, 5.0, size=400)
    low, high = interval(scores, mean, confidence=0.95, samples=4000)
    half = 1.96 * scores.std() / 20.0  # 20 = sqrt(400)
    assert low == pytest.approx(scores.mean() - half, abs=0.06)
    assert high == pytest.approx(scores.mean() + half, abs=0.06)


def test_interval_coverage():
    """The interval covers the truth as often as it says."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = interval(rng.normal(1.0, 1.0, size=20), mean, confidence=0.9, samples=400, seed=trial)
        covered += low <= 1.0 <= high
    # with n = 20 the percentile bootstrap covers a little less than it says (z for t, biased variance): about 0.87
    assert 0.82 <= covered / 300 <= 0.93


def test_interval_coverage_three_seeds():
    """The interval of three seeds covers the truth about three quarters of the time."""
    rng = np.random.default_rng(1)
    covered = sum(low <= 0.0 <= high for low, high in (interval(rng.normal(size=3), samples=200) for _ in range(400)))
    assert 0.65 <= covered / 400 <= 0.85


def test_interval_resamples_within_tasks():
    """The interval resamples within tasks only."""
    # Each task's seeds agree: however they are resampled, the mean over tasks stays 5. Mixing tasks would spread it.
    assert interval([[0.0, 0.0, 0.0], [10.0, 10.0, 10.0]], mean) == (5.0, 5.0)
    low, high = interval([[0.0, 0.0], [10.0, 10.0, 10.0]], mean)
    assert low == high == pytest.approx(6.0), "tasks may have unequal numbers of seeds"


def test_interval_reproducible():
    """The interval is reproducible and brackets the statistic."""
    scores = np.random.default_rng(5).exponential(size=(4, 6))
    assert interval(scores, iqm, seed=7) == interval(scores, iqm, seed=7)
    low, high = interval(scores, iqm)
    assert low < iqm(scores.reshape(-1)) < high
    narrow = interval(scores, iqm, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


@pytest.mark.parametrize("bad", [[], [[]], [1.0, float("nan")], [[1.0], [float("inf")]]])
def test_invalid_scores_refused(bad):
    """Scores that are no scores are refused."""
    with pytest.raises(ConfigError, match="score"):
        interval(bad)


def test_confidence_is_probability():
    """The confidence must be a probability."""
    with pytest.raises(ConfigError, match="between 0 and 1, got 95"):
        interval([1.0, 2.0], confidence=95)
    with pytest.raises(ConfigError, match="between 0 and 1, got 95"):
        probability_of_improvement([1.0, 2.0], [1.0, 3.0], confidence=95)


def test_improvement_counts_pairs():
    """The probability of improvement counts pairs."""
    # 4 > 1, 4 > 3, 2 > 1, 2 < 3: three of four pairs
    assert probability_of_improvement([4.0, 2.0], [1.0, 3.0])[0] == pytest.approx(0.75)
    assert probability_of_improvement([1.0, 1.0], [1.0])[0] == pytest.approx(0.5), "ties count half"
    value, low, high = probability_of_improvement([[2.0, 3.0], [0.0, 1.0]], [[0.0, 1.0], [2.0, 3.0]])
    assert (value, low, high) == (0.5, 0.5, 0.5), "sure win on one task, sure loss on the other"
    x, y = np.random.default_rng(2).normal(size=(2, 200))
    value, low, high = probability_of_improvement(x + 1.0, y)
    assert value == pytest.approx(0.760, abs=0.05)  # Phi(1 / sqrt 2)
    assert low < value < high
    with pytest.raises(ConfigError, match="1 against 2"):
        probability_of_improvement([1.0], [[1.0], [2.0]])


def test_improvement_matches_mann_whitney():
    """The probability of improvement is Mann-Whitney's U over all pairs."""
    rng = np.random.default_rng(11)
    x, y = rng.integers(0, 4, size=(3, 6)).astype(float), rng.integers(0, 4, size=(3, 5)).astype(float)  # with ties
    expected = np.mean([mannwhitneyu(a, b).statistic / (6 * 5) for a, b in zip(x, y, strict=True)])
    assert probability_of_improvement(x, y)[0] == pytest.approx(expected, abs=1e-12)


def test_single_seed_task_kept():
    """A task of one seed is kept beside others.

    Its only seed is in every resample: the interval is that of the other task, shifted and scaled.
    """
    alone = interval([1.0, 2.0, 6.0], mean)
    both = interval([[1.0, 2.0, 6.0], [8.0]], mean)
    np.testing.assert_allclose(both, [(3 * end + 8) / 4 for end in alone])
    assert interval([[3.0], [5.0]]) == (4.0, 4.0)
    assert probability_of_improvement([[2.0], [0.0]], [[1.0], [1.0]]) == (0.5, 0.5, 0.5)


def test_aggregate_keeps_seeds_apart():
    """`aggregate` averages episodes, then keeps seeds apart."""
    rows = [
        row("online", 100, 900, 0, 7.0),
        row("offline", 0, 500, 0, 1.0),
        row("offline", 0, 500, 0, 3.0),
        row("offline", 0, 500, 1, 10.0),
        row("offline", 0, 0, 1, 0.0),
        row("warmup", 50, 500, 1, None),
        row("warmup", 50, 500, 1, 4.0),
    ]
    points = aggregate(rows)
    assert [(p.phase, p.env_steps, p.gradient_steps) for p in points] == [
        ("offline", 0, 0),
        ("offline", 0, 500),
        ("warmup", 50, 500),
        ("online", 100, 900),
    ]
    assert points[1].scores == {0: 2.0, 1: 10.0}
    np.testing.assert_array_equal(points[1].values, [2.0, 10.0])
    assert points[2].scores == {1: 4.0}, "an episode without the metric is left out"
    with pytest.raises(ConfigError, match="unknown phase 'eval'"):
        aggregate([row("eval", 0, 0, 0, 1.0)])


def test_success_flags_become_rates():
    rows = [row("offline", 0, 10, 0, value, "success") for value in (True, False, False, True)]
    assert aggregate(rows, "success")[0].scores == {0: 0.5}


def test_curve_joins_phases():
    """A curve joins the phases at the switch."""
    rows = [row("offline", 0, step, seed, step + seed) for step in (0, 1000) for seed in range(3)]
    rows += [row("warmup", 50, 1000, seed, 900 + seed) for seed in range(3)]
    rows += [row("online", 200, 1600, seed, 2000 + 10 * seed) for seed in range(3)]
    result = curve(rows)
    assert result is not None and result.seeds == 3 and result.warmup_steps == 50
    np.testing.assert_array_equal(result.offline.steps, [0, 1000])
    np.testing.assert_array_equal(result.online.steps, [0, 50, 200])
    np.testing.assert_allclose(result.online.centre, [1001, 901, 2010])
    assert np.all(result.online.low <= result.online.centre) and np.all(result.online.centre <= result.online.high)
    assert curve(rows, "success") is None
    only_online = curve([row("online", 5, 0, 0, 1.0)])
    assert only_online is not None and only_online.offline.steps.size == 0 and only_online.online.steps.tolist() == [5]


def test_curve_ends_with_first_seed():
    """A curve ends where the first of its seeds does."""
    rows = [row("online", step, step, 0, 100.0) for step in (0, 500, 1000)]
    rows += [row("online", step, step, 1, 0.0) for step in (0, 500)]
    result = curve(rows)
    assert result is not None and result.seeds == 2
    assert result.online.steps.tolist() == [0, 500] and result.online.centre.tolist() == [50, 50]
    uneven = [row("offline", 0, 0, 0, 1.0)] + [row("offline", 0, 5, seed, 1.0) for seed in (0, 1)]
    result = curve(uneven)
    assert result is not None and result.seeds == 2 and result.offline.steps.tolist() == [5]
    result = curve([row("offline", 0, 9, seed, 10.0 * seed) for seed in (0, 1, 2)] + rows)
    assert result is not None and result.seeds == 2 and result.offline.centre.tolist() == [10.0]
    assert result.online.steps.tolist() == [0, 500]
    broken = [row("offline", 0, step, seed, 10.0 * seed) for step in (0, 9) for seed in (0, 1, 2) if step + seed < 11]
    result = curve(broken + [row("online", 50, 20, seed, 7.0) for seed in (0, 1)])
    assert result is not None and result.offline.steps.tolist() == [0]
    assert result.online.steps.tolist() == [0, 50] and result.online.centre.tolist() == [5.0, 7.0]
