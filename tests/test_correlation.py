"""Rank correlation on cases worked by hand, and an interval that knows which points belong together."""

import numpy as np
import pytest

from pitome_mllm_eval.accuracy.correlation import correlation, ranks, spearman


def test_ranks_share_ties():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]


def test_spearman_on_cases_worked_by_hand():
    x = np.array([1.0, 2, 3, 4, 5])
    assert spearman(x, x**3) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, np.array([2.0, 1, 4, 3, 5])) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert np.isnan(spearman(x, np.ones(5)))


def test_spearman_within_strata_leaves_out_what_strata_explain():
    keep = np.repeat([1.0, 2, 3], 4)
    x, y = 10 * keep + np.tile([1, 2, 3, 4], 3), 10 * keep + np.tile([4, 3, 2, 1], 3)
    assert spearman(x, y) > 0.7 and spearman(x, y, keep) == pytest.approx(-1)


def test_equal_values_share_the_mean_of_their_ranks():
    x, y = np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])
    assert spearman(x, y) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])


def drawn(strength, count=60, seed=0):
    """``x`` and ``y`` (count,): noise, and the more alike the greater the strength."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=count)
    return x, strength * x + rng.normal(size=count)


def width(found):
    return found.high - found.low


def test_the_interval_over_clusters_of_one_point_is_as_wide_as_theory_says():
    alone = [str(number) for number in range(60)]
    weak, strong = correlation(*drawn(0), alone), correlation(*drawn(3), alone)
    assert weak.low < 0 < weak.high and strong.low > 0.8 and strong.low < strong.value < strong.high
    assert width(weak) == pytest.approx(2 * 1.96 / np.sqrt(59), rel=0.2)
    assert correlation(*drawn(0), alone) == weak and correlation(*drawn(0), alone, seed=1) != weak


@pytest.mark.parametrize("within", [False, True])
def test_copies_of_points_in_their_clusters_do_not_narrow_the_interval(within):
    x, y = drawn(1)
    names, strata = np.repeat(list("abcdefghijklmno"), 4), np.tile([288, 144, 72, 36], 15)
    once = correlation(x, y, names, strata if within else None, draws=400)
    again = [np.concatenate([values] * 5) for values in (x, y, names, strata)]
    copied = correlation(*again[:3], again[3] if within else None, draws=400)
    assert (copied.value, copied.low, copied.high) == pytest.approx((once.value, once.low, once.high))
    unaware = correlation(*again[:2], [str(number) for number in range(300)], again[3] if within else None, draws=400)
    assert width(unaware) < 0.6 * width(once)


def test_points_that_move_together_make_the_interval_wider():
    rng = np.random.default_rng(0)
    x, y = (np.repeat(rng.normal(size=12), 5) + 0.1 * rng.normal(size=60) for _ in range(2))
    together = correlation(x, y, np.repeat(list("abcdefghijkl"), 5))
    assert width(together) > 1.5 * width(correlation(x, y, [str(number) for number in range(60)]))


def test_the_order_of_points_does_not_matter():
    x, y = drawn(1)
    names = np.repeat(list("abcdefghijkl"), 5)
    order = np.argsort(np.tile(range(5), 12), kind="stable")  # clusters interleaved, first met in the same order
    assert correlation(x[order], y[order], names[order]) == correlation(x, y, names)


def test_one_cluster_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        correlation(*drawn(1), ["only"] * 60)
