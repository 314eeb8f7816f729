"""How the cost grows with the work, `python bench.py scale`: searching with the size of the corpus, fine-tuning with
its tokens, an attack with its queries. Each is measured at several sizes; a level line for the search and straight ones
for the others, after their start-up, are what should come out. Draws OUTPUT/scale.png and writes OUTPUT/scale.json.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import data
import search
from bert import Bert
from checkpoints.provenance import versions
from freelb import freelb
from gates import Coefficients
from inputs.tokenizer import Tokenizer
from runtime import cli, files
from runtime.cli import BadInput
from runtime.cpu import keep_memory
from runtime.device import autocast, describe, peak_memory, pick_device, pick_precision

STEPS = 12  # of a search that are timed, after as many that are not
ROWS = (375, 750, 1500, 3000, 6000)  # of rt that are fine-tuned on
EXAMPLES = (5, 10, 20, 40)  # of rt that are attacked


def bench(options):
    sizes = [megabytes for megabytes in (1, 10, 100, 1000) if megabytes < options.megabytes] + [options.megabytes]
    figures = {"machine": describe(pick_device()), "versions": versions()}
    bar = cli.progress(len(sizes) + len(ROWS) + len(EXAMPLES), description="scale", unit="size")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        # the cache is there, too: a gigabyte of tokens that nobody needs again
        figures["search"] = [step_of(bar, of_search, size, options, Path(folder)) for size in sizes]
        figures["finetune"] = [step_of(bar, of_finetuning, rows, folder) for rows in ROWS]
        figures["attack"] = [step_of(bar, of_attack, n, folder) for n in EXAMPLES]
    bar.close()
    report(figures)
    files.write_json(Path(options.output) / "scale.json", figures)
    plot(figures, Path(options.output) / "scale.png")
    print(f"figures: {Path(options.output) / 'scale.json'}, plot: {Path(options.output) / 'scale.png'}")


def step_of(bar, measure, size, *given):
    bar.set_postfix_str(f"{measure.__name__.removeprefix('of_')}, {size}")
    found = measure(size, *given)
    bar.update()
    return found


def of_search(megabytes, options, folder):
    """Seconds per million tokens: of tokenizing a corpus of BBC's documents in another order, again and again until it
    is as large, and of the search's steps on it; memory in GB."""
    path = folder / f"{megabytes}.txt"
    documents = [" ".join(text.split()) for text in data.find_corpus("bbc")[0]]
    generator, written = random.Random(0), 0
    with open(path, "w", encoding="utf8") as file:
        while written < megabytes * 10**6:
            generator.shuffle(documents)
            for text in documents:
                if written < megabytes * 10**6:
                    written += file.write(f"{text}\n")
    device, source = pick_device(), data.find_model("minilm")[0]
    dtype = pick_precision(device, "auto")
    keep_memory()
    torch.manual_seed(0)
    model, tokenizer = Bert.load(source, mlm=True).to(device).train(), Tokenizer(source)
    given = search.Options(corpus=str(path), batch_size=options.batch_size, block=options.block)
    start = time.perf_counter()
    mlm = search.MLM(given, tokenizer, model.config, device)
    prepared = time.perf_counter() - start
    path.unlink()
    c = Coefficients(model.config.num_hidden_layers, model.config.num_attention_heads, model.config.intermediate_size)
    c.to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *c.parameters()], lr=given.learning_rate, fused=True)
    adversary = {name: getattr(given, f"adv_{name}") for name in ("steps", "lr", "init_mag", "max_norm")}
    order = mlm.epoch(0, 0, given.batch_size)
    for step in range(2 * STEPS):
        if step == STEPS:
            start = time.perf_counter()
        chosen = order[step % len(order)]
        present, loss_for = mlm.batch(chosen, model, c)
        with autocast(device, dtype):
            freelb(loss_for(slice(0, len(chosen)))[0], present, model.config.hidden_size, **adversary).item()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return {
        "megabytes": megabytes,
        "tokens": mlm.blocks.tokens,
        "preparing": 1e6 * prepared / mlm.blocks.tokens,
        "searching": 1e6 * seconds / (STEPS * given.batch_size * given.block),
        "memory": peak_memory(device) / 1e9,
    }


def of_finetuning(rows, folder):
    """The seconds that finetune.py counts for one epoch of `rows` rows of rt, and their tokens."""
    run("finetune.py", "--ticket", "none", "--epochs", 1, "--train-rows", rows, "--output", folder, "--overwrite")
    metrics = files.read_json(next(Path(folder).rglob("metrics.json")))
    return {"tokens": round(metrics["tokens_per_second"] * metrics["seconds"]), "seconds": metrics["seconds"]}


def of_attack(n, folder):
    """The seconds of TextFooler on n rows, from typing the command, and its queries to the model."""
    seconds = run("attack.py", "--ticket", "none", "--n", n, "--output", folder, "--overwrite")
    path = next(Path(folder).rglob("textfooler.jsonl"))
    rows = [json.loads(line) for line in path.read_text("utf8").splitlines()]
    return {"queries": sum(row["queries"] for row in rows if "queries" in row), "seconds": seconds}


def run(script, *flags):
    """Seconds of a script of ours. Raises BadInput with its last words where it fails."""
    start = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / script), "--model", "minilm", *map(str, flags)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise BadInput(f"{script} failed: {cli.last_words(ended.stderr, ended.returncode)}")
    return time.perf_counter() - start


def fits(figures):
    """{what: (x, y, (intercept, slope))} of fine-tuning and attack."""
    found = {}
    for what, of in (("finetune", "tokens"), ("attack", "queries")):
        x, y = (np.array([row[name] for row in figures[what]], dtype=float) for name in (of, "seconds"))
        slope, intercept = np.polyfit(x, y, 1)
        found[what] = x, y, (intercept, slope)
    return found


def report(figures):
    print(f"on {figures['machine']}")
    print("search: corpus in MB     tokens  s per million tokens: preparing  searching  peak GB")
    for row in figures["search"]:
        print(
            f"{row['megabytes']:20,}  {row['tokens']:11,}  {row['preparing']:29.2f}  {row['searching']:9.1f}", end="  "
        )
        print(f"{row['memory']:7.2f}")
    for what, (x, y, (intercept, slope)) in fits(figures).items():
        unit = "tokens" if what == "finetune" else "queries"
        print(f"{what}: {slope * 1000:.2f} s per 1,000 {unit}, {intercept:.1f} s of start-up")
        for a, b in zip(x, y):
            print(f"  {a:9,.0f} {unit} {b:8.1f} s, the line says {intercept + slope * a:8.1f} s")


def plot(figures, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
    sizes = [row["megabytes"] for row in figures["search"]]
    for name, marker in (("searching", "o"), ("preparing", "s")):
        axes[0].plot(sizes, [row[name] for row in figures["search"]], marker=marker, label=name)
    axes[0].set(
        xscale="log", yscale="log", xlabel="corpus in MB", ylabel="seconds per million tokens", title="search.py"
    )
    axes[0].legend()
    for axis, (what, (x, y, (intercept, slope))) in zip(axes[1:], fits(figures).items()):
        ends = np.array([0, x.max()])
        axis.plot(ends, intercept + slope * ends, color="gray", linewidth=1, label="straight line")
        axis.plot(x, y, "o", label="measured")
        unit = "tokens of an epoch" if what == "finetune" else "queries to the model"
        axis.set(xlabel=unit, ylabel="seconds", title=f"{what}.py", xlim=(0, None), ylim=(0, None))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.get_major_locator().set_params(nbins=5)
        axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, dpi=150, format="png")
