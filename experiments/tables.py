"""The command of every table: makes the runs that are missing, then writes the table.

RESULTS/TABLE.json has the settings and figures of all runs, RESULTS/TABLE.md their means and standard deviations.
"""

import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import filelock

import data
from attacks.recipes import RECIPES
from checkpoints.provenance import differences, read_result, summary, versions, write_result
from experiments.runs import ATTACK_COLUMNS, METHODS, check_override, code, parse_overrides, run_method
from runtime import cli, files
from runtime.cli import BadInput, option
from runtime.device import DEFAULT_MODEL, MODEL_HELP, describe, pick_device

# options that tell the runs of a method and seed apart, beside --search, --draw and --finetune
SETTINGS = ("model", "train_rows", "epochs", "mask_epochs", "batch_size", "learning_rate", "attacks", "n")


@dataclass
class Options:
    tasks: tuple = option(("sst2",), f"one table per task: {', '.join(data.TASKS)}")
    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    methods: tuple = option((), f"rows, instead of the default ones: {', '.join(METHODS)}")
    attacks: tuple = option(("textfooler",), f"attacks of attack.py: {', '.join(RECIPES)}; none in Table 2")
    seeds: int = option(1, "runs per method, with the seeds from 0", at_least=1)
    train_rows: int = option(None, "train on this many rows, the same for every seed, instead of all", at_least=1)
    epochs: int = option(10, "epochs of fine-tuning", at_least=1)
    mask_epochs: int = option(20, "epochs of RobustT's mask learning", at_least=1)
    batch_size: int = option(32, "rows per step", at_least=1)
    learning_rate: float = option(1e-4, "peak learning rate of fine-tuning", above=0)
    n: int = option(300, "number of attacked test rows", at_least=1)
    search: tuple = option((), "options of search.py as NAME=VALUE, such as learning-rate=2e-4; shown as separate rows")
    draw: tuple = option((), "options of draw.py, such as tau-ffn=0.1; shown as separate rows")
    finetune: tuple = option((), "options of finetune.py, such as adv-max-norm=2; shown as separate rows")
    output: str = option("runs", "folder for the models; other settings than before need another one")
    results: str = option("experiments/results", "folder for the tables")
    overwrite: bool = option(False, "make the runs of other code anew, with what they need, in place of what is there")


def make_table(table, rows, description, attacked=True):
    """The command `python -m experiments.TABLE`. rows: the default --methods. attacked: whether the models are."""
    options = cli.parse(Options, description)
    options.methods = options.methods or rows
    for name, known in (("methods", METHODS), ("tasks", data.TASKS), ("attacks", RECIPES)):
        for value in getattr(options, name):
            if value not in known:
                raise BadInput(f"--{name} {value!r}: give some of {', '.join(known)}")
    options.attacks = [name for name in RECIPES if name in options.attacks and attacked]  # in a fixed order
    settings = run_settings(options)
    path = Path(options.results) / f"{table}.json"
    cells = itertools.product(options.tasks, range(options.seeds), options.methods)
    cells = list(dict.fromkeys(cells))  # a repeated method is one row
    recorded = [run for run in load_runs(path) if run["settings"] == settings]
    current, outdated = code(), {}
    for run in recorded:
        if run["task"] in options.tasks and run["method"] in options.methods:
            outdated |= differences(run.get("code", {}), current)
    if outdated and not options.overwrite:
        raise BadInput(f"{path} has runs of other code ({summary(outdated)}): use --overwrite, or another --results")
    recorded = {(run["task"], run["seed"], run["method"]) for run in recorded if run.get("code") == current}
    missing = [cell for cell in cells if cell not in recorded]
    for task in dict.fromkeys(task for task, _, _ in missing) if options.attacks else ():
        count = len(data.find_task(task).load(None)["test"])
        if options.n > count:
            raise BadInput(f"--n {options.n} is more than the {count:,} test rows of {task}")
    bar = cli.progress(len(cells), len(cells) - len(missing), table, "run")
    for task, seed, method in missing:
        bar.set_postfix_str(f"{method} on {task}, seed {seed}")
        run = {"task": task, "method": method, "seed": seed, "settings": settings}
        run |= run_method(options, task, method, seed)
        save_run(path, run | {"machine": describe(pick_device()), "code": current, "versions": versions()})
        bar.update()
    bar.close()
    text = to_markdown(table, load_runs(path))
    files.write_text(path.with_suffix(".md"), text)
    print(text, end="")


def run_settings(options):
    """{setting: value} of the runs of this command, overrides as {"search learning-rate": "2e-4"}."""
    settings = {name: getattr(options, name) for name in SETTINGS} | {"attacks": " ".join(options.attacks)}
    settings |= {} if options.attacks else {"attacks": None, "n": None}
    for script in ("search", "draw", "finetune"):
        for flag, value in parse_overrides(options, script).items():
            check_override(options.methods, script, flag)
            settings[f"{script} {flag}"] = value
    return settings


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
            if any(other[name] != run[name] for name in ("task", "method", "settings")):
                return True
            return other["seed"] != run["seed"] and other.get("code") == run["code"]

        write_result(path, {"runs": [*filter(stays, load_runs(path)), run]})


def to_markdown(table, runs):
    """All runs as Markdown: one table per task, settings and attack resources."""
    groups = {}
    for run in runs:
        settings = {name: run["settings"][name] for name in SETTINGS}
        key = json.dumps([run["task"], settings, run["resources"]], sort_keys=True)
        groups.setdefault(key, []).append(run)
    text = (
        f"Written by `python -m experiments.{table}` from {table}.json. ± is the standard deviation over the seeds.\n"
    )
    for key, group in groups.items():
        text += "\n" + "\n".join(markdown_lines(*json.loads(key), group)) + "\n"
    return text


def markdown_lines(task, settings, resources, runs):
    """One table, with a row per method and overrides: the means over the seeds, with standard deviations."""
    shown = [f"{name.replace('_', ' ')} {settings[name]}" for name in SETTINGS if settings[name] is not None]
    yield f"{', '.join(shown)}."
    if resources:
        yield from ("", "Resources of the attacks:", "", *(f"- {name}: {text}" for name, text in resources.items()))
    attacks = (settings["attacks"] or "").split()
    # seconds only without attacks, where training cost is the point
    columns = [f"{attack} {column}" for attack in attacks for column in ATTACK_COLUMNS] or ["seconds"]
    columns = ["Clean%", *columns, "GB", "M parameters"]
    yield from ("", f"| {task}, {settings['model']} | runs | {' | '.join(columns)} |")
    yield "|---" + "|---:" * (len(columns) + 1) + "|"
    rows = {}
    for run in runs:
        rows.setdefault((overrides_text(run["settings"]), run["method"]), []).append(run["figures"])
    for overrides, method in sorted(rows, key=lambda row: (row[0], list(METHODS).index(row[1]))):
        figures = rows[overrides, method]
        cells = [mean_and_deviation([run[name] for run in figures if run.get(name) is not None]) for name in columns]
        yield f"| {method}{overrides} | {len(figures)} | {' | '.join(cells)} |"
    if attacks:
        interval = 100 * 1.96 * (0.5 * 0.5 / settings["n"]) ** 0.5  # in points, at a share of 50 %
        note = f"The {settings['n']} attacked rows are a sample: the 95 % confidence interval of a single run is up to "
        note += f"± {interval:.1f} points for Aua%, and slightly wider for Suc%, whatever the seed."
        errors = sum(run["figures"].get(f"{attack} errors", 0) for run in runs for attack in attacks)
        yield from ("", note + f" {errors} attacks ended in an error and are not counted." * bool(errors))


def overrides_text(settings):
    """ ", `--search adv-lr=0.1`" for the overrides among the settings of a run; empty without any."""
    flags = {}
    for name in sorted(settings.keys() - set(SETTINGS)):
        script, flag = name.split(" ")
        flags[script] = flags.get(script, f"--{script}") + f" {flag}={settings[name]}"
    return f", `{' '.join(flags.values())}`" if flags else ""


def mean_and_deviation(numbers):
    if len(numbers) < 2:
        return f"{numbers[0]:,.1f}" if numbers else "-"
    return f"{statistics.mean(numbers):,.1f} ± {statistics.stdev(numbers):,.1f}"
