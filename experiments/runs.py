"""One run of a table: a method on a task with a seed, made by the scripts, each of which skips what is already done.

A seed is a whole run: a search of its own, a ticket, a fine-tuning. Runs with other settings go to other folders.
"""

import base64
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from attacks.results import read_rows
from checkpoints.provenance import identity, json_sha256, read_result, software
from freelb import ADVERSARIES
from runtime import files
from runtime.cli import BadInput

ROOT = Path(__file__).resolve().parents[1]
PAPER_TASKS = ("sst2", "qnli", "qqp", "imdb", "agnews")


@dataclass(frozen=True)
class Method:
    """A row of a table: the ticket (none, drawn, random, robustt), how it is fine-tuned, and its search's options."""

    ticket: str = "none"
    method: str = "vanilla"
    ablation: str | None = None
    search: dict = field(default_factory=dict)


WITHOUT_ADVERSARY = {"adv_steps": 1, "adv_init_mag": 0}
METHODS = {
    "Vanilla": Method(),
    "PGD": Method(method="pgd"),
    "FreeLB": Method(method="freelb"),
    "InfoBERT": Method(method="infobert"),
    "RobustT": Method("robustt"),
    "ORTicket": Method("drawn"),
    "ORTicket + FreeLB": Method("drawn", "freelb"),
    "Vanilla ticket": Method("drawn", search=WITHOUT_ADVERSARY),
    "Vanilla ticket + FreeLB": Method("drawn", "freelb", search=WITHOUT_ADVERSARY),
    "Random ticket": Method("random"),
    "w/o initialization": Method("drawn", ablation="no-initialization"),
    "w/o structure": Method("drawn", ablation="no-structure"),
    **{name: Method(method=name) for name in ADVERSARIES if "-" in name},  # PGD and FreeLB with others' numbers
    **{f"ORTicket from {task}": Method("drawn", search={"objective": task}) for task in PAPER_TASKS},
}
# The scripts whose options a table takes as overrides. Their defaults here, where they are not the scripts' own: the
# paper's corpus, and one sample of sentences for all methods and seeds
DEFAULTS = {"search": {"corpus": "wikitext-2-raw-v1"}, "draw": {}, "finetune": {}, "robustt": {}}
DEFAULTS |= {"attack": {"sample_seed": "0"}}
RESERVED = ("model", "output", "task", "seed", "seeds", "ticket", "method", "ablation", "coefficients", "n", "attack")
OUTCOMES = {"failed": "1", "succeeded": "0", "skipped": "-", "error": "?"}  # of an attacked sentence; 1: it held


def code():
    """{file: digest} of what makes a run: the scripts and this file."""
    paths = [ROOT / f"{name}.py" for name in ("search", "draw", "finetune", "attack", "baselines/robustt")]
    return {name: digest for path in (*paths, __file__) for name, digest in software(path)["code"].items()}


def parse_overrides(options):
    """The NAME=VALUE pairs of --search, --draw, --finetune, --robustt and --attack: {script: {option: value}}."""
    overrides = {}
    for script in DEFAULTS:
        overrides[script] = {}
        for pair in getattr(options, script):
            name, equals, value = pair.partition("=")
            name = name.replace("-", "_")
            if not equals or name in RESERVED:
                allowed = f"an option of {script}.py except {', '.join(RESERVED)}"
                raise BadInput(f"--{script} {pair!r}: give NAME=VALUE, {allowed}")
            overrides[script][name] = value
    return overrides


def relevant_overrides(name, overrides):
    """The part of `overrides` that has an effect on the method `name`, without empty dictionaries."""
    method, relevant = METHODS[name], {script: dict(pairs) for script, pairs in overrides.items()}
    if method.ticket != "drawn":
        relevant["search"] = {}
    if method.ticket not in ("drawn", "random"):
        relevant["draw"] = {}
    if method.ticket != "robustt":
        relevant["robustt"] = {}
    for script, ignored in (
        ("search", ("adv",) if method.search == WITHOUT_ADVERSARY else ()),
        ("finetune", ("adv_", "alpha", "beta") if method.method == "vanilla" else ()),
        ("finetune", ("alpha", "beta") if method.method != "infobert" else ()),
    ):
        relevant[script] = {key: value for key, value in relevant[script].items() if not key.startswith(ignored or "*")}
    return {script: pairs for script, pairs in relevant.items() if pairs}


def run_script(name, /, **flags):
    """Run search, draw, finetune, attack or baselines.robustt. Its progress and errors are shown, its output is not.

    overwrite, among the flags: if it fails, it is run again with --overwrite.
    """
    arguments, overwrite = [], flags.pop("overwrite", None)
    for flag, value in flags.items():
        arguments += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    program = ["-m", name] if "." in name else [ROOT / f"{name}.py"]
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for more in ([], ["--overwrite"]) if overwrite else ([],):
        command = [sys.executable, *program, *arguments, *more]
        code = subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode
        if code != 2:
            break
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise BadInput(f"python {' '.join(map(str, [*program, *arguments]))} failed with exit code {code}")


def folder_name(*settings):
    """A folder for runs with these settings, dictionaries."""
    words = [f"{name}={value}" for part in settings for name, value in part.items() if value is not None]
    return re.sub(r"[^\w.=-]+", "_", ",".join(words)) or "default"


def run_method(options, task, name, seed, overrides):
    """Make the ticket, fine-tune and attack. overrides: the relevant ones.

    Returns {"figures": {column: number}, "resources": of the attacks, "outcomes": {attack: of each sentence, packed},
    "hours": of all of it}.
    """
    method, given, start = METHODS[name], {script: overrides.get(script, {}) for script in DEFAULTS}, time.time()
    trained = {key: getattr(options, key) for key in ("train_rows", "epochs", "batch_size", "learning_rate")}
    trained |= given["finetune"]
    search, figures = {}, {}
    if method.ticket in ("drawn", "random"):
        search = DEFAULTS["search"] | given["search"] | method.search | {"seed": seed}
    output = Path(options.output, folder_name(search, given["draw"], trained))
    drawn = {"model": options.model, "output": output, "task": task, "overwrite": options.overwrite or None}
    where = {name: value for name, value in drawn.items() if name != "task"} | {"device": options.device}
    ticket = method.ticket
    folder = files.model_folder(output, options.model) / files.task_folder(task)
    if search:
        figures["search seconds"] = draw_ticket(options, search, drawn, given["draw"])
    if ticket == "robustt":
        rows = {"task": task, "seed": seed, "train_rows": trained["train_rows"], "batch_size": trained["batch_size"]}
        run_script("finetune", **where, **trained, task=task, seed=seed, ticket="none")
        run_script("baselines.robustt", **where, **rows, **given["robustt"])
        ticket = folder / f"robustt-seed{seed}.safetensors"
    run = {"ticket": ticket, "method": method.method, "ablation": method.ablation, "seed": seed}
    run["ticket_seed"] = trained.pop("ticket_seed", None)
    run_script("finetune", **where, **trained, **run, task=task)
    folder /= files.run_name(SimpleNamespace(**run))
    metrics = read_result(folder / "metrics.json")
    figures |= {"Clean%": 100 * metrics["test_accuracy"], "GB": metrics["peak_memory"] / 1e9}
    figures |= {"M parameters": metrics["parameters"] / 1e6, "learning rate": metrics["settings"]["learning_rate"]}
    figures |= {key: metrics[key] for key in ("seconds", "tokens_per_second")}
    resources, outcomes = {}, {}
    for attack in options.attacks:
        attacked = {"task": task, "attack": attack, "n": options.n[task]}
        if given["attack"]:  # another name, so that the results of both remain
            attacked["suffix"] = folder_name(given["attack"])
        summary, outcomes[attack] = run_attack(where | run | DEFAULTS["attack"] | given["attack"] | attacked, folder)
        resources |= summary["resources"]
        figures[f"{attack} errors"] = len(summary["errors"])
        for column, key, unit in (("Aua%", "aua", 100), ("Suc%", "suc", 100), ("#Query", "queries", 1)):
            figures[f"{attack} {column}"] = None if summary[key] is None else unit * summary[key]
    hours = (time.time() - start) / 3600
    return {"figures": figures, "resources": resources, "outcomes": outcomes, "hours": hours}


def draw_ticket(options, search, drawn, overrides):
    """Search, in a folder that all tasks and ratios share, and draw. Returns the seconds of the search."""
    output = Path(options.output, folder_name(search))
    where = {"model": options.model, "output": output, "overwrite": drawn["overwrite"], "device": options.device}
    run_script("search", **where, **search)
    folder, objective = files.model_folder(output, options.model), search.get("objective", "mlm")
    suffix = "" if objective == "mlm" else f"-{files.task_folder(objective)}"
    run_script("draw", **drawn, **overrides, coefficients=folder / f"coefficients{suffix}.safetensors")
    return read_result(folder / f"search{suffix}.json")["seconds"]


def run_attack(flags, folder):
    """(the summary of an attack, the outcome of each sentence). What ends in an error is tried once more."""
    stem = "-".join(filter(None, (flags["attack"], flags.get("suffix"))))
    for _ in range(2):  # an error may be one of memory
        run_script("attack", **flags)
        summary = read_result(folder / f"{stem}.json")
        if not summary["errors"]:
            break
    found = read_rows(folder / f"{stem}.jsonl", json_sha256(identity(summary)))
    rows = {number: OUTCOMES[row["outcome"]] for number, row in found.items()}
    rows |= dict.fromkeys(map(int, summary["errors"]), OUTCOMES["error"])
    return summary, pack("".join(rows[number] for number in sorted(rows)))


def pack(outcomes):
    """Text -> fewer characters, for a JSON file. `unpack` is the inverse."""
    return base64.b85encode(zlib.compress(outcomes.encode(), 9)).decode()


def unpack(packed):
    return zlib.decompress(base64.b85decode(packed)).decode()
