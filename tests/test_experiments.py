"""Tests of experiments/: the commands of the tables and figures, with the scripts replaced, and the statistics."""

import functools
import json
import re
import sys
import unittest.mock
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import attack
import draw
import finetune
import search
from attacks.results import end_of_line
from baselines import robustt
from bert import Bert
from checkpoints import safetensors
from checkpoints.provenance import identity, json_sha256, write_result
from experiments import (
    compare,
    figure1,
    figure2,
    mlm,
    overlap,
    runs,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    tables,
    verdict,
)
from freelb import ADVERSARIES
from runtime import cli, files
from runtime.cli import BadInput
from tests.conftest import LETTERS, call, saved

PAPER_TEXT = Path(__file__).resolve().parents[2] / "shared" / "paper" / "orticket.txt"


@pytest.fixture
def scripts(monkeypatch):
    """Replaces the scripts: each parses its flags, and writes figures that depend on the seed. A ticket holds against
    the attack on the sentences whose number is below 10 x (seed + 1), the full model on one fewer. Returns the commands
    that ran."""
    ran, modules = [], {module.__name__: module for module in (search, draw, finetune, robustt, attack)}

    def run_script(name, overwrite=False, **flags):
        ran.append((name, flags))
        given = [
            part
            for flag, value in flags.items()
            if value is not None
            for part in ("--" + flag.replace("_", "-"), value)
        ]
        monkeypatch.setattr(sys, "argv", [name, *map(str, given)])
        options = cli.parse(modules[name].Options, "")
        model = files.model_folder(options.output, options.model)
        if name in ("finetune", "attack"):
            folder = model / options.task / files.run_name(options)
            accuracy = 0.8 + 0.01 * options.seed**2
        if name == "search":
            suffix = "" if options.objective == "mlm" else f"-{options.objective}"
            write_result(model / f"search{suffix}.json", {"seconds": 5})
        if name == "finetune":
            metrics = {"test_accuracy": accuracy, "peak_memory": 2e9, "parameters": 3e6}
            metrics |= {"settings": {"learning_rate": options.learning_rate or 1e-4}}
            speed = 11 if options.method == "freelb" else 22
            write_result(folder / "metrics.json", metrics | {"seconds": 70 / speed, "tokens_per_second": speed})
        if name == "attack":
            error = options.method == "pgd" and options.seed == 4
            attacked = {"aua": accuracy / 2, "suc": None, "queries": 50, "resources": {"word vectors": "of a test"}}
            attacked["errors"] = dict.fromkeys("789" * error, "none left")
            stem = f"{options.attack}-{options.suffix}" if options.suffix else options.attack
            attacked["settings"] = {}
            write_result(folder / f"{stem}.json", attacked)
            held = 10 * (options.seed + 1) - (options.ticket == "none")
            outcomes = ["failed" if number < held else "succeeded" for number in range(100)]
            rows = [{"example": n, "outcome": outcomes[n]} for n in range(100) if str(n) not in attacked["errors"]]
            lines = [json.dumps(row).encode() for row in reversed(rows)]
            ends = [end_of_line(line, json_sha256(identity(attacked))) for line in lines]
            (folder / f"{stem}.jsonl").write_bytes(b"".join(line[:-1] + end + b"\n" for line, end in zip(lines, ends)))

    monkeypatch.setattr(runs, "run_script", run_script)
    return ran


def make_table(folder, *more, table=table1):
    flags = ["--model", "minilm", "--tasks", "bbc", "--n", "100", "--attacks", "textfooler"]
    flags += ["--output", folder / "runs", "--results", folder / "results"]
    return call(table, *flags, *more)


def recorded(folder, table="table1"):
    return tables.load_runs(folder / "results" / f"{table}.json")


def test_table_has_one_run_per_method_and_repeats_none(scripts, tmp_path, capsys):
    methods = set()
    for table, rows in ((table1, 7), (table2, 3), (table3, 4), (table4, 7), (table5, 3), (table6, 3)):
        seen = len(scripts)
        assert make_table(tmp_path, table=table) == 0
        made = [flags for name, flags in scripts[seen:] if name == "finetune" and "method" in flags]
        different = {(flags["ticket"], flags["method"], flags["ablation"], flags["output"]) for flags in made}
        found = recorded(tmp_path, table.__name__.removeprefix("experiments."))
        assert rows == len(made) == len(different) == len(found)
        attacked = sum(name == "attack" for name, _ in scripts[seen:])
        assert attacked == (0 if table is table2 else rows)
        methods |= {run["method"] for run in found}
    assert make_table(tmp_path, "--tasks", "bbc", "--n", 224) == 2
    assert "--n 224 is more than the 223 test rows of bbc" in capsys.readouterr().err
    assert methods == set(runs.METHODS) - set(ADVERSARIES)  # with others' numbers: only on request
    seen = len(scripts)
    assert make_table(tmp_path, "--seeds", 3, "--methods", "PGD", "ORTicket") == 0
    again = [(flags["seed"], flags["method"]) for name, flags in scripts[seen:] if name == "finetune"]
    assert again == [(1, "pgd"), (1, "vanilla"), (2, "pgd"), (2, "vanilla")]
    seen = len(scripts)
    capsys.readouterr()
    assert make_table(tmp_path, "--methods", "PGD") == 0 and len(scripts) == seen
    printed = capsys.readouterr().out
    assert printed.endswith((tmp_path / "results" / "table1.md").read_text("utf8"))
    assert make_table(tmp_path, "--methods", "PGD", "--epochs", 3) == 0 and len(scripts) == seen + 2
    text, codes = (
        (tmp_path / "results" / "table1.json").read_text(),
        {json_sha256(run["code"]) for run in recorded(tmp_path)},
    )
    assert text.count('"finetune.py"') == len(codes) == 1  # what all runs share is written once


def test_protocol_is_the_papers(scripts, tmp_path):
    with unittest.mock.patch.object(tables.data, "find_task") as find_task:
        find_task.return_value.load.return_value = {"test": range(1821)}
        for flags in ([], ["--tasks", "sst2"]):
            assert call(table1, "--output", tmp_path / "runs", "--results", tmp_path, *flags) == 0
    attacked = [flags for name, flags in scripts if name == "attack"]
    assert {flags["task"] for flags in attacked} == {"sst2", "qnli", "qqp", "imdb", "agnews"}
    assert {flags["attack"] for flags in attacked} == {"textfooler", "textbugger", "bertattack"}
    assert {(flags["task"] == "sst2", flags["n"]) for flags in attacked} == {(True, 1821), (False, 1000)}
    assert {flags["corpus"] for name, flags in scripts if name == "search"} == {"wikitext-2-raw-v1"}
    trained = [flags for name, flags in scripts if name == "finetune"]
    assert {flags["epochs"] for flags in trained} == {10} and {flags["train_rows"] for flags in trained} == {None}


def test_each_seed_has_a_search_of_its_own_and_all_attack_the_same_sentences(scripts, tmp_path):
    assert make_table(tmp_path, "--seeds", 3, "--methods", "Vanilla", "ORTicket", "Random ticket") == 0
    searched = [flags for name, flags in scripts if name == "search"]
    assert {flags["seed"] for flags in searched} == {0, 1, 2}
    assert len({flags["output"] for flags in searched}) == 3
    drawn = [(flags["coefficients"], flags["output"]) for name, flags in scripts if name == "draw"]
    assert len(set(drawn)) == 3
    assert {flags["sample_seed"] for name, flags in scripts if name == "attack"} == {"0"}
    assert make_table(tmp_path, "--methods", "Vanilla", "--attack", "sample-seed=5") == 0
    assert scripts[-1][1]["sample_seed"] == "5" and scripts[-1][1]["suffix"] == "sample_seed=5"


def test_quick_version_sets_what_is_not_given(scripts, tmp_path):
    flags = ["--quick", "--methods", "ORTicket", "RobustT", "--output", tmp_path, "--results", tmp_path]
    assert call(table1, *flags) == 0
    given = dict(scripts)
    assert given["search"]["corpus"] == "bbc-small" and given["baselines.robustt"]["epochs"] == "2"
    assert (given["finetune"]["task"], given["finetune"]["epochs"], given["attack"]["n"]) == ("rt", 3, 100)
    assert call(table1, *flags[:1], "--methods", "Random ticket", *flags[4:]) == 0
    assert {flags["corpus"] for name, flags in scripts if name == "search"} == {"bbc-small"}  # nothing from a network
    assert not any(run["overrides"] for run in tables.load_runs(tmp_path / "table1.json")[2:])
    assert call(table1, *flags, "--epochs", 10, "--seeds", 2) == 0  # given, though it is the default without --quick
    assert {flags["epochs"] for name, flags in scripts[-6:] if name == "finetune"} == {10}


def test_dry_run_lists_missing_runs_with_their_hours_and_makes_none(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla", "PGD") == 0
    made = recorded(tmp_path)
    for run, hours in zip(made, (0.5, 2.0)):
        run["hours"] = hours
    tables.write_runs(tmp_path / "results" / "table1.json", made)
    seen = len(scripts)
    capsys.readouterr()
    assert make_table(tmp_path, "--methods", "Vanilla", "PGD", "FreeLB", "--seeds", 2, "--dry-run") == 0
    out = capsys.readouterr().out
    assert len(scripts) == seen and recorded(tmp_path) == made
    assert "bbc: Vanilla, seed 1: about 0.50 h\nbbc: PGD, seed 1: about 2.00 h" in out
    assert out.count("FreeLB, seed 0: about 1.25 h") == 1  # the mean of the runs with these settings
    assert "4 runs are missing: about 5.0 hours" in out
    assert make_table(tmp_path, "--model", "elsewhere", "--dry-run", "--methods", "PGD") == 0
    assert "1 runs are missing: about 0.0 hours, and 1 runs unlike any" in capsys.readouterr().out


def test_table_shows_means_deviations_and_the_papers_numbers(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla") == 0
    assert make_table(tmp_path, "--seeds", 3, "--methods", "Vanilla") == 0
    assert make_table(tmp_path, "--methods", "PGD") == 0
    clean = 100 * np.array([0.8, 0.81, 0.84])
    cells = [f"{of.mean():.1f} ± {of.std(ddof=1):.1f}" for of in (clean, clean / 2)]
    out = capsys.readouterr().out
    assert f"| Vanilla | 3 | {cells[0]} | {cells[1]} | - | 50.0 ± 0.0 | 2.0 ± 0.0 | 3.0 ± 0.0 |" in out
    assert "| PGD | 1 | 80.0 | 40.0 | - | 50.0 | 2.0 | 3.0 |" in out  # the paper has no bbc
    assert "- word vectors: of a test" in out and "learning rate 0.0001" in out
    rows = [run | {"task": "sst2"} for run in recorded(tmp_path)]
    assert "| PGD | 1 | 80.0 (92) | 40.0 (9.2) | - (90) | 50.0 (117.4) |" in tables.markdown("table1", rows)


def test_differences_are_paired_by_seed_and_sentence(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--seeds", 3, "--methods", "Vanilla", "ORTicket", "Random ticket") == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("| ORTicket | +"))
    assert line.startswith("| ORTicket | +1.0 ± ") and "| +0.0 ± " in line and "(p = 1.000)" in line


def test_table2_is_relative_to_freelb_with_and_without_the_search(scripts, tmp_path, capsys):
    assert make_table(tmp_path, table=table2) == 0
    out = capsys.readouterr().out
    freelb, vanilla = 70 / 11, 70 / 22
    assert f"| ORTicket | 1 | 2.00 | {freelb / (vanilla + 5):.2f} | 2.0 | 3.0 |" in out
    assert f"| Vanilla | 1 | 2.00 | {freelb / vanilla:.2f} | 2.0 | 3.0 |" in out
    rows = [run | {"task": "sst2"} for run in recorded(tmp_path, "table2")]
    assert "| ORTicket | 1 | 2.00 (7.7) | 0.78 (6.6) | 2.0 | 3.0 (93) |" in tables.markdown(
        "table2", rows, ("speed", "with search", "GB", "M parameters")
    )


def test_speeds_of_several_machines_are_not_compared(scripts, tmp_path, capsys):
    assert make_table(tmp_path, table=table2) == 0
    capsys.readouterr()
    rows = [run | {"machine": "a GPU"} if run["method"] == "ORTicket" else run for run in recorded(tmp_path, "table2")]
    text = tables.markdown("table2", rows, ("speed", "with search", "GB", "M parameters"))
    assert "| ORTicket | 1 | - | - | 2.0 | 3.0 |" in text and "| Vanilla | 1 | 2.00 |" in text
    assert f"Made on {rows[0]['machine']} and a GPU." in text


def test_table4_is_a_matrix_of_searches_and_tasks(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--tasks", "bbc", "rt", table=table4) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == "| method | runs | bbc Clean% | bbc textfooler Aua% | rt Clean% | rt textfooler Aua% |"
    labels = [line.split(" | ")[0] for line in lines[2:9]]
    assert labels[:2] == ["| Vanilla", "| ORTicket"] and labels[-1] == "| ORTicket from agnews"
    assert lines[3] == "| ORTicket | 2 | 80.0 | 40.0 | 80.0 | 40.0 |"
    assert sum(line.startswith("| ORTicket from qqp | +1.0 |") for line in lines) == 2  # the differences on each task
    searched = {flags.get("objective", "mlm") for name, flags in scripts if name == "search"}
    assert searched == {"mlm", "sst2", "qnli", "qqp", "imdb", "agnews"}


def test_figure1_is_the_mean_of_the_masks_of_all_searches(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    found = {}

    def run_script(name, model, output, seed, **_):
        found[seed] = torch.rand(2, 4), torch.rand(2, 10)
        folder = files.model_folder(output, model)
        safetensors.write_safetensors(folder / "coefficients.safetensors", dict(zip(("head", "ffn"), found[seed])), {})
        write_result(folder / "search.json", {"seconds": 5})

    def read(path):
        tensors, _ = safetensors.read_safetensors(path)
        return tensors["head"], tensors["ffn"], {}

    monkeypatch.setattr(runs, "run_script", run_script)
    monkeypatch.setattr(figure1, "read_coefficients", read)
    flags = ["--models", "tiny", "--searches", 2, "--draw", "tau-head=1/4", "tau-ffn=0.3"]
    assert call(figure1, *flags, "--output", tmp_path, "--results", tmp_path, "--dry-run") == 0 and not found
    assert call(figure1, *flags, "--output", tmp_path, "--results", tmp_path) == 0
    share = json.loads((tmp_path / "figure1.json").read_text())["shares"]["tiny"]
    assert (tmp_path / "figure1.png").stat().st_size > 10_000
    kept = [ffn.flatten() > ffn.flatten().sort().values[5] for _, ffn in found.values()]  # 6 of 20 are pruned
    expected = torch.stack(kept).float().mean(0).view(2, 10).mean(1)
    torch.testing.assert_close(torch.tensor(share["neurons"])[:, 0], expected)
    assert sum(map(sum, share["heads"])) == 6  # 8 heads, less a quarter
    assert call(figure1, "--models", "tiny", "--draw", "coefficients-seed=1") == 2
    for ratio, reason in (("tau-head=x", "'x' is not a number"), ("tau-ffn=2", "2 must be below 1")):
        capsys.readouterr()
        assert call(figure1, "--models", "tiny", "--draw", ratio) == 2
        assert f"--draw {ratio}: {reason}" in capsys.readouterr().err


def test_figure2_has_a_run_for_each_ratio(scripts, tmp_path):
    assert make_table(tmp_path, "--tasks", "bbc", "--seeds", 2, table=figure2) == 0
    ratios = [(f.get("tau_head"), f.get("tau_ffn")) for name, f in scripts if name == "draw"]
    assert len(ratios) == 2 * 2 * 9 and len(set(ratios)) == 9
    assert (tmp_path / "results" / "figure2-bbc.png").stat().st_size > 10_000
    seen = len(scripts)
    assert make_table(tmp_path, "--tasks", "bbc", "--seeds", 2, table=figure2) == 0 and len(scripts) == seen
    first = (tmp_path / "results" / "figure2-bbc.png").read_bytes()
    assert make_table(tmp_path, "--tasks", "bbc", "--epochs", 3, table=figure2) == 0  # a picture of its own
    assert (tmp_path / "results" / "figure2-bbc.png").read_bytes() == first
    assert (tmp_path / "results" / "figure2-bbc-2.png").read_bytes() != first


def test_a_table_states_the_numbers_of_its_adversaries(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla", "Vanilla ticket") == 0
    assert "Adversaries as" not in capsys.readouterr().out
    assert make_table(tmp_path, "--methods", "PGD", "freelb-zhu2020", "RobustT") == 0
    shown = "pgd (3, 0.03, 0.05, 0.0), freelb-zhu2020 (3, 0.1, 1.0, 0.6), freelb-textdefender (5, 0.03, 0.05, 0.0).\n"
    assert shown in capsys.readouterr().out
    assert [flags.get("method") for name, flags in scripts].count("freelb-zhu2020") == 2  # fine-tuned and attacked


def test_overrides_are_separate_rows_and_reach_only_the_rows_that_they_concern(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla ticket") == 0
    other = ["--search", "learning-rate=2e-4", "lambda-head=0", "--draw", "tau-ffn=0.1"]
    assert make_table(tmp_path, "--methods", "Vanilla ticket", "Vanilla", *other) == 0
    searched = [flags for name, flags in scripts if name == "search"]
    assert [flags.get("learning_rate") for flags in searched] == [None, "2e-4"]
    assert all(flags["adv_steps"] == 1 for flags in searched)  # a vanilla ticket is still searched without adversary
    assert [flags.get("tau_ffn") for name, flags in scripts if name == "draw"] == [None, "0.1"]
    printed = capsys.readouterr().out
    assert printed.count("| Vanilla ticket | 1 |") == 2  # the second command prints both rows
    row = "\n| Vanilla ticket, `--draw tau-ffn=0.1 --search lambda-head=0 learning-rate=2e-4` | 1 |"
    assert printed.count(row) == 1
    seen = len(scripts)
    for method, flag, value in (
        *(("Vanilla", "search", "adv-lr=1"), ("Vanilla", "draw", "tau-ffn=0.1"), ("Vanilla", "finetune", "alpha=1")),
        *(("Vanilla", "finetune", "adv-lr=1"), ("Vanilla", "robustt", "epochs=1")),
        *(("Vanilla ticket", "search", "adv-lr=2"), ("Vanilla ticket", "search", "adversary=pgd")),
    ):
        assert make_table(tmp_path, "--methods", method, f"--{flag}", value) == 0 and len(scripts) == seen
    for method, flag, value in (
        *(("ORTicket", "search", "adv-lr=1"), ("PGD", "finetune", "adv-lr=1"), ("InfoBERT", "finetune", "alpha=1")),
        *(("RobustT", "robustt", "epochs=1"), ("Random ticket", "draw", "tau-ffn=0.1")),
        ("Vanilla", "attack", "sample-seed=3"),
    ):
        seen = len(scripts)
        assert make_table(tmp_path, "--methods", method, f"--{flag}", value) == 0 and len(scripts) > seen
        name, value = value.split("=")
        ran = [flags for script, flags in scripts[seen:] if script.split(".")[-1] == flag]
        assert ran[-1][name.replace("-", "_")] == value
    for flag, wrong in (("search", "adv-steps"), ("search", "output=elsewhere"), ("finetune", "seed=1")):
        assert make_table(tmp_path, f"--{flag}", wrong) == 2
        assert f"--{flag} {wrong!r}: give NAME=VALUE, an option of {flag}.py except" in capsys.readouterr().err


def test_runs_count_once_and_attack_errors_are_reported(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla", "Vanilla") == 0 and len(scripts) == 2
    found = {"figures": {"Clean%": 1.0, "learning rate": 1, "textfooler errors": 0}, "resources": {}, "hours": 1}
    found["outcomes"] = {"textfooler": runs.pack("1")}
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
    assert "\n3 attacks ended in an error. No mean and no difference" in capsys.readouterr().out


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
    assert f"argument {flags[0]}: invalid choice: {flags[1]!r} (choose from" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_packed_outcomes_are_unpacked():
    outcomes = "".join(np.random.Generator(np.random.PCG64(0)).choice(list("10-?"), 1000))
    assert runs.unpack(runs.pack(outcomes)) == outcomes and len(runs.pack(outcomes)) < 500


def test_interval_is_students_where_only_seeds_or_only_sentences_differ():
    generator = np.random.Generator(np.random.PCG64(0))
    differences = generator.choice((-1, 0, 1), 200)
    alike = np.tile(differences, (5, 1))  # all seeds are equal: the sentences are the only sample
    result = compare.compare(alike, np.zeros_like(alike))
    expected = stats.ttest_1samp(100 * differences, 0).confidence_interval()
    assert result["difference"] == pytest.approx(100 * differences.mean())
    assert result["interval"] == pytest.approx((expected.high - expected.low) / 2, rel=1e-6)
    by_seed = np.tile(generator.choice((-1, 0, 1), (5, 1)), (1, 50))  # all sentences are equal
    expected = stats.ttest_1samp(100 * by_seed[:, 0], 0).confidence_interval()
    interval = compare.compare(by_seed, np.zeros_like(by_seed))["interval"]
    assert interval == pytest.approx((expected.high - expected.low) / 2, rel=1e-6)


def test_interval_and_p_are_never_smaller_than_over_the_seeds_or_the_sentences_alone():
    generator = np.random.Generator(np.random.PCG64(0))
    for _ in range(50):
        ours, theirs = generator.random((2, 3, 60)) < 0.3
        result, d = compare.compare(ours, theirs), 100 * (ours.astype(float) - theirs)
        for alone in (d.mean(0), d.mean(1)):
            expected = stats.ttest_1samp(alone, 0)
            low, high = expected.confidence_interval()
            assert result["interval"] >= (high - low) / 2 - 1e-9 and result["p"] >= expected.pvalue - 1e-9


def test_interval_covers_the_truth_and_test_rejects_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(compare, "permutation_test", functools.partial(compare.permutation_test, draws=300))
    generator, covered, rejected = np.random.Generator(np.random.PCG64(0)), 0, 0
    for _ in range(300):  # both methods have the same chance, with effects of the seed and of the sentence
        shape, effects = (6, 60), [generator.normal(0, 0.6, (2, *of)) for of in ((6, 1), (1, 60))]
        chance = 1 / (1 + np.exp(-sum(effects)))
        ours, theirs = generator.random((2, *shape)) < chance
        result = compare.compare(ours, theirs)
        covered += abs(result["difference"]) <= result["interval"]
        rejected += result["p"] <= 0.05
    assert covered >= 0.93 * 300 and rejected <= 0.05 * 300


def test_no_difference_in_any_sentence_is_not_certainty():
    result = compare.compare(np.zeros((7, 250)), np.zeros((7, 250)))
    assert result == {"difference": 0, "interval": 300 / 250, "p": 1, "seeds_needed": None}  # the rule of three
    assert compare.compare(np.ones((1, 50)), np.zeros((1, 50))) == {"difference": 100}


def test_p_is_small_only_if_the_interval_excludes_zero():
    """Each permutation test leaves out one of the two sources of chance, Student's t none."""
    generator = np.random.Generator(np.random.PCG64(301))  # both permutation tests have a p below 0.05 here
    effects = [generator.normal(0, sd, (2, *of)) for sd, of in ((0.15, (7, 1)), (1.0, (1, 100)))]
    effects[0][0] += 0.25
    ours, theirs = generator.random((2, 7, 100)) < 1 / (1 + np.exp(-sum(effects)))
    d = ours.astype(float) - theirs
    assert compare.permutation_test(d.mean(1)) < 0.05 and compare.permutation_test(d.mean(0)) < 0.05
    result = compare.compare(ours, theirs)
    assert result["p"] > 0.05 and abs(result["difference"]) < result["interval"]


def test_the_interval_excludes_zero_exactly_if_the_permutation_over_seeds_does():
    generator = np.random.Generator(np.random.PCG64(0))
    for n in (6, 7, 10, 12):
        seen = set()
        for shift in np.linspace(0, 3, 40):
            d = generator.normal(shift, 1, n)
            excludes = abs(d.mean()) > compare.permutation_interval(d)
            seen.add(excludes)
            # the interval is symmetric: the wider side counts
            assert not excludes or compare.permutation_test(d) <= 0.05
            half = compare.permutation_interval(d) + 1e-6
            ends = [compare.permutation_test(d - d.mean() + end) for end in (half, -half)]
            assert max(ends) <= 0.05
            inside = [compare.permutation_test(d - d.mean() + end) for end in (half - 2e-6, 2e-6 - half)]
            assert max(inside) > 0.05
        assert seen == {True, False}
    assert compare.permutation_interval(np.ones(5)) == compare.permutation_interval(np.ones(13)) == 0


def test_permutation_test_equals_scipys():
    generator = np.random.Generator(np.random.PCG64(0))
    for n in (3, 8):
        d = generator.normal(0.4, 1, n)
        expected = stats.permutation_test(
            (d, np.zeros(n)), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples"
        )
        assert compare.permutation_test(d) == pytest.approx(expected.pvalue)
    d = generator.normal(0.15, 1, 100)
    expected = stats.permutation_test(
        (d, np.zeros(100)),
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        vectorized=True,
        random_state=1,
    )
    assert compare.permutation_test(d) == pytest.approx(expected.pvalue, abs=0.02)


def test_seeds_needed_have_the_promised_power(monkeypatch):
    monkeypatch.setattr(compare, "permutation_test", lambda differences: 1.0)
    generator, seen = np.random.Generator(np.random.PCG64(0)), []
    needed = compare.compare(*simulated(generator, 40, 0))["seeds_needed"]
    assert 4 <= needed <= 20
    for _ in range(200):
        result = compare.compare(*simulated(generator, needed, 0.03))
        seen.append(abs(result["difference"]) > result["interval"])
    assert 0.65 < np.mean(seen) < 0.92  # 80 %


def simulated(generator, seeds, gain, sentences=872):
    """Two methods, arrays (seeds, sentences): the first holds on `gain` more of the sentences."""
    chance = 0.3 + generator.normal(0, 0.02, (2, seeds, 1)) + np.array([gain, 0])[:, None, None]
    return generator.random((2, seeds, sentences)) < chance


@pytest.mark.skipif(not PAPER_TEXT.is_file(), reason="the paper's text is not there")
def test_papers_numbers_are_those_of_its_text():
    text = re.sub(r"</?u>|\$|\\[a-z]+|[{}]", " ", PAPER_TEXT.read_text("utf8"))
    lines = [[float(number) for number in re.findall(r"\d+\.\d+", line)] for line in text.splitlines()]
    for name, table in tables.PAPER.items():
        for task, rows in table["rows"].items():
            for method, numbers in rows.items():
                if name == "table2":  # 8.3, and 6.8 with the search, is 8.3_{-1.5}
                    speed, with_search, _ = numbers
                    numbers = [speed, round(speed - with_search, 1)] if with_search else [speed]
                if name == "table4":  # a line has the numbers of all tasks
                    numbers = [n for of in ("sst2", "qnli", "qqp", "imdb", "agnews") for n in table["rows"][of][method]]
                assert numbers in lines, (name, task, method)
    counts = {name: sum(map(len, table["rows"].values())) for name, table in tables.PAPER.items()}
    assert counts == {"table1": 30, "table2": 10, "table3": 12, "table4": 35, "table5": 15, "table6": 9}


@pytest.fixture
def verdict_runs():
    """Runs of four seeds, of 100 sentences: a function of {method: how many of them each seed holds}."""

    def make(**held):
        every = []
        for method, counts in held.items():
            for seed, count in enumerate(counts):
                figures = {"Clean%": 90, "M parameters": 20 if method == "ORTicket" else 25, "textfooler Aua%": count}
                figures |= {
                    "textfooler Suc%": 100 - count,
                    "textfooler #Query": 50,
                    "textfooler errors": 0,
                    "GB": 1,
                    "tokens_per_second": 9,
                }
                settings = {"model": "minilm", "train_rows": 5000, "epochs": 3, "n": 100, "batch_size": 32}
                run = {"task": "sst2", "method": method, "seed": seed, "settings": settings, "figures": figures}
                run["overrides"] = {"attack": {"min_cosine": "0.5"}}
                run["outcomes"] = {"textfooler": runs.pack("1" * count + "0" * (100 - count))}
                run |= {"resources": {}, "machine": "CPU with 1 thread"}
                every.append(run)
        return every

    return make


@pytest.mark.parametrize(
    "counts, significant, said",
    [
        ((30, 31, 29, 30, 30, 30, 31), True, "**A gain** from MiniLM. "),
        ((1, 0, 1, 0, 1, 1, 1), True, "**A loss** from MiniLM. "),
        ((9, 11, 10, 10, 9, 11, 11), False, "**No significant difference** from any start. "),
        ((30, 31, 29), False, "**No significant difference** from any start. "),  # three seeds give no p below 0.25
        ((90, 10, 90, 10, 90, 10, 10), False, "**No significant difference** from any start. "),
        ((30,), False, ""),  # one seed tests nothing
    ],
)
def test_the_verdict_marks_a_difference_that_is_significant(verdict_runs, counts, significant, said):
    found = verdict_runs(Vanilla=(10, 10, 11, 10, 10, 10, 10), ORTicket=counts)
    first = {"minilm": ((0.5, 100), verdict.grouped(found)["minilm"][0.5, 100])}
    result = tables.difference(found[7:], found[:7], "sst2", "textfooler")
    assert verdict.is_significant(result) == significant
    assert not verdict.is_significant({"difference": 2, "interval": 3, "p": 0.04})
    marked = f"**{tables.with_p(result)}**" if significant else tables.with_p(result)
    text = verdict.summary(first, {"minilm": 6.6})
    assert f"| Aua%: ORTicket minus Vanilla | +21.7 | {marked} |" in text
    assert f"Vanilla | - | {len(counts)} |" in text and "| MLM loss on held-out text | - | 6.60 |" in text
    assert "| Clean%: ORTicket minus Vanilla | -0.8 | +0.0" in text and "not counted" not in text
    assert "| parameters, relative to Vanilla | 0.85 | 0.80 |" in text
    assert "| speed of fine-tuning, relative to Vanilla | 1.24 | 1.00 |" in text
    sd = f" ± {np.std(counts, ddof=1):.1f}" if len(counts) > 1 else ""
    row = f"| ORTicket | {len(counts)} | 90.0{' ± 0.0' if sd else ''} | {np.mean(counts):.1f}{sd} |"
    assert row in verdict.table(first["minilm"][1])
    assert f"| {np.mean(counts):.1f}{sd} | {marked} |" in verdict.small_table(first)
    row = verdict.status(first, {})
    assert row.startswith(f"{said}ORTicket minus Vanilla in points of Aua%")
    assert row.endswith(f"SST-2: {marked} from MiniLM; the paper's, with BERT-base, is +21.7")
    found[0]["figures"]["textfooler errors"] = 3
    assert "| attacks that ended in an error, not counted | - | 3 |" in verdict.summary(first, {"minilm": 6.6})


def test_the_verdict_takes_runs_of_other_models_and_of_the_default_attack(verdict_runs, tmp_path, capsys):
    found = verdict_runs(Vanilla=(10, 11), ORTicket=(12, 13))
    for run in found[::2]:  # of one seed
        run["settings"] |= {"model": "bert-base-uncased", "train_rows": None}
        run["overrides"] = {}
    for run in found[1::2]:
        run["settings"] |= {"model": "runs/minilm-mlm"}
    starts = verdict.grouped(found)
    assert [*starts] == ["bert-base-uncased", "minilm-mlm"] and [*starts["bert-base-uncased"]] == [(0.5, 100)]
    first = leads(starts)
    assert "| Aua%: ORTicket minus Vanilla | +21.7 | +2.0 | +2.0 |" in verdict.summary(first, dict.fromkeys(first))
    text = " ".join(verdict.small_table(first).split())
    assert "1 seeds, all training rows, 3 epochs, TextFooler on 100 sentences" in text and "MLM" not in text
    for incomplete in ([], verdict_runs(Vanilla=(10, 11))):
        tables.write_runs(tmp_path / "verdict" / "table1.json", incomplete)
        assert call(verdict, "--results", tmp_path) == 2
        assert (
            "no runs of Vanilla and ORTicket on sst2: python -m experiments.table1 makes them"
            in capsys.readouterr().err
        )


def leads(starts):
    return {start: next(iter(attacks.items())) for start, attacks in starts.items()}


def test_the_loss_of_a_start_is_that_of_its_own_training_or_of_the_model_before_it(tmp_path):
    for name, after in (("minilm-mlm", 3.6), ("minilm-mlm2", 3.4)):
        losses = {"settings": {"model": "minilm"}, "loss_before": 6.6, "loss_after": after}
        write_result(tmp_path / f"{name}.json", losses)
    found = [verdict.mlm_loss(tmp_path, start) for start in ("minilm", "minilm-mlm", "minilm-mlm2", "roberta-base")]
    assert found == [6.6, 3.6, 3.4, None]


def test_the_verdict_compares_the_ticket_with_adversarial_training(verdict_runs):
    found, freelb = verdict_runs(Vanilla=(10, 11), ORTicket=(12, 13)), verdict_runs(FreeLB=(20, 21))
    assert "FreeLB" not in verdict.summary(leads(verdict.grouped(found)), {"minilm": None})
    for run in found[2:]:  # wrong on four sentences
        run["outcomes"] = {"textfooler": runs.pack(runs.unpack(run["outcomes"]["textfooler"])[:-4] + 4 * "-")}
    text = verdict.summary(leads(verdict.grouped(found + freelb)), {"minilm": None})
    result = tables.with_p(tables.difference(found[2:], freelb, "sst2", "textfooler"))
    assert result.startswith("-8.0 ± ") and f"| Aua%: ORTicket minus FreeLB | +7.8 | {result} |" in text
    gain = tables.with_p(tables.difference(freelb, found[:2], "sst2", "textfooler"))
    assert f"| Aua%: FreeLB minus Vanilla | +13.9 | {gain} |" in text
    assert "| Clean%: ORTicket minus Vanilla | -0.8 | -4.0 ± " in text
    for run in freelb:  # with a stronger adversary
        run["overrides"] = run["overrides"] | {"finetune": {"adv_lr": "0.2"}}
    methods = verdict.grouped(found + freelb)["minilm"][0.5, 100]
    assert "| FreeLB, `--finetune adv-lr=0.2` | 2 | 90.0 ± 0.0 | 20.5 ± 0.7 |" in verdict.table(methods)
    text = verdict.summary(leads(verdict.grouped(found + freelb)), {"minilm": None})
    assert f"| Aua%: FreeLB, `--finetune adv-lr=0.2` minus Vanilla | - | {gain} |" in text
    for run in found:  # what all have in common distinguishes no methods
        run["overrides"] = run["overrides"] | {"finetune": {"adv_lr": "0.2"}}
    assert "| FreeLB | 2 | 90.0 ± 0.0 | 20.5 ±" in verdict.table(verdict.grouped(found + freelb)["minilm"][0.5, 100])


def test_starts_are_judged_together_if_their_attacks_and_seeds_are_the_same(verdict_runs):
    generator, found = np.random.Generator(np.random.PCG64(0)), []
    for start, ticket in (("minilm", (8, 5, 6, 7, 5, 6, 8)), ("runs/minilm-mlm", (4, 7, 6, 5, 8, 7, 5))):
        for run in verdict_runs(Vanilla=(10, 11, 9, 10, 12, 10, 9), ORTicket=ticket):
            outcomes = generator.permutation(list(runs.unpack(run["outcomes"]["textfooler"])))
            run["settings"] |= {"model": start}
            found.append(run | {"outcomes": {"textfooler": runs.pack("".join(outcomes))}})
    scores = np.array([tables.held(run, "textfooler") for run in found]).reshape(2, 2, 7, 100).mean(0)
    expected = compare.compare(scores[1], scores[0])
    lines = f"- the mean over all starts, cosine 0.5, 100 sentences: **{tables.with_p(expected)}**\n"
    text = f"\nAua%: ORTicket minus Vanilla over several starts:\n\n{lines}"
    assert verdict.all_starts(verdict.grouped(found)) == (expected, text)
    assert "on average over several starts" in verdict.status(leads(verdict.grouped(found)), expected)
    others = [run | {"settings": run["settings"] | {"model": "bert-base-uncased", "epochs": 10}} for run in found[:14]]
    result, line = verdict.all_starts(verdict.grouped(found + others))
    assert result == expected and "the mean over MiniLM and MiniLM + 1 epoch of MLM, cosine" in line
    weaker = [run | {"overrides": {"attack": {"min_cosine": "0.7"}}} for run in found if run["seed"] < 6]
    both = verdict.all_starts(verdict.grouped(found + weaker))[1]
    assert lines in both and both.count("the mean over all starts") == 2
    third = [run | {"settings": run["settings"] | {"model": "another"}} for run in weaker[:12]]
    result, both = verdict.all_starts(verdict.grouped(found + weaker + third))
    weak = np.array([tables.held(run, "textfooler") for run in weaker + third]).reshape(3, 2, 6, 100).mean(0)
    assert result == compare.compare(weak[1], weak[0]) and both.index("all starts") < both.index(" and MiniLM + 1")
    assert verdict.all_starts(verdict.grouped(found[:14])) == ({}, "")
    assert verdict.all_starts(verdict.grouped(found[:-1])) == ({}, "")  # a seed is missing
    for run in found[14:]:
        run["overrides"] = {"attack": {"min_cosine": "0.5", "sample_seed": "1"}}
    assert verdict.all_starts(verdict.grouped(found)) == ({}, "")


def test_no_difference_is_written_without_a_minus():
    assert [tables.shown({"difference": number}) for number in (-0.04, 0.0, -0.06)] == ["+0.0", "+0.0", "-0.1"]


def test_the_price_is_paired_by_seed(verdict_runs):
    found = verdict_runs(Vanilla=(1, 2, 1), ORTicket=(2, 1, 2))
    for run, speed in zip(found, (100, 200, 400, 110, 242, 440)):
        run["figures"] |= {"tokens_per_second": speed, "GB": 3 if run["method"] == "ORTicket" else 2}
    logs = np.log([1.1, 1.21, 1.1])
    low, high = np.exp(stats.ttest_1samp(logs, 0).confidence_interval())
    methods = verdict.grouped(found)["minilm"][0.5, 100]
    assert verdict.ratio(methods, "tokens_per_second") == f"{np.exp(logs.mean()):.2f} ({low:.2f} to {high:.2f})"
    assert verdict.ratio(methods, "GB") == "1.50"
    found[0]["machine"] = "another"
    assert verdict.ratio(methods, "GB") == "-" and verdict.ratio(methods, "M parameters") == "0.80"


@pytest.mark.parametrize(
    "name, value",
    [
        ("settings", {"model": "minilm", "train_rows": 4000, "epochs": 3, "n": 100, "batch_size": 32}),
        ("overrides", {"attack": {"min_cosine": "0.5", "sample_seed": "1"}}),
        ("overrides", {"attack": {"min_cosine": "0.5"}, "search": {"corpus": "bbc"}}),
        ("resources", {"encoder": "another"}),
    ],
)
def test_the_verdict_refuses_runs_that_cannot_be_compared(verdict_runs, name, value):
    found = verdict_runs(Vanilla=(10, 11), ORTicket=(12, 13))
    verdict.grouped(found)
    differing = next(iter(value.keys() - {"attack"}), "attack") if name == "overrides" else name
    with pytest.raises(BadInput, match=f"from minilm at cosine 0.5 on 100 sentences differ in {differing}: keep one"):
        verdict.grouped([*found[:-1], found[-1] | {name: value}])


def test_differences_leave_out_other_seeds_and_sentences_with_an_error(verdict_runs):
    full, (ticket,) = verdict_runs(Vanilla=(10, 90)), verdict_runs(ORTicket=(20,))
    assert tables.difference([ticket], full, "sst2", "textfooler") == {"difference": 10}
    ticket["outcomes"] = {"textfooler": runs.pack("1" * 20 + "?" * 80)}
    assert tables.difference([ticket], full, "sst2", "textfooler") == {"difference": 50}
    ticket["outcomes"] = {"textfooler": runs.pack("1" * 10 + "-" * 10 + "?" * 80)}  # right, wrong and unknown
    assert tables.difference([ticket], full, "sst2", "textfooler", tables.is_clean) == {"difference": -50}
    ticket["outcomes"] = {"textfooler": runs.pack("?" * 100)}
    assert tables.difference([ticket], full, "sst2", "textfooler") == {}
    assert tables.difference([], full, "sst2", "textfooler") == {}


def test_the_best_ticket_is_chosen_on_other_sentences_than_it_is_measured_on():
    assert (verdict.best_of(np.eye(2, 2), np.full(2, 0.5)) == -50).all()  # each holds where it is chosen by
    generator, found = np.random.Generator(np.random.PCG64(0)), []
    for _ in range(400):  # 7 models of equal chance
        models = generator.random((7, 300)) < 0.2
        found.append(verdict.over_sentences(verdict.best_of(models, np.full(300, 0.2))))
    covered = [abs(result["difference"]) <= result["interval"] for result in found]
    assert abs(np.mean([result["difference"] for result in found])) < 0.4 and np.mean(covered) >= 0.95
    models = np.vstack([generator.random((20, 2000)) < 0.2, generator.random((1, 2000)) < 0.3])
    assert abs(verdict.best_of(models, np.full(2000, 0.2)).mean() - 10) < 2.5


def test_the_best_random_ticket_is_judged_by_its_runs_with_other_seeds(verdict_runs):
    found = verdict_runs(Vanilla=(10, 11, 10, 11), ORTicket=(12, 13, 12, 13), **{"Random ticket": (5, 7, 6, 8)})
    assert verdict.random_table(verdict.grouped(found[:-4])) == ""
    for run in verdict_runs(**{"Random ticket": (40, 12, 13, 14)}):
        found.append(run | {"overrides": run["overrides"] | {"finetune": {"ticket_seed": "9"}}})
    starts = verdict.grouped(found)
    rows = dict(re.findall(r"\| ([^|]+) \| ([^|]+) \|\n", verdict.random_table(starts)))
    again = tables.with_p(tables.difference(found[-3:], found[:4], "sst2", "textfooler"))
    assert again.startswith("+2.3 ± ") and rows["minus Vanilla with these seeds"] == again
    assert rows["random tickets"] == "5" and rows["the ticket that is best on all sentences"] == "40.0"
    assert rows["the same ticket, fine-tuned with other seeds"] == "13.0 ± 1.0"
    every, few, control, minus = (float(of.split()[0]) for label, of in rows.items() if label.startswith("best "))
    assert every > 20 and few < 0 and minus == pytest.approx(few - control, abs=0.11)
    # they are no runs of the random tickets of the seeds
    assert "| Random ticket | 4 | 90.0 ± 0.0 | 6.5 ± 1.3 |" in verdict.table(starts["minilm"][0.5, 100])
    for run in found:
        run["outcomes"] = {"textfooler": runs.pack("?" * 100)}
    assert verdict.random_table(verdict.grouped(found)) == ""


def test_a_random_ticket_is_judged_by_the_run_it_was_chosen_by_and_counts_each_seed_once(verdict_runs):
    found = verdict_runs(Vanilla=(10, 11, 12), ORTicket=(12, 13, 14), **{"Random ticket": (5, 30, 7)})
    for run in verdict_runs(**{"Random ticket": (9, 90, 10)}):  # of ticket 1, its seed 1 once more
        found.append(run | {"overrides": run["overrides"] | {"finetune": {"ticket_seed": "1"}}})
    by_ticket = verdict.random_tickets(next(iter(verdict.grouped(found)["minilm"].values())))
    counts = {number: [run["figures"]["textfooler Aua%"] for run in of] for number, of in by_ticket.items()}
    assert counts == {0: [5], 1: [30, 9, 10], 2: [7]}


def test_the_attack_with_the_most_seeds_then_methods_then_sentences_comes_first(verdict_runs):
    def attacked(found, n, **attack):
        return [run | {"settings": run["settings"] | {"n": n}, "overrides": {"attack": attack}} for run in found]

    two, three = verdict_runs(Vanilla=(1, 2), ORTicket=(3, 4)), verdict_runs(Vanilla=(1, 2, 3), ORTicket=(3, 4, 5))
    random = verdict_runs(**{"Random ticket": (5, 6)})
    found = attacked(two, 400) + attacked(two + random, 200) + attacked(two + random, 300) + attacked(three, 100)
    found += attacked(two + random, 300, min_cosine="0.7") + attacked(two[:2], 500)  # the last without ORTicket
    assert [*verdict.grouped(found)["minilm"]] == [(0.5, 100), (0.5, 300), (0.7, 300), (0.5, 200), (0.5, 400)]
    rows = [row for row in verdict.attacks_table(verdict.grouped(found)).splitlines() if row.startswith("| MiniLM |")]
    assert rows[-1].startswith("| MiniLM | 0.7 | 300 | 2 | 1.5 ± 0.7 | - | 3.5 ± 0.7 | - | 5.5 ± 0.7 | +2.0 ± ")
    assert [row.split(" | ")[1:4] for row in rows if row.split(" | ")[2] == "100"] == [["0.5", "100", "3"]]
    more = attacked(three, 300, min_cosine="0.6")  # of one more seed than the other attacks on 300 sentences
    text = verdict.attacks_table(verdict.grouped(found + more))
    assert "| 0.6 | 300 | 3 | 2.0 ± 1.0 |" in text and "| 0.6 | 300 | 2 | 1.5 ± 0.7 |" in text


def figure2_runs(make, seeds, aua):
    """Runs of ORTicket with several ratios of heads. aua: a function of (10 * ratio, seed)."""
    found = []
    for value in ("1/12", "1/6", "1/4", "1/3"):
        for run in make(ORTicket=(50,) * seeds):
            run["figures"] |= {"textfooler Aua%": aua(10 * float(Fraction(value)), run["seed"])}
            found.append(run | {"overrides": run["overrides"] | {"draw": {"tau_head": value}}})
    return found


def test_figure2_has_what_its_runs_share_in_the_title(verdict_runs, monkeypatch):
    """A random ticket has no options of a search. Only what tells the runs of one method apart is in the legend."""
    figures = []
    monkeypatch.setattr(figure2, "save_figure", lambda figure, path: figures.append(figure))
    found = figure2_runs(verdict_runs, 2, lambda ratio, seed: 5)
    for run in found:
        run["settings"] |= {"attacks": "textfooler"}
    searched = [run | {"overrides": run["overrides"] | {"search": {"corpus": "bbc"}}} for run in found]
    figure2.plot(searched + [run | {"method": "Random ticket"} for run in found], "")
    columns = ("Clean%", "textfooler Aua%")
    labels = [f"{method}, {column}" for column in columns for method in ("ORTicket", "Random ticket")]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == labels
    assert figures[0].get_suptitle() == "minilm on sst2, --attack min-cosine=0.5 --search corpus=bbc"
    figure2.plot(searched + found, "")
    assert any("--search corpus=bbc`" in text.get_text() for text in figures[1].legends[0].get_texts())
    assert figures[1].get_suptitle() == "minilm on sst2"


def test_mlm_training_lowers_the_loss_on_texts_that_are_held_out(tmp_path, monkeypatch):
    saved(tmp_path / "model", max_position_embeddings=160)
    rows = [((f"{LETTERS[i % 26]} b a\nb a b {i} " * 40,), 0) for i in range(300)]
    monkeypatch.setattr(mlm.data, "reviews", lambda source: rows[:100] if source == "imdb" else rows[100:200])
    monkeypatch.setattr(mlm.data, "bbc", lambda: rows[200:])

    def run_script(name, overwrite, **flags):
        call(search, *[part for flag, value in flags.items() for part in (f"--{flag.replace('_', '-')}", value)])

    monkeypatch.setattr(mlm, "run_script", run_script)
    flags = ["--model", tmp_path / "model", "--output", tmp_path, "--results", tmp_path, "--learning-rate", 1e-2]
    assert call(mlm, *flags) == 0
    parts = [
        (tmp_path / "model" / "model-mlm" / name / "text.txt").read_text().split("\n") for name in ("held-out", "train")
    ]
    assert len(parts[0]) == 6  # one of 50
    assert sorted(parts[0] + parts[1]) == sorted(" ".join(text.split()) for (text,), _ in rows)
    result = json.loads((tmp_path / "model-mlm.json").read_text())
    assert not Bert.load(tmp_path / "model-mlm", mlm=True).initialized
    assert result["loss_after"] < 0.8 * result["loss_before"]


def test_overlap_is_the_share_of_what_one_ticket_prunes_that_the_other_prunes_too(monkeypatch, capsys):
    first = torch.tensor([[0, 0, 1, 1]]).bool(), torch.tensor([[0, 0, 0, 0, 1]]).bool()
    second = torch.tensor([[1, 0, 0, 1]]).bool(), torch.tensor([[0, 1, 1, 1, 1]]).bool()
    assert overlap.overlap(first, second) == [1 / 2, 1 / 4]
    assert overlap.overlap(second, first) == [1 / 2, 1]
    head, ffn = (torch.stack(masks).float() for masks in zip(first, second))
    published = {"script": "publish.py", "settings": {"seed": 0}, "seeds": [0, 1]}
    of_one = {"script": "search.py", "settings": {"seed": 1}}

    def read(path, seed=None):
        number = 1 if path == "one" else seed or 0
        return head[number], ffn[number], of_one if path == "one" else published

    monkeypatch.setattr(overlap, "read_coefficients", read)
    assert call(overlap, "several", "one", "--tau-head", "0.5", "--tau-ffn", "0.2") == 0
    out = capsys.readouterr().out
    assert "2: several, seed 1\n3: one, seed 1\n" in out
    assert "| 1 | 100.0% / 100.0% | 50.0% / 100.0% | 50.0% / 100.0% |" in out


def test_the_verdict_is_written_into_the_documents_and_nothing_else_of_them_changes(
    verdict_runs, tmp_path, monkeypatch
):
    documents = [Path("README.md"), Path("docs/results.md")]
    before = [(verdict.ROOT / path).read_text("utf8") for path in documents]
    for path, text in zip(documents, before):
        files.write_text(tmp_path / path, text)
    results = tmp_path / "results"
    tables.write_runs(results / "verdict" / "table1.json", verdict_runs(Vanilla=(1, 2, 1), ORTicket=(9, 8, 9)))
    monkeypatch.setattr(verdict, "ROOT", tmp_path)
    assert call(verdict, "--results", results) == 0
    after = [(tmp_path / path).read_text("utf8") for path in documents]
    page = set(after[1].splitlines()) - set(before[1].splitlines())
    assert any(line.startswith("| Aua%: ORTicket minus Vanilla | +21.7 | +7.3 ± ") for line in page)
    parts = [re.split(rf"{verdict.BEGIN}\n(?s:.*){verdict.END}", text) for text in (*before, *after)]
    assert [len(part) for part in parts] == [2, 2, 2, 2] and parts[1] == parts[3]
    lines = [line for part in parts[::2] for line in set(part[0].splitlines())]
    (changed,) = [line for line in lines if lines.count(line) == 1 and "+7.3 ± " in line]
    assert changed.startswith(f"| {verdict.ROW} |") and parts[0][1] == parts[2][1]
