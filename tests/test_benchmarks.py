"""Tests of benchmarks/."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import gpu_check, scale
from tests.conftest import call


def checked(tmp_path, monkeypatch, missing, *parts):
    """The rows of the parts of gpu_check on a CPU, whose processes lack these packages."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({missing})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more))
    flags = ["--small", "--device", "cpu", "--results", tmp_path, *["--parts", *parts] * bool(parts)]
    assert call(gpu_check, *flags) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert not [row for row in rows if row["verdict"] not in ("", "ok")], rows
    assert (tmp_path / "gpu.md").read_text().count("\n") == len(rows) + 4
    return rows


def test_the_check_of_a_gpu_runs_on_a_cpu_without_the_packages_of_a_bare_machine(tmp_path, monkeypatch):
    missing = ["pyarrow", "matplotlib", "requests", "urllib3", "tqdm", "editdistance", "textattack", "transformers"]
    assert len(checked(tmp_path, monkeypatch, missing, "equal")) == 8
    missing = ["pyarrow", "matplotlib", "editdistance", "textattack"]
    assert len(checked(tmp_path, monkeypatch, missing, "search")) == 2


@pytest.mark.slow
def test_all_parts_of_the_check_of_a_gpu_run_on_a_cpu(tmp_path, monkeypatch):
    rows = checked(tmp_path, monkeypatch, ["pyarrow", "matplotlib", "editdistance", "textattack"])
    assert {row["part"] for row in rows} == set(gpu_check.PARTS)


def test_linear_fits_of_the_cost_are_least_squares():
    x, y = np.array([1.0, 2, 4, 9]), np.array([5.0, 8, 11, 30])
    figures = {
        "finetune": [{"tokens": a, "seconds": b} for a, b in zip(x, y)],
        "attack": [{"queries": a, "seconds": b} for a, b in zip(x, y)],
    }
    expected = np.linalg.lstsq(np.stack([np.ones(4), x], 1), y, rcond=None)[0]
    for _, _, _, line in scale.fit_lines(figures).values():
        assert np.allclose(line, expected)
