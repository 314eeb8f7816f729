"""Tests of benchmarks/."""

import numpy as np

from benchmarks import scale


def test_linear_fits_of_the_cost_are_least_squares():
    x, y = np.array([1.0, 2, 4, 9]), np.array([5.0, 8, 11, 30])
    figures = {
        "finetune": [{"tokens": a, "seconds": b} for a, b in zip(x, y)],
        "attack": [{"queries": a, "seconds": b} for a, b in zip(x, y)],
    }
    expected = np.linalg.lstsq(np.stack([np.ones(4), x], 1), y, rcond=None)[0]
    for _, _, _, line in scale.fit_lines(figures).values():
        assert np.allclose(line, expected)
