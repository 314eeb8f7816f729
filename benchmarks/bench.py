"""Speed compared with Hugging Face transformers and TextAttack, on the same work in the same run.

    python -m benchmarks.bench search                  one FreeLB step on masked language modelling
    python -m benchmarks.bench finetune --task sst2    fine-tuning and classifying, with the full model and a ticket
    python -m benchmarks.bench finetune --profile      what takes the time of fine-tuning
    python -m benchmarks.bench attack                  TextFooler on the full MiniLM that finetune.py trained
    python -m benchmarks.bench attack --attack bertattack --n 4 --rounds 1
    python -m benchmarks.bench scale                   how the cost grows with the work
    python -m benchmarks.bench cost                    the paper's experiments on other machines, computed

Every measurement runs in a separate process, and the sides take turns. The first steps of each process are a warm-up
and not counted. Both sides have the same allocator settings and threads, start from the same weights and see the same
examples. Their losses (without dropout) or adversarial texts are compared, so that a fast wrong answer
cannot win. --save keeps the figures in benchmarks/results and puts the table into docs/speed.md.
"""

import functools
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

import attack
import data
from attacks import recipes
from attacks.library import import_textattack
from benchmarks import cost, libraries, report, scale, training
from bert import Bert
from checkpoints.provenance import versions
from inputs.tokenizer import Tokenizer
from runtime import cli
from runtime.cli import BadInput, option
from runtime.cpu import tune_allocator
from runtime.device import describe_machine, pick_device, pick_precision

SIDES = {
    "search": ("orticket", "transformers, SDPA", "transformers, eager", "transformers, SDPA, compiled"),
    "finetune": (
        *("orticket", "its ticket", "with FreeLB", "orticket, compiled", "transformers, SDPA"),
        *("transformers, SDPA, by length", "transformers, eager, by length", "transformers, SDPA, by length, compiled"),
    ),
}
ONLY_FIRST = ("its ticket", "with FreeLB", "orticket, compiled")  # measured in the first precision only
PARTS = ("the model", "the sentence encoder")  # of the time of an attack


@dataclass
class Options:
    what: str = option("search", "benchmark", choices=(*SIDES, "attack", "scale", "cost"), positional=True)
    batch_size: int = option(32, "examples per step", at_least=1)
    block: int = option(128, "search: tokens per example", at_least=8)
    adv_steps: int = option(3, "search: K, FreeLB's ascent steps", at_least=1)
    steps: int = option(3, "search: counted steps per process", at_least=1)
    rows: int = option(640, "finetune: training rows", at_least=1)
    task: str = option("rt", "finetune, attack: the task; attack needs the model of finetune.py --ticket none")
    compile: bool = option(False, "search, finetune: also torch.compile, which takes minutes")
    profile: bool = option(False, "search, finetune: profile orticket instead")
    attack: str = option("textfooler", "attack: the recipe", choices=tuple(recipes.RECIPES))
    n: int = option(20, "attack: attacked test rows", at_least=1)
    vectors: str = option(None, "attack: word vectors, same as in attack.py")
    megabytes: int = option(1000, "scale: size of the largest corpus", at_least=1)
    rounds: int = option(3, "processes per side", at_least=1)
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: CUDA, then MPS, then CPU")
    output: str = option("runs", "attack: folder of finetune.py")
    save: bool = option(False, "write the figures to benchmarks/results, and the table into docs/speed.md")
    worker: str = option(None, "internal: SIDE;CASE;FOLDER, one process of one side")


def main():
    options = cli.parse(Options, __doc__)
    if options.worker:
        worker = time_attack if options.what == "attack" else training.time_training
        return print(json.dumps(worker(options, *options.worker.split(";"))))
    device = pick_device(options.device)
    if options.profile and options.what not in SIDES:
        raise BadInput(f"--profile is for {' and '.join(SIDES)}, not {options.what}")
    if options.profile and device.type == "mps":
        raise BadInput("--profile cannot see the time of kernels on mps: use --device cpu")
    os.environ["TA_DEVICE"] = str(device)  # TextAttack's, for its models; it is imported later
    benchmark = {"attack": bench_attack, "scale": scale.bench, "cost": cost.bench}.get(options.what, bench_training)
    with tempfile.TemporaryDirectory() as folder:
        name, figures, lines = benchmark(options, Path(folder))
    command, machine = f"python -m benchmarks.bench {shlex.join(sys.argv[1:])}", describe_machine(device)
    lines = [f"`{command}`:" if options.what == "cost" else f"`{command}`, {machine}:", *lines]
    report.publish(name, {"command": command, "machine": machine, "versions": versions()}, figures, lines, options.save)


def run_workers(options, cases, folder):
    """{case: [figures of each of its processes]}. Every round starts one process per case. A compiled side has one in
    all, and is left out with a message if it fails."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"  # nothing is compiled beforehand
    turns = [case for number in range(options.rounds) for case in cases if number == 0 or "compiled" not in case[0]]
    found, command = {case: [] for case in cases}, [sys.executable, "-m", "benchmarks.bench", *sys.argv[1:]]
    with cli.progress(len(turns), description="processes") as bar:
        for case in turns:
            worker = ["--worker", ";".join((*case, str(folder)))]
            try:
                output = report.run_process([*command, *worker], " in ".join(case))
                found[case].append(json.loads(output.splitlines()[-1]))
            except BadInput as error:
                if "compiled" not in case[0]:
                    raise
                print(f"left out: {error}", file=sys.stderr)  # there may be no C++ compiler
                del found[case]
            bar.update()
    return found


def processes(options):
    """How many processes a side had, in words."""
    return f"Medians of {options.rounds} processes per side" if options.rounds > 1 else "One process per side"


def medians(results):
    """[{figure: value} of a process] -> {figure: median}."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def check_agreement(values, tolerance):
    """Raises BadInput if the sides did not do the same work."""
    if not all(abs(value - other) <= tolerance for value in values for other in values):  # also for NaN
        raise BadInput(f"the sides have {', '.join(map(str, values))}: they do not do the same work")


def best_ratios(figures, name):
    """The seconds figures[side, precision][name] of the fastest baseline, divided by orticket's, in each precision and
    overall: a line."""
    parts = []
    for precision in (*dict.fromkeys(precision for _, precision in figures), None):
        chosen = {case: row[name] for case, row in figures.items() if precision in (None, case[1])}
        ours = min(seconds for (side, _), seconds in chosen.items() if side == "orticket")
        theirs = {case: seconds for case, seconds in chosen.items() if libraries.is_baseline(case[0])}
        best = min(theirs, key=theirs.get)
        parts.append(f"{theirs[best] / ours:.2f} {f'in {precision}' if precision else 'overall'} ({best[0]})")
    return ", ".join(parts)


def bench_training(options, folder):
    device, is_search = pick_device(options.device), options.what == "search"
    precisions = ["fp32"] if pick_precision(device, "auto") == torch.float32 else ["bf16", "fp32"]
    sides = [side for side in SIDES[options.what] if options.compile or "compiled" not in side]
    cases = [(side, of) for of in precisions for side in sides if of == precisions[0] or side not in ONLY_FIRST]
    labels = () if is_search else data.find_task(options.task).labels
    torch.manual_seed(0)
    source = data.find_model("minilm")[0]
    Bert.load(source, mlm=is_search, num_labels=len(labels) or None).save(folder, labels, {})
    Tokenizer(source).save(folder)
    if is_search:
        work = f"one FreeLB step, K = {options.adv_steps}, {options.batch_size} x {options.block} tokens, MiniLM."
    else:
        work = f"{options.rows} rows of {options.task} in batches of {options.batch_size}, and the test rows, MiniLM."
    if options.profile:
        return profile_table(options, run_workers(options, cases[:1], folder)[cases[0]], f"{precisions[0]}, {work}")
    columns = {"seconds": "{seconds:.2f}", "range": "{low:.2f}-{high:.2f}", "ratio": "{ratio:.2f}"}
    columns |= {"tokens/s": "{speed:,.0f}", "of peak": "{of_peak:.1%}", "peak GB": "{memory:.2f}", "loss": "{loss:.4f}"}
    if not is_search:
        columns |= {"classifying": "{classify:.2f}", "ratio ": "{classify_ratio:.2f}"}
        columns |= {"of peak ": "{classify_of_peak:.1%}"}
    columns |= {"first": "{first:.0f}"} if options.compile else {}
    figures = {}
    for case, results in run_workers(options, cases, folder).items():
        figures[case] = row = medians(results)
        row["low"], row["high"] = (of(result["seconds"] for result in results) for of in (min, max))
        row["ratio"] = row["seconds"] / figures["orticket", precisions[0]]["seconds"]
        row["of_peak"] = row["flops"] / row["seconds"] / row["peak"]  # of the medians, as shown
        if not is_search:
            row["classify_ratio"] = row["classify"] / figures["orticket", precisions[0]]["classify"]
            row["classify_of_peak"] = row["classify_flops"] / row["classify"] / row["peak"]
    same_model = [row for (side, _), row in figures.items() if side != "its ticket"]
    # a new classifier's loss is about ln 2 with any encoder, and the same for all sides to 2e-5
    check_agreement([row["loss"] for row in same_model], 0.02 if is_search else 2e-4)
    lines = [f"{work} {processes(options)}; ratio: to orticket in {precisions[0]};"]
    lines += ["of peak: share of the FLOP/s of a product of large matrices in the same precision;"]
    lines += ["first: seconds of the first passes, with compiling; compiled sides have one process."] * options.compile
    lines += ["", *report.table(figures, columns), "", f"Best baseline / orticket: {best_ratios(figures, 'seconds')}."]
    if not is_search:
        check_agreement([row["right"] for row in same_model], 0.03)
        lines += [f"Classifying: {best_ratios(figures, 'classify')}."]
    return options.what, figures, lines


def profile_table(options, results, work):
    """The seconds of each group of operators, and the FLOP/s that the products alone reach."""
    of_process = medians([result.pop("profile") for result in results])
    row, total = medians(results), sum(of_process.values())
    slower = total / row["seconds"]
    rate = row["flops"] / of_process["matrix products"] / row["peak"]
    figures = {(name,): {"seconds": seconds, "share": seconds / total} for name, seconds in of_process.items()}
    lines = [f"{work} {processes(options)}.", ""]
    lines += [*report.table(figures, {"seconds": "{seconds:.3f}", "share": "{share:.1%}"}), ""]
    last = f"The products alone reach {rate:.0%} of the peak; profiling took {slower:.2f} times as long as without it."
    return f"{options.what}-profile", figures, [*lines, last]


def bench_attack(options, folder):
    """Seconds from the first to the last example."""
    sides = "orticket", "textattack, longest", "textattack"
    precisions = ["fp32"] if pick_precision(pick_device(options.device), "auto") == torch.float32 else ["fp32", "bf16"]
    cases = [(side, precision) for precision in precisions for side in sides if (side, precision) != (sides[2], "bf16")]
    results, figures = run_workers(options, cases, folder), {}
    texts = {case: [result.pop("found") for result in results[case]][0] for case in cases}
    for case in cases:
        figures[case] = row = medians(results[case])
        row["ratio"] = row["seconds"] / figures["orticket", "fp32"]["seconds"]
        row["queries"] = sum(queries for _, _, queries in texts[case])
        row["same"] = sum(one == other for one, other in zip(texts[case], texts["textattack", "fp32"]))
    columns = {"in all": "{seconds:.2f}", "ratio": "{ratio:.2f}", "queries": "{queries:,}"}
    columns |= {"same outcome": f"{{same}} of {options.n}"} | {f"in {part}": f"{{{part}:.2f}}" for part in PARTS}
    lines = [f"{options.attack} on {options.n} rows of {options.task}, MiniLM, in seconds. {processes(options)};"]
    lines += ["ratio: to orticket in fp32; longest: TextAttack's wrapper, but with each batch padded to its longest"]
    lines += ["text instead of 512 tokens.", "", *report.table(figures, columns), ""]
    lines += [f"Best baseline / orticket: {best_ratios(figures, 'seconds')}."]
    return f"attack-{options.attack}-{options.task}", figures, lines


def time_attack(options, side, precision, folder):
    """{"seconds", those of each of PARTS, "found": [[outcome, text, queries] of each example]}."""
    clock = dict.fromkeys(PARTS, 0.0)
    textattack, nltk_data = import_textattack()
    tune_allocator()
    given = {"task": options.task, "model": "minilm", "output": options.output, "n": options.n}
    given |= {"attack": options.attack, "vectors": options.vectors, "precision": precision, "device": options.device}
    given = attack.Options(**given, ticket="none", max_length=512)
    device, task = pick_device(options.device), data.find_task(options.task)
    splits = task.load(None)
    victim, _, _ = attack.find_victim(given, task, splits, device, pick_precision(device, precision))
    recipe, _ = recipes.build(textattack, nltk_data, options.attack, given, task, victim)
    if side != "orticket":
        libraries.restore_textattack(recipe, textattack, given, pads_to_longest="longest" in side)
    count_time(clock, "the model", recipe.goal_function, "model")
    for constraint in recipe.constraints:
        if hasattr(constraint, "model"):
            count_time(clock, "the sentence encoder", constraint, "model")
    start, found = time.perf_counter(), []
    for number in attack.sample(given, len(splits["test"])):
        texts, label = splits["test"][number]
        textattack.shared.utils.set_seed(number)
        attack.clear_caches(recipe)
        result = recipe.attack(OrderedDict(zip(task.columns, texts)), label)
        found.append((type(result).__name__, result.perturbed_result.attacked_text.text, result.num_queries))
    return clock | {"seconds": time.perf_counter() - start, "found": found}


def count_time(clock, part, owner, name):
    """Add the time of all calls of owner.name to clock[part]."""
    call = getattr(owner, name)

    @functools.wraps(call)  # with its cache, which attack.clear_caches empties
    def timed(*arguments):
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            clock[part] += time.perf_counter() - start

    setattr(owner, name, timed)


if __name__ == "__main__":
    cli.run(main)
