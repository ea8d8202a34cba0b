import numpy as np
import pytest

from sps2_bench.statistics import Bootstrap, Floats


def mean(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1])


def test_interval_is_that_of_the_mean() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(3.0, 2.0, size=400)
    estimate = Bootstrap(400).estimate(mean, np.stack([values, np.ones(400)], axis=1))
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.05)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.05)


def test_paired_differences_have_no_more_spread_than_they_have() -> None:
    """Two profiles that differ by the same amount on every prompt, however different the prompts."""
    values = np.random.default_rng(2).normal(0.0, 10.0, size=50)
    both = np.stack([values + 1, values, np.ones(50)], axis=1)
    estimate = Bootstrap(50).estimate(lambda s: np.asarray((s[..., 0] - s[..., 1]) / s[..., 2]), both)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((1.0, 1.0, 1.0))


def test_same_seed_same_interval() -> None:
    sums = np.stack([np.arange(20.0), np.ones(20)], axis=1)
    assert Bootstrap(20, 5).estimate(mean, sums) == Bootstrap(20, 5).estimate(mean, sums)


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        Bootstrap(0)


def test_no_value_is_not_a_number() -> None:
    estimate = Bootstrap(3).estimate(lambda s: np.full(s.shape[:-1], np.nan), np.zeros((3, 1)))
    assert np.isnan([estimate.value, estimate.low, estimate.high]).all()
