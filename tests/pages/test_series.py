import numpy as np
import pytest

from m2t_accel.pages.series import MAX_POINTS, downsample


@pytest.mark.parametrize("number", [0, 1, 7, MAX_POINTS])
def test_a_short_curve_stays(number):
    values = list(np.linspace(0, 1, number).round(6))
    assert downsample(values, values) == {"x": values, "y": values}


@pytest.mark.parametrize("number", [MAX_POINTS + 1, 12_345, 100_000])
def test_a_long_curve_keeps_its_ends_and_every_spike(number):
    rng = np.random.default_rng(0)
    x, y = np.arange(number, dtype=float), rng.normal(size=number)
    places = rng.choice(np.arange(1, number - 1), 20, replace=False)
    spikes = x[places]
    y[places] = np.where(np.arange(20) % 2, 1000.0, -1000.0)
    curve = downsample(x, y)
    assert len(curve["x"]) == len(curve["y"]) <= MAX_POINTS
    assert (curve["x"][0], curve["x"][-1]) == (0, number - 1)
    assert curve["x"] == sorted(set(curve["x"]))
    # Two spikes of one bucket and one direction may share a point.
    kept = {value for value, height in zip(curve["x"], curve["y"], strict=True) if abs(height) == 1000}
    assert kept <= set(spikes)
    assert len(kept) >= 15
    assert max(curve["y"]) == 1000
    assert min(curve["y"]) == -1000
    assert y[int(curve["x"][5])] == pytest.approx(curve["y"][5], rel=1e-6)


def test_the_means_are_those_of_all_points():
    x = np.arange(10_000, dtype=float)
    curve = downsample(x, 3 * x)
    assert len(curve["mean_x"]) < MAX_POINTS
    assert np.mean(curve["mean_x"]) == pytest.approx(x.mean(), rel=1e-3)
    assert np.array(curve["mean_y"]) == pytest.approx(3 * np.array(curve["mean_x"]))
