"""Tests of benchmarks/."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import gpu_check, scale
from tests.conftest import call

LACKING = """import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            path = path or [folder for folder in sys.path if "site-packages" not in folder]
        return PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def checked(tmp_path, monkeypatch, missing, *parts):
    """The rows of the parts of gpu_check on a CPU, whose processes lack these packages."""
    (tmp_path / "sitecustomize.py").write_text(LACKING.format(missing=missing))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more))
    flags = ["--small", "--device", "cpu", "--results", tmp_path, *["--parts", *parts] * bool(parts)]
    assert call(gpu_check, *flags) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert not [row for row in rows if row["verdict"] not in ("", "ok")], rows
    assert (tmp_path / "gpu.md").read_text().count("\n") == len(rows) + 4
    return rows


BARE = ["pyarrow", "matplotlib", "editdistance", "textattack"]


@pytest.mark.parametrize(
    "part, rows, more", [("equal", 8, ["requests", "urllib3", "tqdm", "transformers"]), ("search", 2, [])]
)
def test_the_check_of_a_gpu_runs_without_the_packages_of_a_bare_machine(tmp_path, monkeypatch, part, rows, more):
    assert len(checked(tmp_path, monkeypatch, BARE + more, part)) == rows


@pytest.mark.slow
def test_all_parts_of_the_check_of_a_gpu_run_on_a_cpu(tmp_path, monkeypatch):
    rows = checked(tmp_path, monkeypatch, BARE)
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
