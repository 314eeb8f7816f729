"""One run of a table: a method on a task with a seed. Calls the scripts, each of which skips what is already done.

Each seed has its own search, ticket and fine-tuning. Runs with other settings go to other folders.
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
from checkpoints.provenance import ROOT, identity, json_sha256, read_result, software
from freelb import ADVERSARIES
from runtime import files
from runtime.cli import BadInput

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
# The scripts whose options a table takes as overrides, with the defaults that differ from the scripts' own: the paper's
# corpus, and one sample of sentences for all methods and seeds
DEFAULTS = {"search": {"corpus": "wikitext-2-raw-v1"}, "draw": {}, "finetune": {}, "robustt": {}}
DEFAULTS |= {"attack": {"sample_seed": "0"}}
RESERVED = ("model", "output", "task", "seed", "seeds", "ticket", "method", "ablation", "coefficients", "n", "attack")
OUTCOMES = {"failed": "1", "succeeded": "0", "skipped": "-", "error": "?"}  # of an attacked sentence


def code():
    """{file: digest} of what makes a run: the scripts and this file."""
    paths = [ROOT / f"{name}.py" for name in ("search", "draw", "finetune", "attack", "baselines/robustt")]
    return software(*paths, __file__)["code"]


def parse_overrides(options):
    """The NAME=VALUE pairs of --search, --draw, --finetune, --robustt and --attack: {script: {option: value}}."""
    overrides = {script: {} for script in DEFAULTS}
    for script, pairs in overrides.items():
        for pair in getattr(options, script):
            name, equals, value = pair.partition("=")
            name = name.replace("-", "_")
            if not equals or name in RESERVED:
                allowed = f"an option of {script}.py except {', '.join(RESERVED)}"
                raise BadInput(f"--{script} {pair!r}: give NAME=VALUE, {allowed}")
            pairs[name] = value
    return overrides


def relevant_overrides(method, overrides):
    """The part of `overrides` that has an effect on the method, without empty dictionaries."""
    ignored = {  # prefixes of the options without effect
        "search": ("",) if method.ticket != "drawn" else ("adv",) if method.search == WITHOUT_ADVERSARY else (),
        "draw": () if method.ticket in ("drawn", "random") else ("",),
        "robustt": () if method.ticket == "robustt" else ("",),
        "finetune": {"vanilla": ("adv_", "alpha", "beta"), "infobert": ()}.get(method.method, ("alpha", "beta")),
        "attack": (),
    }
    ignored["finetune"] += () if method.ticket == "random" else ("ticket_seed",)
    relevant = {
        script: {name: value for name, value in pairs.items() if not name.startswith(ignored[script])}
        for script, pairs in overrides.items()
    }
    return {script: pairs for script, pairs in relevant.items() if pairs}


def overrides_text(overrides):
    """ ", `--search adv-lr=0.1`" for {script: {option: value}}; empty without any."""
    flags = [
        " ".join([f"--{script}", *(f"{name.replace('_', '-')}={value}" for name, value in sorted(pairs.items()))])
        for script, pairs in sorted(overrides.items())
    ]
    return f", `{' '.join(flags)}`" if flags else ""


def run_script(name, /, overwrite=False, **flags):
    """Run search, draw, finetune, attack or baselines.robustt. Its progress and errors are shown, its output is not.

    overwrite: if it fails, it is run again with --overwrite.
    """
    command = [sys.executable, *(["-m", name] if "." in name else [ROOT / f"{name}.py"])]
    for flag, value in flags.items():
        command += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    code = subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode
    if code == 2 and overwrite:
        code = subprocess.run([*command, "--overwrite"], env=env, stdout=subprocess.DEVNULL).returncode
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise BadInput(f"python {' '.join(map(str, command[1:]))} failed with exit code {code}")


def folder_name(*settings):
    """A folder for runs with these settings, dictionaries."""
    words = [f"{name}={value}" for part in settings for name, value in part.items() if value is not None]
    return re.sub(r"[^\w.=-]+", "_", ",".join(words)) or "default"


def run_search(options, model, search):
    """Search, in a folder that all tasks and ratios share. Returns the path of the coefficients, and the seconds."""
    output = Path(options.output, folder_name(search))
    where = {"model": model, "output": output, "device": options.device, "overwrite": options.overwrite}
    run_script("search", **where, **search)
    folder, objective = files.model_folder(output, model), search.get("objective", "mlm")
    suffix = "" if objective == "mlm" else f"-{files.task_folder(objective)}"
    return folder / f"coefficients{suffix}.safetensors", read_result(folder / f"search{suffix}.json")["seconds"]


def run_method(options, run):
    """Carry out a run {"task", "method", "seed", "settings", "overrides"}: search, draw, fine-tune and attack.

    Returns {"figures": {column: number}, "resources": of the attacks, "outcomes": {attack: packed outcomes of all
    sentences}, "hours": in all}.
    """
    start, method, settings = time.time(), METHODS[run["method"]], run["settings"]
    given = {script: run["overrides"].get(script, {}) for script in DEFAULTS}
    if method.ticket == "random":  # it only needs the shapes of a search: not an override of the run
        given["search"] = parse_overrides(options)["search"]
    training = {name: settings[name] for name in ("train_rows", "epochs", "batch_size", "learning_rate")}
    training |= given["finetune"]
    search = DEFAULTS["search"] | given["search"] | method.search | {"seed": run["seed"]}
    search = search if method.ticket in ("drawn", "random") else {}
    output = Path(options.output, folder_name(search, given["draw"], training))
    folder = files.model_folder(output, settings["model"]) / files.task_folder(run["task"])
    where = {"model": settings["model"], "output": output, "task": run["task"], "overwrite": options.overwrite}
    on_device, figures, ticket = where | {"device": options.device}, {}, method.ticket
    if search:
        coefficients, figures["search seconds"] = run_search(options, settings["model"], search)
        run_script("draw", **where, **given["draw"], coefficients=coefficients)
    if ticket == "robustt":
        rows = {name: training[name] for name in ("train_rows", "batch_size")} | {"seed": run["seed"]}
        run_script("finetune", **on_device, **training, seed=run["seed"], ticket="none")
        run_script("baselines.robustt", **on_device | rows | given["robustt"])
        ticket = folder / f"robustt-seed{run['seed']}.safetensors"
    made = {"ticket": ticket, "method": method.method, "ablation": method.ablation, "seed": run["seed"]}
    made["ticket_seed"] = training.pop("ticket_seed", None)
    run_script("finetune", **on_device, **training, **made)
    folder /= files.run_name(SimpleNamespace(**made))
    metrics = read_result(folder / "metrics.json")
    figures |= {"Clean%": 100 * metrics["test_accuracy"], "GB": metrics["peak_memory"] / 1e9}
    figures |= {"M parameters": metrics["parameters"] / 1e6, "learning rate": metrics["settings"]["learning_rate"]}
    figures |= {key: metrics[key] for key in ("seconds", "tokens_per_second")}
    resources, outcomes = {}, {}
    for attack in settings["attacks"].split():
        flags = on_device | made | DEFAULTS["attack"] | given["attack"] | {"attack": attack, "n": settings["n"]}
        path = folder / attack
        if given["attack"]:  # another name, so that both results are kept
            flags["suffix"] = folder_name(given["attack"])
            path = folder / f"{attack}-{flags['suffix']}"
        run_script("attack", **flags)
        if read_result(f"{path}.json")["errors"]:  # for example out of memory: retried once
            run_script("attack", **flags)
        summary = read_result(f"{path}.json")
        rows = read_rows(Path(f"{path}.jsonl"), json_sha256(identity(summary)))
        found = {number: OUTCOMES[row["outcome"]] for number, row in rows.items()}
        found |= dict.fromkeys(map(int, summary["errors"]), OUTCOMES["error"])
        outcomes[attack] = pack("".join(found[number] for number in sorted(found)))
        resources |= summary["resources"]
        figures[f"{attack} errors"] = len(summary["errors"])
        for column, key, unit in (("Aua%", "aua", 100), ("Suc%", "suc", 100), ("#Query", "queries", 1)):
            figures[f"{attack} {column}"] = None if summary[key] is None else unit * summary[key]
    return {"figures": figures, "resources": resources, "outcomes": outcomes, "hours": (time.time() - start) / 3600}


def pack(outcomes):
    """Compress a text for a JSON file. `unpack` is the inverse."""
    return base64.b85encode(zlib.compress(outcomes.encode(), 9)).decode()


def unpack(packed):
    return zlib.decompress(base64.b85decode(packed)).decode()
