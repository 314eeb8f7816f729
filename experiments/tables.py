"""The paper's tables, each made by one command out of the scripts. Killed and typed again, it goes on.

    python paper.py table1 --tasks sst2 --model minilm --train-rows 20000 --epochs 3 --mask-epochs 2
    python paper.py table1 ... --methods Vanilla FreeLB --seeds 3        more seeds of some, in the same table
    python paper.py table1 ... --methods ORTicket --search learning-rate=2e-4 --output runs-2e-4      another search
    python paper.py table1 ... --methods FreeLB --finetune adv-max-norm=0.4 --output runs-0.4   another adversary
    python paper.py table3 --tasks imdb agnews qqp       with and without an adversary, in the search and after it
    python paper.py table1 ... --methods ORTicket --search objective=sst2 --output runs-sst2             a row of Table 4
    python paper.py table1 --model roberta-base --methods Vanilla FreeLB ORTicket                     Table 5

The tables compare methods on clean and attacked test rows, Table 2 what their training takes. Each cell is a run of
finetune.py and one of attack.py with the same rows, epochs and batch. RESULTS/TABLE.json keeps what each run found and
with which settings; a run that is there is not repeated. RESULTS/TABLE.md shows all of them, means over the seeds with
standard deviations. Models go below OUTPUT, where the tables share them; other settings need another OUTPUT. No number
is typed by hand.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import filelock

import data
from attack import sample
from attacks.recipes import RECIPES
from checkpoints.provenance import versions
from runtime import cli, files
from runtime.cli import BadInput, option
from runtime.device import DEFAULT_MODEL, MODEL_HELP, describe, pick_device

# name in the table -> (--ticket, --method, --ablation) of finetune.py and attack.py
METHODS = {
    "Vanilla": ("none", "vanilla", None),
    "PGD": ("none", "pgd", None),
    "FreeLB": ("none", "freelb", None),
    "InfoBERT": ("none", "infobert", None),
    "RobustT": ("robustt", "vanilla", None),
    "ORTicket": ("drawn", "vanilla", None),
    "ORTicket + FreeLB": ("drawn", "freelb", None),
    "Vanilla ticket": ("of a search without adversary", "vanilla", None),
    "Vanilla ticket + FreeLB": ("of a search without adversary", "freelb", None),
    "Random ticket": ("random", "vanilla", None),
    "w/o initialization": ("drawn", "vanilla", "no-initialization"),
    "w/o structure": ("drawn", "vanilla", "no-structure"),
}
ROWS = {  # of the paper's tables; Table 1 also has two rows of Table 3, and chance
    "table1": (
        *("Vanilla", "PGD", "FreeLB", "InfoBERT", "RobustT"),
        *("ORTicket", "ORTicket + FreeLB", "Vanilla ticket", "Random ticket"),
    ),
    "table2": ("FreeLB", "Vanilla", "ORTicket"),
    "table3": ("Vanilla ticket", "Vanilla ticket + FreeLB", "ORTicket", "ORTicket + FreeLB"),
    "table6": ("ORTicket", "w/o initialization", "w/o structure"),
}

ATTACKED = {"Aua%": ("aua", 100), "Suc%": ("suc", 100), "#Query": ("queries", 1)}  # column -> attack.py's name, unit
# what tells one run of a method and seed from another
SETTINGS = ("model", "train_rows", "epochs", "mask_epochs", "batch_size", "learning_rate", "attacks", "n")
OWN = {  # flags that --search, --draw and --finetune may not set
    "search": ("model", "output", "seeds"),
    "draw": ("model", "output", "task", "coefficients"),
    "finetune": (
        *("model", "output", "task", "ticket", "method", "ablation", "seed"),
        *("train-rows", "epochs", "batch-size", "learning-rate", "data-revision"),
    ),
}


@dataclass
class Options:
    table: str = option("table1", "which", choices=tuple(ROWS), positional=True)
    tasks: tuple = option(("sst2",), "a table for each")
    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    methods: tuple = option((), f"rows, instead of the paper's for the table: {', '.join(METHODS)}")
    attacks: tuple = option(("textfooler",), "of attack.py; Table 2 has none")
    seeds: int = option(1, "runs of each method, from seed 0 on", at_least=1)
    train_rows: int = option(None, "train on so many rows, always the same", at_least=1)
    epochs: int = option(10, "of every fine-tuning", at_least=1)
    mask_epochs: int = option(20, "of RobustT's search for masks", at_least=1)
    batch_size: int = option(32, "rows a step", at_least=1)
    learning_rate: float = option(1e-4, "of every fine-tuning", above=0)
    n: int = option(300, "test rows that are attacked", at_least=1)
    output: str = option("runs", "folder for the runs")
    search: tuple = option((), "options of search.py, such as learning-rate=2e-4, in rows of their own")
    draw: tuple = option((), "options of draw.py, such as tau-ffn=0.1, in rows of their own")
    finetune: tuple = option((), "options of every fine-tuning, such as adv-max-norm=2, in rows of their own")
    results: str = option("results", "folder for the tables")


def main():
    options = cli.parse(Options, __doc__)
    options.methods = options.methods or ROWS[options.table]
    options.attacks = () if options.table == "table2" else options.attacks
    for name, known in (("methods", METHODS), ("tasks", data.TASKS), ("attacks", RECIPES)):
        for value in getattr(options, name):
            if value not in known:
                raise BadInput(f"--{name} {value!r}: give some of {', '.join(known)}")
    options.attacks = [name for name in RECIPES if name in options.attacks]  # in whatever order they were named
    settings = {name: getattr(options, name) for name in SETTINGS} | {"attacks": " ".join(options.attacks)}
    settings |= {} if options.attacks else {"attacks": None, "n": None}
    for name in ("search", "draw", "finetune"):
        for flag, value in given(options, name).items():
            reach(options.methods, name, flag)
            settings[f"{name} {flag}"] = value
    path = Path(options.results) / f"{options.table}.json"
    there = {(run["task"], run["method"], run["seed"]) for run in recorded(path) if run["settings"] == settings}
    cells = [(task, name, seed) for task in options.tasks for seed in range(options.seeds) for name in options.methods]
    cells = list(dict.fromkeys(cells))  # a method named twice is one row
    missing = [cell for cell in cells if cell not in there]
    for task in {task: None for task, _, _ in missing} if options.attacks else ():
        sample(SimpleNamespace(n=options.n, task=task, seed=0), len(data.find_task(task).load(None)["test"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = cli.progress(len(cells), len(cells) - len(missing), options.table, "run")
    for task, name, seed in missing:
        bar.set_postfix_str(f"{name} on {task}, seed {seed}")
        cell = {"task": task, "method": name, "seed": seed, "settings": settings} | run(options, task, name, seed)
        cell |= {"machine": describe(pick_device()), "versions": versions()}
        with filelock.FileLock(path.with_suffix(".lock")):  # another command may have added runs, this one as well
            what = ("task", "method", "seed", "settings")
            others = [of for of in recorded(path) if any(of[key] != cell[key] for key in what)]
            files.write_json(path, {"runs": [*others, cell]})
        bar.update()
    bar.close()
    text = written(recorded(path))
    with files.atomic_write(path.with_suffix(".md")) as tmp_path:
        Path(tmp_path).write_text(text, "utf8")
    print(text, end="")


def recorded(path):
    """The runs that a table's .json keeps."""
    return files.read_json(path)["runs"] if path.is_file() else []


def given(options, name):
    """The flags of --search, --draw or --finetune with their values."""
    flags = {}
    for part in getattr(options, name):
        flag, equals, value = part.partition("=")
        flag = flag.replace("_", "-")
        if not equals or flag in OWN[name]:
            raise BadInput(
                f"--{name} {part!r}: give options of {name}.py as NAME=VALUE; {', '.join(OWN[name])} are paper.py's own"
            )
        flags[flag] = value
    return flags


def reach(methods, name, flag):
    """Raises BadInput where the option `flag` of the script `name` changes nothing of one of these methods."""
    for method in methods:
        ticket, training, _ = METHODS[method]
        kinds = {"drawn", "random", "of a search without adversary"}
        if name == "search":
            kinds = {"drawn"} if flag.startswith("adv-") else kinds - {"random"}
        reaches = ticket in kinds
        if name == "finetune" and flag in ("alpha", "beta"):
            reaches = training == "infobert"
        elif name == "finetune":
            reaches = training != "vanilla" or not flag.startswith("adv-")
        if not reaches:
            raise BadInput(f"--{name} {flag} changes nothing of {method}: name with --methods those that it is for")


def script(name, /, **flags):
    """Run a script of ours; its bars and errors are shown, what it prints is not."""
    line = []
    for flag, value in flags.items():
        line += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    path = Path(__file__).resolve().parents[1] / name
    code = subprocess.run([sys.executable, path, *line], stdout=subprocess.DEVNULL).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise BadInput(f"{name} {' '.join(line)} failed with exit code {code}")


def run(options, task, name, seed):
    """Make what the method needs, fine-tune, attack; the "figures" of the run and the "resources" of its attacks."""
    ticket, method, ablation = METHODS[name]
    where = {"model": options.model, "output": options.output}
    searched = given(options, "search")
    rows = {"task": task, "seed": seed, "train_rows": options.train_rows, "batch_size": options.batch_size}
    trained = rows | {"epochs": options.epochs, "learning_rate": options.learning_rate} | given(options, "finetune")
    if ticket == "of a search without adversary":
        ticket, where["output"] = "drawn", str(Path(options.output) / "vanilla-search")
        script("search.py", **where, **searched | {"adv-steps": 1, "adv-init-mag": 0})
    elif ticket in ("drawn", "random"):
        script("search.py", **where, **searched)
    folder = files.model_folder(where["output"], options.model)
    if ticket in ("drawn", "random"):
        source = searched.get("objective", "mlm")
        of_source = "" if source == "mlm" else f"-{files.task_folder(source)}"
        coefficients = folder / f"coefficients{of_source}.safetensors"
        script("draw.py", **where, task=task, coefficients=coefficients, **given(options, "draw"))
    folder /= files.task_folder(task)
    if ticket == "robustt":
        script("finetune.py", **where, **trained, ticket="none")
        script("robustt.py", **where, **rows, epochs=options.mask_epochs)
        ticket = str(folder / f"robustt-seed{seed}.safetensors")
    made = {"ticket": ticket, "method": method, "ablation": ablation, "seed": seed}
    script("finetune.py", **where, **trained | made)
    folder /= files.run_name(SimpleNamespace(**made))
    metrics, resources = files.read_json(folder / "metrics.json"), {}
    figures = {"Clean%": 100 * metrics["test_accuracy"]}
    for attack in options.attacks:
        for _ in range(2):  # what ended in an error once, as for want of memory, need not a second time
            script("attack.py", **where, task=task, n=options.n, **made, attack=attack)
            attacked = files.read_json(folder / f"{attack}.json")
            if not attacked["errors"]:
                break
        if attacked["errors"]:
            figures[f"{attack} errors"] = len(attacked["errors"])
        resources |= attacked["resources"]
        for column, (name, unit) in ATTACKED.items():
            figures[f"{attack} {column}"] = None if attacked[name] is None else unit * attacked[name]
    figures |= {"GB": metrics["peak_memory"] / 1e9, "M parameters": metrics["parameters"] / 1e6}
    figures |= {name: metrics[name] for name in ("seconds", "tokens_per_second")}
    return {"figures": figures, "resources": resources}


def written(runs):
    """All runs as Markdown: a table for each task, size of the runs and resources of the attacks, in it a row for each
    method and options of the scripts, the mean of its seeds and, where there are several, the standard deviation."""
    tables = {}
    for cell in runs:
        settings = {name: cell["settings"][name] for name in SETTINGS}
        key = json.dumps([cell["task"], settings, cell["resources"]], sort_keys=True)
        row = method_and_flags(cell)
        tables.setdefault(key, {}).setdefault(row, []).append(cell["figures"])
    lines = ["Made by paper.py out of the runs in the .json beside it. ± is the standard deviation over the seeds."]
    for key, rows in tables.items():
        task, settings, resources = json.loads(key)
        shown = [f"{name.replace('_', ' ')} {settings[name]}" for name in SETTINGS if settings[name] is not None]
        lines += ["", f"{', '.join(shown)}."]
        lines += ["", "The attacks' resources:", ""] if resources else []
        lines += [f"- {name}: {what}" for name, what in resources.items()]
        attacks = (settings["attacks"] or "").split()
        columns = [f"{attack} {column}" for attack in attacks for column in ATTACKED]
        # seconds only where they are the point: the machine may have had other work
        columns = ["Clean%", *(columns or ["seconds"]), "GB", "M parameters"]
        head = " | ".join([f"{task}, {settings['model']}", "runs", *columns])
        lines += ["", f"| {head} |"]
        lines.append("|---" + "|---:" * (len(columns) + 1) + "|")
        for method, flags in sorted(rows, key=lambda row: (row[1], list(METHODS).index(row[0]))):
            found = rows[method, flags]
            numbers = [[run[column] for run in found if run.get(column) is not None] for column in columns]
            lines.append(f"| {' | '.join([method + flags, str(len(found)), *map(mean_and_deviation, numbers)])} |")
        if attacks:
            widest = 100 * 1.96 * (0.5 * 0.5 / settings["n"]) ** 0.5  # in points, where the share is 50 %
            lines += ["", f"The {settings['n']} attacked rows are a sample: a single run's Aua% is uncertain by up to"]
            lines[-1] += f" ± {widest:.1f} points (95 % interval), Suc% by a little more, whatever the seed does."
            ended = [run[key] for runs in rows.values() for run in runs for key in run if key.endswith(" errors")]
            lines[-1] += f" {sum(ended)} attacks ended in an error and count in no figure." * bool(ended)
    return "\n".join([*lines, ""])


def method_and_flags(cell):
    """("ORTicket", ", `--search adv-lr=0.1`") of a run: its method, and the options of the scripts that are not theirs
    by default."""
    flags = {}
    for name, value in sorted(cell["settings"].items()):
        if name not in SETTINGS:
            script, flag = name.split(" ")
            flags.setdefault(script, f"--{script}")
            flags[script] += f" {flag}={value}"
    return cell["method"], f", `{' '.join(flags.values())}`" if flags else ""


def mean_and_deviation(numbers):
    if len(numbers) < 2:
        return f"{numbers[0]:,.1f}" if numbers else "-"
    return f"{statistics.mean(numbers):,.1f} ± {statistics.stdev(numbers):,.1f}"


if __name__ == "__main__":
    cli.run(main)
