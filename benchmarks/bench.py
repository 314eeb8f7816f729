"""Speed compared with Hugging Face transformers and TextAttack, on the same work in the same run.

    python -m benchmarks.bench search                  one FreeLB step on masked language modelling
    python -m benchmarks.bench finetune --task sst2    fine-tuning and classifying, with the full model and a ticket
    python -m benchmarks.bench load                    loading a checkpoint of BERT-base's size, in each format
    python -m benchmarks.bench attack                  TextFooler on the full MiniLM that finetune.py trained
    python -m benchmarks.bench attack --attack bertattack --n 4 --rounds 1
    python -m benchmarks.bench scale                   how the cost grows with the work, with a plot

Every measurement is a process of its own, and the sides take turns. The first steps of each process warm up and are not
counted. Both sides start from the same weights and see the same examples. Their losses (without dropout), sums of
loaded weights or adversarial texts are compared, so that a fast wrong answer cannot win.
"""

import json
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
from benchmarks import libraries, scale, training
from benchmarks.training import BASELINES
from bert import Bert, Config
from checkpoints.huggingface import read_weights
from inputs.tokenizer import Tokenizer
from runtime import cli, files
from runtime.cli import BadInput, option
from runtime.cpu import tune_allocator
from runtime.device import describe, peak_memory, pick_device, pick_precision

BENCHMARKS = ("search", "finetune", "load", "attack", "scale")
ATTACK_PARTS = ("the model", "sentence encoder", "part of speech", "substitutes", "the rest", "import")


@dataclass
class Options:
    what: str = option("search", "benchmark", choices=BENCHMARKS, positional=True)
    batch_size: int = option(32, "examples per step", at_least=1)
    block: int = option(128, "search: tokens per example", at_least=8)
    adv_steps: int = option(3, "search: K, FreeLB's ascent steps", at_least=1)
    steps: int = option(3, "search: counted steps per process", at_least=1)
    rows: int = option(640, "finetune: training rows", at_least=1)
    task: str = option("rt", "finetune, attack: the task; attack needs the model of finetune.py --ticket none")
    attack: str = option("textfooler", "attack: the recipe", choices=tuple(recipes.RECIPES))
    n: int = option(20, "attack: attacked test rows", at_least=1)
    vectors: str = option(None, "attack: word vectors, same as in attack.py")
    megabytes: int = option(1000, "scale: size of the largest corpus", at_least=1)
    rounds: int = option(3, "processes per side", at_least=1)
    same_allocator: bool = option(False, "call runtime.cpu.tune_allocator for the baselines, too")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: CUDA, then MPS, then CPU")
    output: str = option("runs", "attack: folder of finetune.py; scale: folder for scale.png and scale.json")
    json: str = option(None, "also write the figures to this file, except those of scale")
    worker: str = option(None, "internal: SIDE;CASE;FOLDER, one process of one side")


def main():
    options = cli.parse(Options, __doc__)
    if options.what == "scale":
        return scale.bench(options)
    benchmarks = {"load": (bench_load, time_load), "attack": (bench_attack, time_attack)}
    benchmark, worker = benchmarks.get(options.what, (bench_training, training.time_training))
    if options.worker:
        return print(json.dumps(worker(options, *options.worker.split(";"))))
    with tempfile.TemporaryDirectory() as folder:
        figures = benchmark(options, Path(folder))
    if options.json:
        files.write_json(options.json, {" ".join(case): row for case, row in figures.items()})


def run_workers(options, cases, folder):
    """{case: [figures of each of its processes]}. Every round starts one process per case."""
    found = {case: [] for case in cases}
    bar = cli.progress(options.rounds * len(cases), description="processes")
    for _ in range(options.rounds):
        for case in cases:
            worker = ["--worker", ";".join((*case, str(folder)))]
            command = [sys.executable, "-m", "benchmarks.bench", *sys.argv[1:], *worker]
            output = scale.run_process(command, " ".join(case))
            found[case].append(json.loads(output.splitlines()[-1]))
            bar.update()
    bar.close()
    return found


def medians(results):
    """[{figure: value} of a process] -> {figure: median}."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def check_agreement(values, tolerance):
    """Raises BadInput if the sides did not do the same work."""
    if max(values) - min(values) > tolerance:
        raise BadInput(f"the sides differ by {max(values) - min(values):.4g}: they do not do the same work")


def print_table(figures, columns):
    """Print {case: {figure: value}}, a row per case. columns: {heading: format of the figures}."""
    table = [["", *columns]]
    table += [[" in ".join(case), *(text.format(**row) for text in columns.values())] for case, row in figures.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *cells in table:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")


def bench_training(options, folder):
    device, is_search = pick_device(options.device), options.what == "search"
    precisions = ["fp32"] if pick_precision(device, "auto") == torch.float32 else ["bf16", "fp32"]
    cases = [
        (side, precision) for precision in precisions for side in ("orticket", *BASELINES) if "compiled" not in side
    ]
    labels = () if is_search else data.find_task(options.task).labels
    torch.manual_seed(0)
    source = data.find_model("minilm")[0]
    Bert.load(source, mlm=is_search, num_labels=len(labels) or None).save(folder, labels, {})
    Tokenizer(source).save(folder)
    if is_search:
        work = f"FreeLB step, K = {options.adv_steps}, {options.batch_size} x {options.block} tokens"
    else:
        cases[1:1] = [("its ticket", precisions[0]), ("with FreeLB", precisions[0])]
        work = f"fine-tuning, {options.rows} rows of {options.task} in batches of {options.batch_size}"
    print(f"{work}, MiniLM, {describe(device)}; medians of {options.rounds} processes' medians")
    print("seconds: per step" if is_search else "seconds: of all rows; classifying: of the test rows")
    print("ratio: seconds / seconds of orticket; of peak: FLOP/s / FLOP/s of a product of large matrices")
    columns = {"seconds": "{seconds:.2f}", "(range)": "{low:.2f}-{high:.2f}", "ratio": "{ratio:.2f}"}
    columns |= {"tokens/s": "{speed:,.0f}", "of peak": "{of_peak:.1%}", "peak GB": "{gb:.2f}", "loss": "{loss:.4f}"}
    columns |= {} if is_search else {"classifying": "{classify:.2f}", "ratio ": "{classify_ratio:.2f}"}
    figures = {}
    for case, results in run_workers(options, cases, folder).items():
        figures[case] = row = medians(results)
        row["low"], row["high"] = (of(result["seconds"] for result in results) for of in (min, max))
        row |= {"speed": row["tokens"] / row["seconds"], "of_peak": row["flops"] / row["seconds"] / row["peak"]}
        row |= {"gb": row["memory"] / 1e9, "ratio": row["seconds"] / figures["orticket", precisions[0]]["seconds"]}
        if not is_search:
            row["classify_ratio"] = row["classify"] / figures["orticket", precisions[0]]["classify"]
    print_table(figures, columns)
    same_model = [row for (side, _), row in figures.items() if side != "its ticket"]
    check_agreement([row["loss"] for row in same_model], 0.02)
    if not is_search:
        check_agreement([row["right"] for row in same_model], 0.03)
    return figures


def bench_load(options, folder):
    """Files are memory-mapped, so a load alone reads little: the time until every weight was used is measured, too."""
    torch.manual_seed(0)
    model = Bert(Config(), mlm=True)
    for kind in ("safetensors", "bin"):
        (folder / kind).mkdir()
        model.save(folder / kind, (), {})
    size = (folder / "safetensors" / "model.safetensors").stat().st_size
    torch.save(dict(read_weights(folder / "safetensors")), folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()
    cases = [(side, kind) for kind in ("safetensors", "bin") for side in ("orticket", "transformers")]
    figures = {case: medians(results) for case, results in run_workers(options, cases, folder).items()}
    for (_, kind), row in figures.items():
        row |= {"of_file": row["memory"] / size, "ratio": row["used"] / figures["transformers", kind]["used"]}
    machine = describe(torch.device("cpu"))
    print(f"loading BERT-base with MLM head, {size / 1e6:.0f} MB, {machine}; medians of {options.rounds} processes")
    columns = {"seconds to load": "{seconds:.3f}", "to use all weights": "{used:.3f}"}
    print_table(figures, columns | {"peak memory / file": "{of_file:.2f}", "ratio to transformers": "{ratio:.2f}"})
    check_agreement([row["sum"] for row in figures.values()], 0.1)
    return figures


def time_load(options, side, kind, folder):
    """{"seconds" to load, "used": seconds until all weights were read, "memory" beyond that of torch, "sum"}."""
    if side == "transformers":
        from transformers import BertForMaskedLM
    torch.ones(2**20).sum()
    cpu = torch.device("cpu")
    before, start = peak_memory(cpu), time.perf_counter()
    path = f"{folder}/{kind}"
    model = BertForMaskedLM.from_pretrained(path) if side == "transformers" else Bert.load(path, mlm=True)
    seconds = time.perf_counter() - start
    total = sum(p.sum(dtype=torch.float64).item() for p in model.parameters())
    used = time.perf_counter() - start
    return {"seconds": seconds, "used": used, "memory": peak_memory(cpu) - before, "sum": total}


def bench_attack(options, folder):
    """Seconds from the first to the last example. The import of TextAttack, the same for both, is shown separately."""
    cases = [("orticket", "fp32"), ("textattack", "fp32"), ("orticket", "bf16")]
    if pick_precision(pick_device(options.device), "auto") == torch.float32:
        cases.pop()
    results, figures = run_workers(options, cases, folder), {}
    texts = {case: [result.pop("found") for result in results[case]][0] for case in cases}
    for case in cases:
        figures[case] = row = medians(results[case])
        row["ratio"] = row["seconds"] / figures["orticket", "fp32"]["seconds"]
        row["queries"] = sum(queries for _, _, queries in texts[case])
        row["same"] = sum(one == other for one, other in zip(texts[case], texts["textattack", "fp32"]))
    print(f"{options.attack} on {options.n} rows of {options.task}, {describe(pick_device(options.device))}")
    print(f"seconds, medians of {options.rounds} processes; ratio to orticket in fp32")
    columns = {"in all": "{seconds:.2f}", "ratio": "{ratio:.2f}", "queries": "{queries:,}"}
    columns |= {"same outcome": f"{{same}} of {options.n}"} | {part: f"{{{part}:.2f}}" for part in ATTACK_PARTS}
    print_table(figures, columns)
    return figures


def time_attack(options, side, precision, folder):
    """{"seconds", those of each of ATTACK_PARTS, "found": [[outcome, text, queries] of each example]}."""
    clock = dict.fromkeys(ATTACK_PARTS, 0.0)
    start = time.perf_counter()
    textattack, nltk_data = import_textattack()
    clock["import"] = time.perf_counter() - start
    tune_allocator()
    given = {"task": options.task, "model": "minilm", "output": options.output, "n": options.n}
    given |= {"attack": options.attack, "vectors": options.vectors, "precision": precision, "device": options.device}
    given = attack.Options(**given, ticket="none", max_length=512)
    device, task = pick_device(options.device), data.find_task(options.task)
    splits = task.load(None)
    victim, _, _ = attack.find_victim(given, task, splits, device, pick_precision(device, precision))
    recipe, _ = recipes.build(textattack, nltk_data, options.attack, given, task, victim)
    if side == "textattack":
        libraries.restore_textattack(recipe, textattack, given)
    count_time(clock, "the model", recipe.goal_function, "model")
    for constraint in recipe.constraints:
        for part, name in (("sentence encoder", "model"), ("part of speech", "_get_pos")):
            if hasattr(constraint, name):
                count_time(clock, part, constraint, name)
    if options.attack == "bertattack":
        count_time(clock, "substitutes", recipe.transformation, "_get_transformations")
    start, found = time.perf_counter(), []
    for number in attack.sample(given, len(splits["test"])):
        texts, label = splits["test"][number]
        textattack.shared.utils.set_seed(number)
        attack.clear_caches(recipe)
        result = recipe.attack(OrderedDict(zip(task.columns, texts)), label)
        found.append((type(result).__name__, result.perturbed_result.attacked_text.text, result.num_queries))
    seconds = time.perf_counter() - start
    clock["the rest"] = seconds - sum(clock[part] for part in ATTACK_PARTS[:4])
    return clock | {"seconds": seconds, "found": found}


def count_time(clock, part, owner, name):
    """Add the time of all calls of owner.name to clock[part]."""
    call = getattr(owner, name)

    def timed(*arguments):
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            clock[part] += time.perf_counter() - start

    setattr(owner, name, timed)


if __name__ == "__main__":
    cli.run(main)
