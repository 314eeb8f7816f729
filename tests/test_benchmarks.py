"""Tests of benchmarks/."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from benchmarks import bench, cost, gpu_check, report, training
from bert import Config
from freelb import ADVERSARIES
from runtime.cli import BadInput
from tests.conftest import call, saved

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


def test_a_profile_is_refused_where_kernels_cannot_be_seen(monkeypatch, capsys):
    monkeypatch.setattr(bench, "pick_device", lambda name: torch.device("mps"))
    assert call(bench, "finetune", "--profile") == 2
    assert "--profile cannot see the time of kernels on mps: use --device cpu" in capsys.readouterr().err
    assert call(bench, "attack", "--profile") == 2
    assert "--profile is for search and finetune, not attack" in capsys.readouterr().err


def test_the_speeds_in_the_readme_are_those_that_were_saved():
    """Each row: seconds of orticket, of the library's default, of its best setting, and the ratio of the last."""
    library, textattack = "transformers, SDPA", "textattack"
    rows = {
        "search: a FreeLB step": ("search", "bf16", "seconds", library),
        "the same in fp32": ("search", "fp32", "seconds", library),
        "fine-tuning:": ("finetune", "bf16", "seconds", library),
        "classifying": ("finetune", "bf16", "classify", library),
        "TextFooler": ("attack-textfooler-rt", "fp32", "seconds", textattack),
        "BERT-Attack": ("attack-bertattack-rt", "fp32", "seconds", textattack),
    }
    whole = (report.ROOT / "README.md").read_text("utf8")
    text, figures = whole.partition("## Speed")[2], report.read("finetune")["figures"]
    gain = figures["orticket in bf16"]["seconds"] / figures["its ticket in bf16"]["seconds"]
    assert f": {gain:.2f} times the full model's speed on 2 CPU cores" in whole
    for work, (name, precision, column, default) in rows.items():
        figures = {case: row[column] for case, row in report.read(name)["figures"].items() if case.endswith(precision)}
        ours, default = figures[f"orticket in {precision}"], figures[f"{default} in {precision}"]
        best = min(seconds for case, seconds in figures.items() if case.startswith(("transformers", textattack)))
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {work}")]
        assert row.split("|")[2:-1] == [f" {number:.2f} " for number in (ours, default, best, best / ours)], row


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


@pytest.fixture(scope="module")
def small_task(tmp_path_factory):
    """(folder of a tiny model without dropout and with a classifier, a task of texts of many lengths)."""
    folder = tmp_path_factory.mktemp("small") / "model"
    saved(folder, transformers.BertForSequenceClassification, num_labels=2)
    config = json.loads((folder / "config.json").read_text())
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config | no_dropout))
    generator = np.random.default_rng(0)
    rows = ["".join(generator.choice(list("abcde"), generator.integers(1, 40))) for _ in range(90)]
    path = folder.parent / "task.csv"
    path.write_text("text,label\n" + "\n".join(f"{text},{len(text) % 2}" for text in rows))
    return folder, str(path)


def timed(small_task, what, side, **options):
    folder, task = small_task
    given = {"what": what, "task": task, "rows": 50, "batch_size": 4, "block": 12, "steps": 1, "device": "cpu"}
    return training.time_training(bench.Options(**given | options), side, "fp32", folder)


def is_compiler_missing():
    return shutil.which("g++") is None and shutil.which("c++") is None


@pytest.mark.parametrize("what", ["search", "finetune"])
def test_baselines_compute_the_loss_of_orticket(small_task, what, monkeypatch):
    monkeypatch.setattr(training, "matrix_rate", lambda *_: 1e9)
    sides = [side for side in bench.SIDES[what] if side != "its ticket" and "compiled" not in side]
    found = {side: timed(small_task, what, side) for side in sides}
    losses = [figures["loss"] for figures in found.values()]
    assert max(losses) - min(losses) < 1e-4 and len(sides) >= 3
    if what == "finetune":
        assert len({figures["right"] for figures in found.values()}) == 1
        by_length, random = found["transformers, SDPA, by length"], found["transformers, SDPA"]
        assert by_length["flops"] < 0.8 * random["flops"]  # less padding


@pytest.mark.slow
@pytest.mark.skipif(is_compiler_missing(), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("what, side", [(what, side) for what in bench.SIDES for side in bench.SIDES[what]])
def test_compiled_sides_compute_the_loss_of_the_others(small_task, what, side, monkeypatch):
    if "compiled" not in side:
        pytest.skip("not compiled")
    monkeypatch.setattr(training, "matrix_rate", lambda *_: 1e9)
    monkeypatch.setattr(training.Dropout, "forward", training.Dropout.forward)
    assert abs(timed(small_task, what, side)["loss"] - timed(small_task, what, "orticket")["loss"]) < 1e-4


def test_a_profile_accounts_for_the_whole_time(small_task, monkeypatch):
    monkeypatch.setattr(training, "matrix_rate", lambda *_: 1e9)
    figures = timed(small_task, "finetune", "orticket", profile=True)["profile"]
    assert all(figures[group] > 0 for group in ("matrix products", "layer norms", "GELU", "optimizer and clipping"))
    for name in ("_efficient_attention_forward", "_flash_attention_backward", "_scaled_dot_product_flash_attention"):
        assert re.search(training.GROUPS["matrix products"], f"aten::{name}")  # on CUDA
    assert figures["the rest"] > 0  # Python between the operators, so that no time is counted twice


def test_a_compiled_side_that_fails_is_left_out_and_another_is_not(tmp_path, monkeypatch, capsys):
    def run_process(command, name):
        if "compiled" in name or "broken" in name:
            raise BadInput(f"{name} failed: no C++ compiler")
        return json.dumps({"seconds": 1.0})

    monkeypatch.setattr(report, "run_process", run_process)
    cases, options = [("orticket", "fp32"), ("orticket, compiled", "fp32")], bench.Options(rounds=2)
    assert bench.run_workers(options, cases, tmp_path) == {cases[0]: [{"seconds": 1.0}] * 2}
    assert capsys.readouterr().err.count("left out: orticket, compiled in fp32 failed: no C++ compiler") == 1
    with pytest.raises(BadInput, match="broken"):
        bench.run_workers(options, [("broken", "fp32")], tmp_path)


def test_claimed_ratios_are_to_the_best_baseline():
    seconds = {("orticket", "bf16"): 1.0, ("transformers, SDPA", "bf16"): 4.0, ("transformers, eager", "bf16"): 3.0}
    seconds |= {("its ticket", "bf16"): 0.5, ("orticket, compiled", "bf16"): 0.6}
    seconds |= {("orticket", "fp32"): 2.0, ("transformers, SDPA", "fp32"): 2.8}
    line = bench.best_ratios({case: {"seconds": value} for case, value in seconds.items()}, "seconds")
    expected = ["3.00 in bf16 (transformers, eager)", "1.40 in fp32 (transformers, SDPA)"]
    assert line == ", ".join([*expected, "2.80 overall (transformers, SDPA)"])


def test_saved_tables_replace_their_place_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "speed.md")
    report.PAGE.write_text("# Speed\n<!-- search -->\nold\n<!-- end -->\nmore\n<!-- cost -->\nkept\n<!-- end -->\n")
    figures = {("orticket", "bf16"): {"seconds": 1.5}, ("eager", "bf16"): {"seconds": 12.25}}
    lines = report.table(figures, {"seconds": "{seconds:.2f}"})
    assert len({len(line) for line in lines}) == 1 and lines[3] == "| eager in bf16    |   12.25 |"
    report.publish("search", {"machine": "this"}, figures, lines, save=True)
    page = report.PAGE.read_text()
    assert page.startswith("# Speed\n<!-- search -->\n|") and page.endswith("kept\n<!-- end -->\n")
    assert "old" not in page and report.read("search")["machine"] == "this"
    assert report.read("search")["figures"] == {" in ".join(case): row for case, row in figures.items()}
    with pytest.raises(BadInput, match="no <!-- scale -->"):
        report.publish("scale", {}, figures, lines, save=True)
    assert report.read("scale")["figures"]  # hours of measuring are not lost


@pytest.mark.parametrize("values", [(1.0, math.nan), (math.nan, 1.0), (1.0, 1.2), (1.0, math.inf)])
def test_sides_that_differ_are_an_error(values):
    bench.check_agreement((1.0, 1.05), 0.1)
    with pytest.raises(BadInput, match="do not do the same work"):
        bench.check_agreement(values, 0.1)


def test_a_timed_step_in_bf16_uses_the_weights_of_the_step_before(small_task, monkeypatch):
    """Autocast would keep the copies of the first step's weights for all steps that one context holds."""
    monkeypatch.setattr(training, "matrix_rate", lambda *_: 1e9)
    copies = {}  # of each weight, as the products see it
    linear = training.F.linear

    def watched(x, weight, bias=None):
        if isinstance(weight, torch.nn.Parameter):  # parts of one are never kept
            copy = torch.mm(torch.eye(len(weight)), weight).float()
            copies.setdefault(id(weight), set()).add(tuple(copy.flatten().tolist()))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    folder, task = small_task
    given = {"what": "finetune", "task": task, "rows": 50, "batch_size": 50, "device": "cpu"}
    training.time_training(bench.Options(**given), "orticket", "bf16", folder)
    assert max(map(len, copies.values())) >= 3


@pytest.mark.skipif(os.name != "posix", reason="groups of processes")
def test_a_part_of_gpu_check_that_is_stopped_leaves_no_process(tmp_path):
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    command = [sys.executable, "-uc", f"{child}; import time; time.sleep(60)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    grandchild = int(process.stdout.readline())
    gpu_check.stop(process)
    state = Path(f"/proc/{grandchild}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_gpu_check_writes_what_it_has_after_each_part(tmp_path, monkeypatch):
    def run_part(options, part, folder, left):
        if part == "resume":
            raise KeyboardInterrupt
        return [{"part": part, "what": "a figure", "result": "1", "verdict": ""}]

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "prepare", lambda *_: None)
    assert call(gpu_check, "--device", "cpu", "--results", tmp_path, "--parts", "equal", "resume") == 130
    assert [row["part"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]] == ["equal"]
    assert "| equal | a figure | 1 |  |" in (tmp_path / "gpu.md").read_text()


def test_a_part_of_gpu_check_that_takes_too_long_is_failed_or_left_out(tmp_path, monkeypatch):
    options = gpu_check.Options(device="cpu", small=True)
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(30)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "LIMIT", 2)
    monkeypatch.setattr(gpu_check, "stop", subprocess.Popen.kill)
    for left, verdict in ((60, "FAILED"), (0.1, "left out")):
        [row] = gpu_check.run_part(options, "equal", str(tmp_path), left)
        assert row["verdict"] == verdict and row["what"].startswith("stopped after")


def test_saved_rates_of_several_machines_give_no_cost(monkeypatch):
    saved = {"machine": "a", "versions": {}, "figures": {}}
    monkeypatch.setattr(report, "read", lambda what: saved | {"machine": what})
    with pytest.raises(BadInput, match="from several machines or versions"):
        cost.cost_in_hours(np.array([1.0, 1.0]), 1)


def test_work_counted_without_computing_is_the_formula():
    """2 FLOPs per weight and token forward, 6 with the backward pass, besides attention and the last layer's [CLS]."""
    layers, dim, neurons, tokens = 8, 64, 256, 16
    config = Config(hidden_size=dim, num_hidden_layers=layers, intermediate_size=neurons, num_attention_heads=4)
    config = replace(config, num_labels=2)
    all_tokens, attention = cost.BATCH * tokens, 4 * dim * tokens
    per_layer = 2 * (4 * dim**2 + 2 * dim * neurons) + attention
    last = all_tokens * 2 * 2 * dim**2 + cost.BATCH * (2 * (2 * dim**2 + 2 * dim * neurons) + attention)
    pooler = cost.BATCH * 2 * (dim**2 + 2 * dim)
    flops, operators = cost.count(config, tokens, None)
    assert flops == all_tokens * per_layer * (layers - 1) + last + pooler and operators > 8 * layers
    trained, _ = cost.count(config, tokens, ADVERSARIES["vanilla"])
    again = layers * all_tokens * attention / 2  # fused attention computes its scores again in the backward pass
    assert 2.95 * flops < trained - again <= 3 * flops
    deeper = cost.count(replace(config, num_hidden_layers=2 * layers), tokens, None)[1]
    assert deeper - operators < 45 * layers  # with attention in several operators 61
    freelb, few = cost.count(config, tokens, ADVERSARIES["freelb"])
    assert freelb == pytest.approx(3 * trained, rel=0.02)
    gated, many = cost.count(config, tokens, ADVERSARIES["freelb"], gated=True)
    assert gated == pytest.approx(freelb, rel=0.02) and many > few + 3 * 10 * layers  # gates are no products


def test_steps_stop_scaling_where_the_gradients_take_longer_than_the_computing():
    work = np.array([1e12, 10.0])
    found = cost.time_of_steps({"step": work})
    gradients = 4 * 109_483_778
    for n in (1, 2, 4, 8):
        row = found[f"step, n = {n}",]
        assert row["computing"] == pytest.approx(1e15 / n / (cost.SHARE * cost.PEAKS["H100"]))
        assert row["10 Gbit/s"] == pytest.approx(1000 * 2 * (n - 1) / n * gradients / 1.25e9)
    assert found["step, n = 8",]["speedup NVLink 4"] > 1 > found["step, n = 8",]["speedup 10 Gbit/s"]


def test_the_cost_counts_with_the_full_models_fastest_precision():
    rows = {"its ticket in bf16": 9, "orticket in bf16": 2, "orticket in fp32": 4, "with FreeLB in bf16": 8}
    assert cost.fastest({name: {"flops": rate, "seconds": 2} for name, rate in rows.items()}) == 2
