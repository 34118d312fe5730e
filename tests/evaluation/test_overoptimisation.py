"""The laws of over-optimisation: known ones are found again, their peaks are where a search finds them, bands cover."""

import numpy as np
import pytest

from threefold.evaluation import best_of
from threefold.evaluation.best_of import Law

LAWS = [Law("best_of_n", 0.9, 0.25), Law("rl", 0.8, 0.4)]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.form)
def test_a_law_is_found_from_its_own_points(law):
    kl = np.linspace(0.1, 9, 12)
    distance = np.sqrt(kl)
    plain = distance * (law.alpha - law.beta * (distance if law.form == "best_of_n" else np.log(distance)))
    assert law.gain(kl) == pytest.approx(plain)
    found = best_of.fit_law(law.form, kl, plain)
    assert (found.alpha, found.beta) == pytest.approx((law.alpha, law.beta))
    assert law.gain(np.zeros(1)) == 0


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.form)
def test_the_peak_is_where_the_gain_is_highest(law):
    grid = np.linspace(0.01, 60, 200_000)
    assert law.peak() == pytest.approx(grid[law.gain(grid).argmax()], abs=1e-3)


def test_a_law_that_only_grows_has_no_peak():
    assert Law("rl", 0.5, -0.1).peak() is None
    assert Law("best_of_n", 0.5, 0.0).peak() is None


def simulated(law: Law, seed: int, noise: float) -> list[dict]:
    """Points of a law: three seeds, six distances, 40 prompts of unlike gain."""
    generator = np.random.default_rng(seed)
    prompts = generator.normal(scale=0.3, size=40)
    return [
        {
            "kl": kl,
            "seed": s,
            "gains": {"gold": law.gain(np.array([kl]))[0] + prompts * kl / 9 + generator.normal(scale=noise, size=40)},
        }
        for s in range(3)
        for kl in (0.5, 1.0, 2.0, 4.0, 6.0, 9.0)
    ]


def test_bands_hold_the_law_and_the_peak():
    law, inside, peaks = Law("rl", 0.8, 0.4), [], []
    grid = np.array([1.0, 4.0, 9.0])
    for seed in range(40):
        points = simulated(law, seed, 0.2)
        low, high = best_of.band(best_of.resampled_laws(points, "gold", "rl", 200, 0), grid)
        inside.append((low <= law.gain(grid)) & (law.gain(grid) <= high))
        found = best_of.law_summary(points, "gold", "rl", 100, 0)
        peaks.append(found["peak_kl"])
    assert (np.mean(inside, 0) > 0.8).all()
    assert np.median([peak for peak in peaks if peak]) == pytest.approx(law.peak(), rel=0.2)


def test_a_peak_beyond_the_farthest_point_is_not_claimed():
    rising = Law("best_of_n", 0.9, 0.01)
    found = best_of.law_summary(simulated(rising, 0, 0.02), "gold", "best_of_n", 100, 0)
    assert rising.peak() > 9 and found["peak_kl"] is None and found["farthest_kl"] == 9.0
    assert found["trend"] == "rises" and found["trend_share"] == 1.0
    assert found["curve"]["kl"][-1] == pytest.approx(9.0) and found["curve"]["gain"][0] == 0.0


@pytest.mark.parametrize("law", [Law("best_of_n", -0.1, 0.02), Law("rl", -0.12, 0.0), Law("rl", -0.1, -0.05)], ids=str)
def test_a_law_that_only_falls_is_not_taken_for_one_that_rises(law):
    found = best_of.law_summary(simulated(law, 0, 0.02), "gold", law.form, 100, 0)
    assert found["trend"] == "falls" and found["peak_kl"] is None


def test_trends():
    assert [best_of.trend(law, 9.0) for law in LAWS] == ["peaks", "peaks"]
    assert best_of.trend(LAWS[1], 2.0) == "rises"
