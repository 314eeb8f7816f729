"""The command of every table: makes the missing runs, then writes the results.

RESULTS/TABLE.json has the settings and the figures of all runs, and the outcome for each attacked sentence.
RESULTS/TABLE.md has their means, the paper's numbers, and the differences between the methods.
"""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

import data
from attacks.recipes import RECIPES
from checkpoints import provenance
from experiments.compare import VISIBLE, compare
from experiments.runs import (
    METHODS,
    PAPER_TASKS,
    WITHOUT_ADVERSARY,
    code,
    overrides_text,
    parse_overrides,
    relevant_overrides,
    run_method,
    unpack,
)
from freelb import ADVERSARIES
from runtime import cli, files
from runtime.cli import BadInput, first_few, option
from runtime.device import DEFAULT_MODEL, MODEL_HELP, describe_machine, pick_device

PAPER = files.read_json(Path(__file__).with_name("paper.json"))
COLUMNS = ("Clean%", "Aua%", "Suc%", "#Query", "GB", "M parameters")
ATTACKS = ("textfooler", "textbugger", "bertattack")
SETTINGS = ("model", "train_rows", "epochs", "batch_size", "learning_rate")  # of all runs of a table
KEY = ("task", "method", "seed", "settings", "overrides")  # what identifies a run
QUICK = {"model": "minilm", "tasks": ("rt",), "train_rows": 2000, "epochs": 3, "n": 100, "attacks": ("textfooler",)}
QUICK |= {"search": ("corpus=bbc-small",), "robustt": ("epochs=2",)}
SHARED = ("code", "versions", "resources")  # of a run; the same in most runs of a table
REFERENCES = ("Vanilla", "Random ticket")  # to which all methods are compared


@dataclass
class Options:
    tasks: tuple = option(PAPER_TASKS, f"of {', '.join(data.TASKS)}", choices=tuple(data.TASKS), group="runs")
    methods: tuple = option((), f"rows: of {', '.join(METHODS)} [the table's]", choices=tuple(METHODS), group="runs")
    seeds: int = option(1, "runs per method, from seed 0 on, each with its own search", group="runs", at_least=1)
    attacks: tuple = option(ATTACKS, f"of {', '.join(RECIPES)}", choices=tuple(RECIPES), group="runs")
    n: int = option(None, "attacked test rows [all of SST-2, 1,000 of other tasks]", group="runs", at_least=1)
    quick: bool = option(False, "a small version: MiniLM, 2,000 rows of rt, 3 epochs, 100 attacked rows", group="runs")
    dry_run: bool = option(False, "only list the missing runs, and the hours that they take", group="runs")
    model: str = option(DEFAULT_MODEL, MODEL_HELP, group="training")
    train_rows: int = option(None, "training rows, the same for every seed [all]", group="training", at_least=1)
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
    overwrite: bool = option(False, "replace existing runs of other code", group="output")


def parse(description, options=Options, **defaults):
    """The options of a command. Options not given have the defaults of --quick, or else the command's own."""
    parsed = cli.parse(options, description, **defaults)
    return cli.parse(options, description, **defaults | QUICK) if parsed.quick else parsed


def make_table(table, description, methods, columns=COLUMNS, across=False, draws=({},), **defaults):
    """The command `python -m experiments.TABLE`. Returns its options and all runs of RESULTS/TABLE.json.

    methods: the rows. columns, across: as in `markdown`; without Aua% nothing is attacked. draws: options of
    draw.py, with a run for each. defaults: of options for which the table has its own.
    """
    options = parse(description, methods=methods, **defaults)
    machine, current = describe_machine(pick_device(options.device)), code()
    path = Path(options.results) / f"{table}.json"
    keys, runs = list_keys(options, draws, "Aua%" in columns), load_runs(path)
    found = [run for run in runs if key_of(run) in keys]
    recorded = [key_of(run) for run in found if run["code"] == current]
    if len(recorded) < len(found) and not options.overwrite:
        changed = set().union(*(provenance.differences(run["code"], current) for run in found))
        changed = first_few(sorted(changed))
        raise BadInput(f"{path} has runs of other code ({changed}): use --overwrite, or another --results")
    missing = [key for key in keys if key not in recorded]
    if options.dry_run:
        list_missing(missing, [run for run in runs if run["machine"] == machine])
        return options, []
    with cli.progress(len(keys), len(keys) - len(missing), table, "run") as bar:
        for key in missing:
            bar.set_postfix_str(f"{key['method']} on {key['task']}, seed {key['seed']}")
            made = {"machine": machine, "code": current, "versions": provenance.versions()}
            save_run(path, key | run_method(options, key) | made)
            bar.update()
    runs = load_runs(path)
    text = markdown(table, runs, columns, across)
    files.write_text(path.with_suffix(".md"), text)
    print(text, end="")
    return options, runs


def list_keys(options, draws, attacked):
    """The runs that a command asks for, each {name of KEY: value}. Raises BadInput if --n is more than all rows."""
    given, keys = parse_overrides(options), {}
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings["attacks"] = " ".join(name for name in RECIPES if name in options.attacks and attacked)
    for task in options.tasks:
        settings["n"] = None
        if attacked:
            count = len(data.find_task(task).load(None)["test"])
            settings["n"] = options.n or (count if task == "sst2" else min(1000, count))
            if settings["n"] > count:
                raise BadInput(f"--n {options.n} is more than the {count:,} test rows of {task}")
        for seed, draw, method in itertools.product(range(options.seeds), draws, options.methods):
            overrides = relevant_overrides(METHODS[method], given | {"draw": given["draw"] | draw})
            values = task, method, seed, dict(settings), overrides
            keys[repr(values)] = dict(zip(KEY, values))  # each once
    return list(keys.values())


def key_of(run):
    return {name: run[name] for name in KEY}


def list_missing(missing, runs):
    """Print the missing runs and their expected hours: the mean of the `runs` with the same settings, and with the same
    method and task if there are any."""
    total, unknown = 0.0, 0
    for key in missing:
        alike = [run for run in runs if run["settings"] == key["settings"]]
        same = [run for run in alike if (run["task"], run["method"]) == (key["task"], key["method"])]
        hours = statistics.mean(run["hours"] for run in same or alike) if alike else None
        total, unknown = total + (hours or 0), unknown + (hours is None)
        shown = "an unknown time" if hours is None else f"about {hours:.2f} h"
        print(f"{key['task']}: {key['method']}{overrides_text(key['overrides'])}, seed {key['seed']}: {shown}")
    rest = f", and {unknown} runs unlike any that this machine has made" if unknown else ""
    print(f"{len(missing)} runs are missing: about {total:.1f} hours{rest}")


def load_runs(path):
    """The runs in the .json of a table. Raises BadInput for any other .json."""
    result = provenance.read_result(path) if path.is_file() else {"shared": {}, "runs": []}
    if not {"shared", "runs"} <= result.keys():
        raise BadInput(f"{path} has no runs, or an earlier version wrote it: give another --results")
    shared = result["shared"]
    return [run | {name: shared[run[name]] for name in SHARED if name in run} for run in result["runs"]]


def write_runs(path, runs):
    """Write the .json of a table. What many runs have in common is written once, under its digest."""
    digests = [{name: provenance.json_sha256(run[name])[:16] for name in SHARED if name in run} for run in runs]
    shared = {digest: run[name] for run, of in zip(runs, digests) for name, digest in of.items()}
    provenance.write_result(path, {"shared": shared, "runs": [run | of for run, of in zip(runs, digests)]})


def save_run(path, run):
    """Add a run to the .json of a table. It replaces an older version of it, and runs of other code in its row.

    Other commands may write to the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        kept = [
            other
            for other in load_runs(path)
            if key_of(other | {"seed": 0}) != key_of(run | {"seed": 0})
            or (other["seed"] != run["seed"] and other["code"] == run["code"])
        ]
        write_runs(path, [*kept, run])


def markdown(table, runs, columns=COLUMNS, across=False):
    """All runs as Markdown: a table for each task, settings and resources of the attacks, with the differences.

    columns: the figures that are shown, of all attacks. across: the tasks stand side by side.
    """
    text = f"Written by `python -m experiments.{table}` from {table}.json. Each cell: the mean over the seeds ± its "
    text += "standard deviation, in parentheses the paper's number. Speed: tokens per second of training relative to "
    text += "FreeLB's; with search: its seconds of training / (those of the search and the training).\n"
    for group in grouped(runs, across):
        add_speeds(group)
        tasks, rows = list(dict.fromkeys(run["task"] for run in group)), by_row(group)
        machines = sorted({run["machine"] for run in group})
        text += f"\n## {', '.join(tasks)}\n\n{described(group)} Made on {' and '.join(machines)}.\n\n"
        text += "".join(f"- {name}: {description}\n" for name, description in group[0]["resources"].items())
        attacks = (group[0]["settings"]["attacks"] or "").split()
        names = ["speed", "with search", "Clean%"]
        names += [f"{attack} {figure}" for attack in attacks for figure in ("Aua%", "Suc%", "#Query")]
        names = [name for name in [*names, "GB", "M parameters"] if name.endswith(columns)]
        lines = [
            [label, str(len(of)), *(cell(table, of, task, name) for task in tasks for name in names)]
            for label, of in rows.items()
        ]
        heads = [f"{task} {name}" if across else name for task in tasks for name in names]
        text += markdown_table(["method", "runs", *heads], lines) + adversaries(group)
        for task, attack in itertools.product(tasks, attacks):
            text += differences(task, attack, rows)
        if errors := sum(run["figures"][f"{attack} errors"] for run in group for attack in attacks):
            text += f"\n{errors} attacks ended in an error. No mean and no difference counts their sentences.\n"
    return text


def grouped(runs, across=False):
    """[runs that share settings and the resources of their attacks, and, unless `across`, their task]."""
    groups = {}
    for run in runs:
        shared = run["settings"] | ({"n": None} if across else {"task": run["task"]})
        groups.setdefault(provenance.json_sha256([shared, run["resources"]]), []).append(run)
    return list(groups.values())


def by_row(runs):
    """{label of a method with its overrides: its runs}, in the order of METHODS."""
    rows = {}
    for run in sorted(runs, key=lambda run: (overrides_text(run["overrides"]), list(METHODS).index(run["method"]))):
        rows.setdefault(run["method"] + overrides_text(run["overrides"]), []).append(run)
    return rows


def add_speeds(runs):
    """Add the speed to the figures of runs of one task, relative to FreeLB's mean on a machine of the same description,
    without and with the search."""
    for machine in {run["machine"] for run in runs}:
        alike = [run for run in runs if run["machine"] == machine]
        freelb = [run["figures"] for run in alike if run["method"] == "FreeLB" and not run["overrides"]]
        if freelb:
            rate, seconds = (statistics.mean(of[name] for of in freelb) for name in ("tokens_per_second", "seconds"))
            for figures in [run["figures"] for run in alike]:
                figures["speed"] = figures["tokens_per_second"] / rate
                figures["with search"] = seconds / (figures["seconds"] + figures.get("search seconds", 0))


def described(runs):
    """The settings of the runs, with the learning rates that were used."""
    found = [run["settings"] | {"learning_rate": run["figures"].get("learning rate")} for run in runs]
    shown = {name: " and ".join(sorted({str(of[name]) for of in found if of[name] is not None})) for name in found[0]}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value) + "."


def adversaries(runs):
    """The numbers of the adversaries that the methods of the runs are searched or fine-tuned with, as Markdown."""
    used = set()
    for method in (METHODS[run["method"]] for run in runs):
        searched = "freelb" if method.ticket == "drawn" and method.search != WITHOUT_ADVERSARY else None
        used |= {method.method, "freelb-textdefender" if method.ticket == "robustt" else searched}
    shown = [f"{name} {ADVERSARIES[name][:4]}" for name in ADVERSARIES if name in used - {"vanilla"}]
    text = "\nAdversaries as (K, step, first magnitude, bound or 0), except where a row gives others: "
    return f"{text}{', '.join(shown)}.\n" if shown else ""


def cell(table, runs, task, column):
    """Mean ± standard deviation of a column over the runs of a row on a task, and the paper's number."""
    runs, digits = [run for run in runs if run["task"] == task], 2 if column in ("speed", "with search") else 1
    numbers = [run["figures"][column] for run in runs if run["figures"].get(column) is not None]
    text = f"{statistics.mean(numbers):,.{digits}f}" if numbers else "-"
    text += f" ± {statistics.stdev(numbers):,.{digits}f}" if len(numbers) > 1 else ""
    paper = PAPER.get(table, {"columns": [], "rows": {}})
    if runs and column in paper["columns"] and not set(runs[0]["overrides"]) - {"robustt"}:
        row = paper["rows"].get(task, {}).get(runs[0]["method"])
        number = row and row[paper["columns"].index(column)]
        text += "" if number is None else f" ({number:g})"
    return text


def markdown_table(heads, rows):
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def held(run, attack):
    """Array (sentences,): 1 where the model withstood the attack, 0 where it did not, NaN for an error."""
    return np.array([{"1": 1, "?": np.nan}.get(outcome, 0) for outcome in unpack(run["outcomes"][attack])])


def is_clean(run, attack):
    """Array (sentences,): 1 where the model was right without an attack, 0 where it was not, NaN for an error."""
    return np.array([{"-": 0, "?": np.nan}.get(outcome, 1) for outcome in unpack(run["outcomes"][attack])])


def paired(runs, reference, task, attack, score=held):
    """(the seeds that both have, array (2, seeds, sentences) of their scores). score: `held` for Aua%, `is_clean` for
    Clean% of the attacked sentences."""
    ours, theirs = ({run["seed"]: score(run, attack) for run in of if run["task"] == task} for of in (runs, reference))
    seeds = sorted(ours.keys() & theirs.keys())
    return seeds, np.array([[of[seed] for seed in seeds] for of in (ours, theirs)])


def compare_known(both):
    """`compare` of an array (2, seeds, sentences), without sentences with an error. {} without any."""
    both = both[..., ~np.isnan(both).any((0, 1))] if both.size else both
    return compare(*both) if both.size else {}


def difference(runs, reference, task, attack, score=held):
    """`compare` of the runs of two methods. The arguments are those of `paired`."""
    return compare_known(paired(runs, reference, task, attack, score)[1])


def shown(result):
    """ "-1.2 ± 2.3" """
    text = f"{round(result['difference'], 1) + 0:+.1f}" if result else "-"  # + 0: without a minus before 0.0
    return f"{text} ± {result['interval']:.1f}" if "interval" in result else text


def with_p(result):
    """ "-1.2 ± 2.3 (p = 0.250)" """
    if "p" not in result:
        return shown(result)
    p = "p < 0.001" if result["p"] < 0.001 else f"p = {result['p']:.3f}"
    return f"{shown(result)} ({p})"


def differences(task, attack, rows):
    """The differences in Aua% between each row and the reference rows under the same attack, as Markdown."""
    lines = []
    for label, runs in rows.items():
        same_attack = overrides_text({name: of for name, of in runs[0]["overrides"].items() if name == "attack"})
        others = [reference + same_attack for reference in REFERENCES]
        results = [difference(runs, rows.get(other, []), task, attack) if label != other else {} for other in others]
        needed = [result["seeds_needed"] for result in results if "p" in result]
        needed = ("not with these sentences" if None in needed else str(max(needed))) if needed else "-"
        lines.append([label, *map(with_p, results), needed])
    if all(set(line[1:]) == {"-"} for line in lines):
        return ""
    heads = [f"minus {name}" for name in REFERENCES]
    text = f"\nDifferences in Aua% on {task} under {attack}, with their 95 % interval over seeds and sentences, and p. "
    text += f"The last column: roughly how many seeds would show {VISIBLE:g} points with a power of 80 %.\n"
    return text + markdown_table(["", *heads, f"seeds for {VISIBLE:g} points"], lines)
