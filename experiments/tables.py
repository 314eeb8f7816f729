"""The command of every table and figure: makes the runs that are missing, then writes the results.

RESULTS/TABLE.json has the settings and the figures of all runs, and for each attacked sentence whether the model held.
RESULTS/TABLE.md has their means, beside them the paper's numbers, and the differences between the methods.
"""

import itertools
import json
import statistics
from dataclasses import dataclass, fields
from pathlib import Path

import filelock
import numpy as np

import data
from attacks.recipes import RECIPES
from checkpoints import provenance
from checkpoints.provenance import read_result, write_result
from experiments.compare import compare
from experiments.runs import (
    METHODS,
    PAPER_TASKS,
    WITHOUT_ADVERSARY,
    code,
    parse_overrides,
    relevant_overrides,
    run_method,
    unpack,
)
from freelb import ADVERSARIES
from runtime import cli, files
from runtime.cli import BadInput, first_few, option
from runtime.device import DEFAULT_MODEL, MODEL_HELP, describe, pick_device

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text("utf8"))
SETTINGS = ("model", "train_rows", "epochs", "batch_size", "learning_rate", "attacks")  # of all runs of a table
KEY = ("task", "method", "seed", "settings", "overrides")  # what tells a run from another
QUICK = {"model": "minilm", "tasks": ("rt",), "train_rows": 2000, "epochs": 3, "n": 100, "attacks": ("textfooler",)}
QUICK |= {"search": ("corpus=bbc",), "robustt": ("epochs=2",)}
REFERENCES = ("Vanilla", "Random ticket")  # to which all methods are compared


@dataclass
class Options:
    tasks: tuple = option(PAPER_TASKS, f"one table per task: {', '.join(data.TASKS)}", group="runs")
    methods: tuple = option((), f"rows, instead of the table's: {', '.join(METHODS)}", group="runs")
    seeds: int = option(
        1, "runs per method, with the seeds from 0, each with a search of its own", group="runs", at_least=1
    )
    attacks: tuple = option(("textfooler", "textbugger", "bertattack"), f"of {', '.join(RECIPES)}", group="runs")
    n: int = option(None, "attacked test rows [all of SST-2, 1,000 of other tasks]", group="runs", at_least=1)
    quick: bool = option(False, "a small version: MiniLM, 2,000 rows of rt, 3 epochs, 100 attacked rows", group="runs")
    dry_run: bool = option(False, "only list the missing runs, and the hours that they take", group="runs")
    model: str = option(DEFAULT_MODEL, MODEL_HELP, group="training")
    train_rows: int = option(
        None, "train on this many rows, the same for every seed [all]", group="training", at_least=1
    )
    epochs: int = option(10, "epochs of fine-tuning", group="training", at_least=1)
    batch_size: int = option(32, "rows per step", group="training", at_least=1)
    learning_rate: float = option(None, "of fine-tuning [2e-5; 1e-4 for small models]", group="training", above=0)
    search: tuple = option((), "options of search.py as NAME=VALUE; shown as separate rows", group="overrides")
    draw: tuple = option((), "options of draw.py, such as tau-ffn=0.1", group="overrides")
    finetune: tuple = option((), "options of finetune.py, such as adv-max-norm=2", group="overrides")
    robustt: tuple = option((), "options of baselines.robustt, such as epochs=5", group="overrides")
    attack: tuple = option((), "options of attack.py, such as sample-seed=1", group="overrides")
    output: str = option("runs", "folder for the models", group="output")
    results: str = option("experiments/results", "folder for the tables", group="output")
    device: str = option("auto", "as in search.py", group="output")
    overwrite: bool = option(False, "make runs of other code anew, in place of those that are there", group="output")


def make_table(table, methods, description, to_markdown=None, attacked=True, **defaults):
    """The command `python -m experiments.TABLE`. methods: the rows. to_markdown(table, runs): the text, if not
    `markdown`. attacked: whether the models are. defaults: of options that the table has its own for."""
    options = parse(description, methods, attacked, **defaults)
    cells = list(itertools.product(options.tasks, range(options.seeds), dict.fromkeys(options.methods)))
    runs = make_runs(options, table, [(task, method, seed, {}) for task, seed, method in cells])
    if not options.dry_run:
        write_markdown(options, table, (to_markdown or markdown)(table, runs))


def parse(description, methods=(), attacked=True, **defaults):
    """The options of a table. Where they are not given, those of --quick or of the table count."""
    options = cli.parse(Options, description)
    own = {field.name: field.default for field in fields(Options)}
    for name, value in (defaults | (QUICK if options.quick else {})).items():
        if getattr(options, name) == own[name]:
            setattr(options, name, value)
    options.methods = options.methods or tuple(methods)
    for name, known in (("methods", METHODS), ("tasks", data.TASKS), ("attacks", RECIPES)):
        for value in getattr(options, name):
            if value not in known:
                raise BadInput(f"--{name} {value!r}: give some of {', '.join(known)}")
    options.attacks = [name for name in RECIPES if name in options.attacks and attacked]  # in a fixed order
    return options


def make_runs(options, table, cells):
    """Make the runs that RESULTS/TABLE.json lacks, of cells (task, method, seed, overrides of this cell, which add to
    those of the command). Returns all runs of the file."""
    path, given = Path(options.results) / f"{table}.json", parse_overrides(options)
    settings = {name: getattr(options, name) for name in SETTINGS} | {"attacks": " ".join(options.attacks)}
    options.n = {task: test_rows(options, task) for task in dict.fromkeys(task for task, *_ in cells)}
    keys = []
    for task, method, seed, own in cells:
        overrides = {script: given[script] | own.get(script, {}) for script in given}
        key = {"task": task, "method": method, "seed": seed, "settings": settings | {"n": options.n[task]}}
        keys.append(key | {"overrides": relevant_overrides(method, overrides)})
    machine, current, recorded, outdated = describe(pick_device(options.device)), code(), [], {}
    for run in load_runs(path):
        if (key := {name: run[name] for name in KEY}) in keys:
            outdated |= provenance.differences(run["code"], current)
            recorded += [key] if run["code"] == current else []
    if outdated and not options.overwrite:
        files_changed = first_few(outdated)
        raise BadInput(f"{path} has runs of other code ({files_changed}): use --overwrite, or another --results")
    missing = [key for key in keys if key not in recorded]
    if options.dry_run:
        list_missing(missing, load_runs(path), machine)
        return load_runs(path)
    bar = cli.progress(len(keys), len(keys) - len(missing), table, "run")
    for key in missing:
        bar.set_postfix_str(f"{key['method']} on {key['task']}, seed {key['seed']}")
        run = run_method(options, key["task"], key["method"], key["seed"], key["overrides"])
        save_run(path, key | run | {"machine": machine, "code": current, "versions": provenance.versions()})
        bar.update()
    bar.close()
    return load_runs(path)


def test_rows(options, task):
    """The number of attacked test rows; None without an attack. Raises BadInput if there are fewer."""
    if not options.attacks:
        return None
    count = len(data.find_task(task).load(None)["test"])
    if (options.n or 0) > count:
        raise BadInput(f"--n {options.n} is more than the {count:,} test rows of {task}")
    return options.n or (count if task == "sst2" else min(1000, count))


def list_missing(missing, runs, machine):
    """Print the missing runs, and their hours by those that this machine has made: of the same method and settings,
    else of the same settings, else of the same model."""
    total, unknown = 0.0, 0
    for key in missing:
        made = [run for run in runs if run["machine"] == machine]
        same = [run for run in made if run["settings"] == key["settings"]]
        alike = [run for run in same if run["method"] == key["method"] and run["task"] == key["task"]] or same
        alike = alike or [run for run in made if run["settings"]["model"] == key["settings"]["model"]]
        hours = statistics.mean(run["hours"] for run in alike) if alike else None
        total, unknown = total + (hours or 0), unknown + (hours is None)
        shown = "an unknown time" if hours is None else f"about {hours:.2f} h"
        print(f"{key['task']}: {key['method']}{overrides_text(key['overrides'])}, seed {key['seed']}: {shown}")
    rest = f", and {unknown} runs of which this machine has made none alike" if unknown else ""
    print(f"{len(missing)} runs are missing: about {total:.1f} hours{rest}")


def load_runs(path):
    """The runs in the .json of a table. Raises BadInput for another .json."""
    runs = read_result(path).get("runs") if path.is_file() else []
    if runs is None:
        raise BadInput(f"{path} has no runs: give another --results")
    return runs


def save_run(path, run):
    """Add a run to the .json of a table, in place of an older one, and of those of other code in its row of the table.

    Other commands may write to the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):

        def stays(other):
            if any(other[name] != run[name] for name in KEY if name != "seed"):
                return True
            return other["seed"] != run["seed"] and other["code"] == run["code"]

        write_result(path, {"runs": [*filter(stays, load_runs(path)), run]})


def write_markdown(options, name, text):
    """Write RESULTS/NAME.md and print it."""
    files.write_text(Path(options.results) / f"{name}.md", text)
    print(text, end="")


def markdown(table, runs):
    """All runs as Markdown: a table for each task, settings and resources of the attacks, with the differences."""
    text = f"Written by `python -m experiments.{table}` from {table}.json. Each cell: the mean over the seeds ± its "
    text += "standard deviation, in parentheses the paper's number for BERT-base.\n"
    for (task, settings, resources), group in grouped(runs):
        text += f"\n## {task}\n\n{described(settings, group)}\n\n"
        text += "".join(f"- {name}: {description}\n" for name, description in resources.items())
        attacks = (settings["attacks"] or "").split()
        columns = [f"{attack} {column}" for attack in attacks for column in ("Aua%", "Suc%", "#Query")]
        columns = ["Clean%", *columns, "GB", "M parameters"]
        rows = by_row(group)
        text += markdown_table(
            task,
            ["runs", *columns],
            [[label, str(len(of)), *(cell(of, column, table) for column in columns)] for label, of in rows.items()],
        )
        text += adversaries(METHODS[run["method"]] for run in group)
        for attack in attacks:
            text += differences(attack, rows)
        if errors := sum(run["figures"][f"{attack} errors"] for run in group for attack in attacks):
            text += f"\n{errors} attacks ended in an error. No mean counts them; "
            text += "the differences count them as successful.\n"
    return text


def grouped(runs):
    """[((task, settings, resources), runs)], of the runs that share these."""
    groups = {}
    for run in runs:
        key = json.dumps([run["task"], run["settings"], run["resources"]], sort_keys=True)
        groups.setdefault(key, []).append(run)
    return [(json.loads(key), group) for key, group in groups.items()]


def by_row(runs):
    """{label of a method with its overrides: its runs}, in the order of METHODS."""
    rows = {}
    for run in sorted(runs, key=lambda run: (overrides_text(run["overrides"]), list(METHODS).index(run["method"]))):
        rows.setdefault(run["method"] + overrides_text(run["overrides"]), []).append(run)
    return rows


def described(settings, runs):
    rates = sorted({run["figures"]["learning rate"] for run in runs})
    shown = settings | {"learning_rate": " and ".join(f"{rate:g}" for rate in rates)}
    return ", ".join(f"{name.replace('_', ' ')} {shown[name]}" for name in shown if shown[name] is not None) + "."


def adversaries(methods):
    """The numbers of the adversaries that methods of a table are searched or fine-tuned with, as Markdown."""
    used = set()
    for method in methods:
        searched = "freelb" if method.ticket == "drawn" and method.search != WITHOUT_ADVERSARY else None
        used |= {method.method, "freelb-textdefender" if method.ticket == "robustt" else searched}
    shown = [f"{name} {ADVERSARIES[name][:4]}" for name in ADVERSARIES if name in used - {"vanilla"}]
    text = "\nAdversaries as (K, step, first magnitude, bound or 0), except where a row gives others: "
    return f"{text}{', '.join(shown)}.\n" if shown else ""


def overrides_text(overrides):
    """ ", `--search adv-lr=0.1`" for {script: {option: value}}; empty without any."""
    flags = [
        " ".join([f"--{script}", *(f"{name.replace('_', '-')}={value}" for name, value in sorted(pairs.items()))])
        for script, pairs in sorted(overrides.items())
    ]
    return f", `{' '.join(flags)}`" if flags else ""


def cell(runs, column, table):
    """Mean ± standard deviation of a column, and the paper's number."""
    numbers = [run["figures"][column] for run in runs if run["figures"].get(column) is not None]
    paper = paper_number(table, runs[0], column)
    return mean_and_deviation(numbers) + (f" ({paper:g})" if paper is not None else "")


def paper_number(table, run, column):
    """The paper's number for the task and method of a run without overrides, or None."""
    paper = PAPER.get(table, {"columns": (), "rows": {}})
    numbers = paper["rows"].get(run["task"], {}).get(run["method"])
    known = numbers and column in paper["columns"] and not set(run["overrides"]) - {"robustt"}
    return numbers[paper["columns"].index(column)] if known else None


def markdown_table(corner, columns, rows):
    lines = [[corner, *columns], ["---", *["---:"] * len(columns)], *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_deviation(numbers, digits=1):
    if len(numbers) < 2:
        return f"{numbers[0]:,.{digits}f}" if numbers else "-"
    return f"{statistics.mean(numbers):,.{digits}f} ± {statistics.stdev(numbers):,.{digits}f}"


def held(runs, attack):
    """{seed: array (sentences,), 1 where the model held against the attack}. A sentence whose attack ended in an error
    counts as not held."""
    return {run["seed"]: np.array([outcome == "1" for outcome in unpack(run["outcomes"][attack])]) for run in runs}


def differences(attack, rows):
    """The differences in Aua% between each row and the reference rows, as Markdown."""
    lines = []
    for label, runs in rows.items():
        line, needed = [label], None
        for reference in REFERENCES:
            ours, theirs = held(runs, attack), held(rows.get(reference, []), attack)
            seeds = sorted(ours.keys() & theirs.keys())
            if label == reference or not seeds:
                line += ["-", "-"]
                continue
            result = compare([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            interval = "" if result["interval"] is None else f" ± {result['interval']:.1f}"
            line += [f"{result['difference']:+.1f}{interval}", "-" if result["p"] is None else f"{result['p']:.3f}"]
            if len(seeds) > 1:
                needed = result["seeds_needed"] or "more sentences"
        lines.append([*line, str(needed or "-")])
    if all(set(line[1:]) == {"-"} for line in lines):
        return ""
    columns = [name for reference in REFERENCES for name in (f"- {reference}", "p")]
    text = f"\nDifferences in Aua% under {attack}, with their 95 % interval over seeds and sentences, and the p of a "
    text += "permutation test over both. The last column: how many seeds would show a difference of 3 points.\n"
    return text + markdown_table("", [*columns, "seeds for 3 points"], lines)
