"""One run of a table: a method on a task with a seed, made by the scripts, each of which skips what is already done."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from runtime import files
from runtime.cli import BadInput

ROOT = Path(__file__).resolve().parents[1]
METHODS = {  # name in the tables -> (ticket, --method, --ablation); "vanilla": from a search without adversary
    "Vanilla": ("none", "vanilla", None),
    "PGD": ("none", "pgd", None),
    "FreeLB": ("none", "freelb", None),
    "InfoBERT": ("none", "infobert", None),
    "RobustT": ("robustt", "vanilla", None),
    "ORTicket": ("drawn", "vanilla", None),
    "ORTicket + FreeLB": ("drawn", "freelb", None),
    "Vanilla ticket": ("vanilla", "vanilla", None),
    "Vanilla ticket + FreeLB": ("vanilla", "freelb", None),
    "Random ticket": ("random", "vanilla", None),
    "w/o initialization": ("drawn", "vanilla", "no-initialization"),
    "w/o structure": ("drawn", "vanilla", "no-structure"),
}
RESERVED = {  # script -> its options that the tables set
    "search": ("model", "output", "seeds"),
    "draw": ("model", "output", "task", "coefficients"),
    "finetune": (
        *("model", "output", "task", "ticket", "method", "ablation", "seed"),
        *("train-rows", "epochs", "batch-size", "learning-rate", "data-revision"),
    ),
}
ATTACK_COLUMNS = {"Aua%": ("aua", 100), "Suc%": ("suc", 100), "#Query": ("queries", 1)}  # column -> (key, unit)


def parse_overrides(options, script):
    """The NAME=VALUE pairs of --search, --draw or --finetune: {option of the script: value}."""
    overrides = {}
    for pair in getattr(options, script):
        flag, equals, value = pair.partition("=")
        flag = flag.replace("_", "-")
        if not equals or flag in RESERVED[script]:
            allowed = f"options of {script}.py except {', '.join(RESERVED[script])}"
            raise BadInput(f"--{script} {pair!r}: give NAME=VALUE, {allowed}")
        overrides[flag] = value
    return overrides


def check_override(methods, script, flag):
    """Raises BadInput if the option `flag` of `script` has no effect on one of the methods."""
    for name in methods:
        ticket, training, _ = METHODS[name]
        if script == "search":
            has_effect = ticket in (("drawn",) if flag.startswith("adv-") else ("drawn", "vanilla"))
        elif script == "draw":
            has_effect = ticket in ("drawn", "vanilla", "random")
        elif flag in ("alpha", "beta"):
            has_effect = training == "infobert"
        else:
            has_effect = training != "vanilla" or not flag.startswith("adv-")
        if not has_effect:
            raise BadInput(f"--{script} {flag} has no effect on {name}: give --methods without it")


def run_script(name, /, **flags):
    """Run search, draw, finetune, attack or baselines.robustt. Its progress and errors are shown, its output is not."""
    arguments = []
    for flag, value in flags.items():
        arguments += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    program = ["-m", name] if "." in name else [ROOT / f"{name}.py"]
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = subprocess.run([sys.executable, *program, *arguments], env=env, stdout=subprocess.DEVNULL).returncode
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise BadInput(f"python {' '.join(map(str, [*program, *arguments]))} failed with exit code {code}")


def run_method(options, task, name, seed):
    """Make the ticket, fine-tune and attack: the "figures" of the run and the "resources" of its attacks."""
    ticket, training, ablation = METHODS[name]
    output = Path(options.output, "vanilla-search") if ticket == "vanilla" else Path(options.output)
    where = {"model": options.model, "output": output}
    rows = {"task": task, "seed": seed, "train_rows": options.train_rows, "batch_size": options.batch_size}
    trained = rows | {"epochs": options.epochs, "learning_rate": options.learning_rate}
    trained |= parse_overrides(options, "finetune")
    folder = files.model_folder(output, options.model) / files.task_folder(task)
    if ticket == "robustt":
        run_script("finetune", **where, **trained, ticket="none")
        run_script("baselines.robustt", **where, **rows, epochs=options.mask_epochs)
        ticket = folder / f"robustt-seed{seed}.safetensors"
    elif ticket != "none":
        draw_ticket(options, where, task, ticket)
        ticket = "random" if ticket == "random" else "drawn"
    run = {"ticket": ticket, "method": training, "ablation": ablation, "seed": seed}
    run_script("finetune", **where, **trained | run)
    folder /= files.run_name(SimpleNamespace(**run))
    metrics = files.read_json(folder / "metrics.json")
    figures, resources = {"Clean%": 100 * metrics["test_accuracy"]}, {}
    for attack in options.attacks:
        for _ in range(2):  # examples that ended in an error, such as out of memory, are tried once more
            run_script("attack", **where, **run, task=task, n=options.n, attack=attack)
            summary = files.read_json(folder / f"{attack}.json")
            if not summary["errors"]:
                break
        else:
            figures[f"{attack} errors"] = len(summary["errors"])
        resources |= summary["resources"]
        for column, (key, unit) in ATTACK_COLUMNS.items():
            figures[f"{attack} {column}"] = None if summary[key] is None else unit * summary[key]
    figures |= {"GB": metrics["peak_memory"] / 1e9, "M parameters": metrics["parameters"] / 1e6}
    figures |= {key: metrics[key] for key in ("seconds", "tokens_per_second")}
    return {"figures": figures, "resources": resources}


def draw_ticket(options, where, task, ticket):
    """Search and draw; of the vanilla ticket the search has no adversary."""
    search = parse_overrides(options, "search") | ({"adv-steps": 1, "adv-init-mag": 0} if ticket == "vanilla" else {})
    run_script("search", **where, **search)
    objective = search.get("objective", "mlm")
    suffix = "" if objective == "mlm" else f"-{files.task_folder(objective)}"
    coefficients = files.model_folder(where["output"], options.model) / f"coefficients{suffix}.safetensors"
    run_script("draw", **where, task=task, coefficients=coefficients, **parse_overrides(options, "draw"))
