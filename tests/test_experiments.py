"""Tests of experiments/: the table commands, with the scripts replaced."""

import json
import sys
import unittest.mock

import numpy as np
import pytest

import attack
import draw
import finetune
import search
from baselines import robustt
from checkpoints.provenance import write_result
from experiments import runs, table1, table2, table3, table6, tables
from runtime import cli, files
from tests.conftest import call


@pytest.fixture
def scripts(monkeypatch):
    """Replaces the scripts: each parses its flags, and finetune and attack write figures that depend on the seed.
    Returns the commands that ran."""
    ran, modules = [], {module.__name__: module for module in (search, draw, finetune, robustt, attack)}

    def run_script(name, **flags):
        ran.append((name, flags))
        given = [
            part
            for flag, value in flags.items()
            if value is not None
            for part in ("--" + flag.replace("_", "-"), value)
        ]
        monkeypatch.setattr(sys, "argv", [name, *map(str, given)])
        options = cli.parse(modules[name].Options, "")
        if name in ("finetune", "attack"):
            folder = files.model_folder(options.output, options.model) / options.task / files.run_name(options)
            accuracy = 0.8 + 0.01 * options.seed**2
        if name == "finetune":
            metrics = {"test_accuracy": accuracy, "peak_memory": 2e9, "parameters": 3e6}
            write_result(folder / "metrics.json", metrics | {"seconds": 7, "tokens_per_second": 11})
        if name == "attack":
            attacked = {"aua": accuracy / 2, "suc": None, "queries": 50, "resources": {"word vectors": "of a test"}}
            attacked["errors"] = dict.fromkeys("789" * (options.method == "pgd" and options.seed == 4), "none left")
            write_result(folder / f"{options.attack}.json", attacked)

    monkeypatch.setattr(runs, "run_script", run_script)
    return ran


def make_table(folder, *more, table=table1):
    flags = ["--model", "minilm", "--tasks", "bbc", "--n", "100"]
    flags += ["--output", folder / "runs", "--results", folder / "results"]
    return call(table, *flags, *more)


def recorded(folder, table="table1"):
    return json.loads((folder / "results" / f"{table}.json").read_text())["runs"]


def test_table_has_one_run_per_method_and_repeats_none(scripts, tmp_path, capsys):
    methods = set()
    for table, rows in ((table1, 9), (table2, 3), (table3, 4), (table6, 3)):
        seen = len(scripts)
        assert make_table(tmp_path, table=table) == 0
        made = [flags for name, flags in scripts[seen:] if name == "finetune" and "method" in flags]
        different = {(flags["ticket"], flags["method"], flags["ablation"], flags["output"]) for flags in made}
        found = recorded(tmp_path, table.__name__.removeprefix("experiments."))
        assert rows == len(made) == len(different) == len(found)
        attacked = sum(name == "attack" for name, _ in scripts[seen:])
        assert attacked == (0 if table is table2 else rows)
        methods |= {run["method"] for run in found}
    assert "| FreeLB | 1 | 80.0 | 7.0 | 2.0 | 3.0 |" in (tmp_path / "results" / "table2.md").read_text("utf8")
    assert "learning rate 0.0001.\n" in (tmp_path / "results" / "table2.md").read_text("utf8")
    assert make_table(tmp_path, "--tasks", "bbc", "--n", 224) == 2
    assert "--n 224 is more than the 223 test rows of bbc" in capsys.readouterr().err
    assert methods == set(runs.METHODS)
    seen = len(scripts)
    assert make_table(tmp_path, "--seeds", 3, "--methods", "PGD", "ORTicket") == 0
    again = [(flags["seed"], flags["method"]) for name, flags in scripts[seen:] if name == "finetune"]
    assert again == [(1, "pgd"), (1, "vanilla"), (2, "pgd"), (2, "vanilla")]
    seen = len(scripts)
    capsys.readouterr()
    assert make_table(tmp_path, "--methods", "PGD") == 0 and len(scripts) == seen
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "results" / "table1.md").read_text("utf8")
    assert make_table(tmp_path, "--methods", "PGD", "--epochs", 3) == 0 and len(scripts) == seen + 2


def test_table_shows_means_and_standard_deviations_over_seeds(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla") == 0
    assert make_table(tmp_path, "--seeds", 3, "--methods", "Vanilla") == 0
    assert make_table(tmp_path, "--methods", "PGD") == 0
    clean = 100 * np.array([0.8, 0.81, 0.84])
    cells = [f"{of.mean():.1f} ± {of.std(ddof=1):.1f}" for of in (clean, clean / 2)]
    out = capsys.readouterr().out
    assert f"| Vanilla | 3 | {cells[0]} | {cells[1]} | - | 50.0 ± 0.0 | 2.0 ± 0.0 | 3.0 ± 0.0 |" in out
    assert "| PGD | 1 | 80.0 | 40.0 | - | 50.0 | 2.0 | 3.0 |" in out
    assert "- word vectors: of a test" in out and "± 9.8 points" in out  # 1.96 sqrt(0.5 x 0.5 / 100)


def test_overrides_of_search_draw_and_finetune_are_separate_rows(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla ticket") == 0
    other = ["--search", "learning-rate=2e-4", "lambda-head=0", "--draw", "tau-ffn=0.1"]
    assert make_table(tmp_path, "--methods", "Vanilla ticket", *other) == 0
    searched = [flags for name, flags in scripts if name == "search"]
    assert [flags.get("learning-rate") for flags in searched] == [None, "2e-4"]
    assert all(flags["adv-steps"] == 1 for flags in searched)  # a vanilla ticket is still searched without adversary
    assert [flags.get("tau-ffn") for name, flags in scripts if name == "draw"] == [None, "0.1"]
    printed = capsys.readouterr().out
    assert printed.count("| Vanilla ticket | 1 |") == 2  # the second command prints both rows
    row = "\n| Vanilla ticket, `--draw tau-ffn=0.1 --search lambda-head=0 learning-rate=2e-4` | 1 |"
    assert printed.count(row) == 1 and printed.count("|---|") == 2  # in the same table
    assert make_table(tmp_path, "--methods", "ORTicket", "--search", "objective=rt") == 0
    drawn = next(flags["coefficients"] for name, flags in reversed(scripts) if name == "draw")
    assert drawn == tmp_path / "runs" / "minilm" / "coefficients-rt.safetensors"
    assert make_table(tmp_path, "--methods", "RobustT", "--finetune", "weight-decay=0") == 0
    trained = [flags for name, flags in scripts if name == "finetune" and "weight-decay" in flags]
    assert [flags["weight-decay"] for flags in trained] == ["0", "0"]  # before the masks are learned, and after
    methods = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    flags = ", `--draw tau-ffn=0.1 --search lambda-head=0 learning-rate=2e-4`", ", `--finetune weight-decay=0`"
    rows = ["Vanilla ticket", "Vanilla ticket" + flags[0], "RobustT" + flags[1], "ORTicket, `--search objective=rt`"]
    assert methods[-4:] == [f"| {row}" for row in rows]
    for flag, wrong in (  # set by the options of the table
        *(("search", "adv-steps"), ("search", "output=elsewhere"), ("search", "seeds=2")),
        *(("draw", "coefficients=file"), ("finetune", "seed=1"), ("finetune", "learning_rate=1")),
    ):
        assert make_table(tmp_path, f"--{flag}", wrong) == 2
        assert f"--{flag} {wrong!r}: give NAME=VALUE, options of {flag}.py except" in capsys.readouterr().err
    for method, flag, reached in (
        *(("Vanilla", "search adv-lr=1", "ORTicket"), ("PGD", "draw tau-ffn=0.1", "Random ticket")),
        *(("ORTicket", "finetune adv-lr=1", "ORTicket + FreeLB"), ("FreeLB", "finetune alpha=1", "InfoBERT")),
        *(("Vanilla ticket", "search adv-lr=2", "ORTicket"), ("Random ticket", "search seed=2", "Vanilla ticket")),
    ):
        name, value = flag.split()
        seen = len(scripts)
        assert make_table(tmp_path, "--methods", reached, method, f"--{name}", value) == 2 and len(scripts) == seen
        assert (
            f"--{name} {value.split('=')[0]} has no effect on {method}: give --methods without it"
            in capsys.readouterr().err
        )
        assert make_table(tmp_path, "--methods", reached, f"--{name}", value) == 0


def test_runs_count_once_and_attack_errors_are_reported(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla", "Vanilla") == 0 and len(scripts) == 2
    found = {"figures": {"Clean%": 1.0}, "resources": {}}
    load_runs = tables.load_runs
    answers = iter([[]])  # as if another command had added the run after this one began

    def late(path):
        return next(answers, load_runs(path))

    with unittest.mock.patch.object(tables, "run_method", lambda *a: found):
        with unittest.mock.patch.object(tables, "load_runs", late):
            assert make_table(tmp_path, "--methods", "Vanilla") == 0
    assert len(recorded(tmp_path)) == 1
    assert "ended in an error" not in capsys.readouterr().out
    seen = len(scripts)
    assert make_table(tmp_path, "--methods", "PGD", "--seeds", "5") == 0
    assert len(scripts) - seen == 2 * 5 + 1  # the attack with an error is tried once more
    assert " 3 attacks ended in an error and are not counted." in capsys.readouterr().out


def test_interrupted_table_keeps_its_finished_runs(scripts, tmp_path, monkeypatch):
    run_script = runs.run_script

    def interrupted(name, **flags):
        if flags.get("method") == "freelb":
            raise KeyboardInterrupt
        run_script(name, **flags)

    monkeypatch.setattr(runs, "run_script", interrupted)
    assert make_table(tmp_path, "--methods", "Vanilla", "FreeLB") == 130
    assert [run["method"] for run in recorded(tmp_path)] == ["Vanilla"]


def test_concurrent_commands_keep_each_others_runs(scripts, tmp_path, monkeypatch):
    run_script, others = runs.run_script, iter([True])

    def meanwhile(name, **flags):
        if name == "finetune" and next(others, False):
            assert make_table(tmp_path, "--methods", "PGD") == 0
        run_script(name, **flags)

    monkeypatch.setattr(runs, "run_script", meanwhile)
    assert make_table(tmp_path, "--methods", "Vanilla") == 0
    assert [run["method"] for run in recorded(tmp_path)] == ["PGD", "Vanilla"]


@pytest.mark.parametrize("flags", [["--methods", "Vanila"], ["--tasks", "sst3"], ["--attacks", "all"]])
def test_unknown_methods_tasks_and_attacks_are_refused(tmp_path, capsys, flags):
    assert make_table(tmp_path, *flags) == 2
    assert "give some of" in capsys.readouterr().err and not (tmp_path / "results").exists()
