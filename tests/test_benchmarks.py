"""Tests of benchmarks/."""

import json

import numpy as np
import pytest

from benchmarks import gpu_check, scale
from tests.conftest import call


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch):
    """All its parts, at small sizes and without the packages that a bare machine lacks."""
    for name in ("pyarrow", "requests", "urllib3", "matplotlib", "tqdm"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / f"{name}.py").write_text("raise ModuleNotFoundError(name=__name__)")
    assert call(gpu_check, "--small", "--device", "cpu", "--results", tmp_path, "--minutes", 5) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set(gpu_check.PARTS)
    assert not [row for row in rows if row["verdict"] == "FAILED"], rows
    assert (tmp_path / "gpu.md").read_text().count("\n") == len(rows) + 4


def test_linear_fits_of_the_cost_are_least_squares():
    x, y = np.array([1.0, 2, 4, 9]), np.array([5.0, 8, 11, 30])
    figures = {
        "finetune": [{"tokens": a, "seconds": b} for a, b in zip(x, y)],
        "attack": [{"queries": a, "seconds": b} for a, b in zip(x, y)],
    }
    expected = np.linalg.lstsq(np.stack([np.ones(4), x], 1), y, rcond=None)[0]
    for _, _, _, line in scale.fit_lines(figures).values():
        assert np.allclose(line, expected)
