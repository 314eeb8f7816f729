"""How the cost grows with the work: `python -m benchmarks.bench scale`.

Measures searching by the size of the corpus, fine-tuning by its tokens and an attack by its queries, each at several
sizes. The search should cost the same per token at every size, the others grow linearly after their start-up. Writes
OUTPUT/scale.json and OUTPUT/scale.png.
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
from benchmarks.libraries import freelb_step
from bert import Bert
from checkpoints.provenance import versions
from freelb import ADVERSARIES
from gates import Coefficients
from inputs.batches import Blocks
from inputs.tokenizer import Tokenizer
from runtime import cli, files
from runtime.cli import BadInput
from runtime.cpu import tune_allocator
from runtime.device import autocast, describe, peak_memory, pick_device, pick_precision
from sharing.plots import new_figure, save_figure

STEPS = 12  # timed steps of a search, after as many for warming up
ROWS = (375, 750, 1500, 3000, 6000)  # training rows of rt
EXAMPLES = (5, 10, 20, 40)  # attacked rows of rt


def bench(options):
    sizes = [megabytes for megabytes in (1, 10, 100, 1000) if megabytes < options.megabytes] + [options.megabytes]
    figures = {
        "machine": describe(pick_device(options.device)),
        "versions": versions(),
        "search": [],
        "finetune": [],
        "attack": [],
    }
    bar = cli.progress(len(sizes) + len(ROWS) + len(EXAMPLES), description="scale", unit="size")
    # the cache is in the temporary folder, too, so that a gigabyte of tokens is not kept
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        for what, measure, values in (
            ("search", lambda megabytes: measure_search(megabytes, options, Path(folder)), sizes),
            ("finetune", lambda rows: measure_finetuning(rows, folder), ROWS),
            ("attack", lambda n: measure_attack(n, folder), EXAMPLES),
        ):
            for value in values:
                bar.set_postfix_str(f"{what}, {value}")
                figures[what].append(measure(value))
                bar.update()
    bar.close()
    report(figures)
    output = Path(options.output)
    files.write_json(output / "scale.json", figures)
    plot(figures, output / "scale.png")
    print(f"figures: {output / 'scale.json'}, plot: {output / 'scale.png'}")


def write_corpus(path, size):
    """Write `size` bytes: the documents of BBC News, one per line, repeated in random orders."""
    documents = [" ".join(text.split()) for text in data.find_corpus("bbc")[0]]
    generator, written = random.Random(0), 0
    with open(path, "w", encoding="utf8") as file:
        while written < size:
            generator.shuffle(documents)
            for text in documents:
                if written < size:
                    written += file.write(f"{text}\n")


def measure_search(megabytes, options, folder):
    """Seconds per million tokens of tokenizing a corpus and of the search's steps on it; memory in GB."""
    path = folder / f"{megabytes}.txt"
    write_corpus(path, megabytes * 10**6)
    device, source = pick_device(options.device), data.find_model("minilm")[0]
    dtype = pick_precision(device, "auto")
    tune_allocator()
    torch.manual_seed(0)
    model, tokenizer = Bert.load(source, mlm=True).to(device).train(), Tokenizer(source)
    start = time.perf_counter()
    blocks = Blocks(tokenizer, *data.find_corpus(str(path)), options.block, device)
    preparing = time.perf_counter() - start
    path.unlink()
    config = model.config
    c = Coefficients(config.num_hidden_layers, config.num_attention_heads, config.intermediate_size).to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *c.parameters()], lr=2e-5, fused=True)
    order = blocks.epoch(options.batch_size, 0, 0)
    for step in range(2 * STEPS):
        if step == STEPS:
            start = time.perf_counter()
        ids, positions, labels = blocks.batch(order[step % len(order)])

        def loss_of(delta):
            return model.mlm_loss(model(ids, positions=positions, gates=c.gates, delta=delta), labels)

        with autocast(device, dtype):
            freelb_step(loss_of, torch.ones_like(ids), config.hidden_size, ADVERSARIES["freelb"]).item()
        optimizer.step()
        optimizer.zero_grad()
    searching = time.perf_counter() - start
    return {
        "megabytes": megabytes,
        "tokens": blocks.tokens,
        "preparing": 1e6 * preparing / blocks.tokens,
        "searching": 1e6 * searching / (STEPS * options.batch_size * options.block),
        "memory": peak_memory(device) / 1e9,
    }


def measure_finetuning(rows, folder):
    """Tokens and seconds of one epoch on `rows` rows of rt, as finetune.py measures them."""
    run("finetune.py", "--ticket", "none", "--epochs", 1, "--train-rows", rows, "--output", folder, "--overwrite")
    metrics = files.read_json(next(Path(folder).rglob("metrics.json")))
    return {"tokens": round(metrics["tokens_per_second"] * metrics["seconds"]), "seconds": metrics["seconds"]}


def measure_attack(n, folder):
    """Queries to the model and seconds, start-up included, of TextFooler on n rows."""
    seconds = run("attack.py", "--ticket", "none", "--n", n, "--output", folder, "--overwrite")
    rows = map(json.loads, next(Path(folder).rglob("textfooler.jsonl")).read_text("utf8").splitlines())
    return {"queries": sum(row.get("queries", 0) for row in rows), "seconds": seconds}


def run(script, *flags):
    """Seconds of a script."""
    path, start = Path(__file__).resolve().parents[1] / script, time.perf_counter()
    run_process([sys.executable, path, "--model", "minilm", *map(str, flags)], script)
    return time.perf_counter() - start


def run_process(command, name):
    """The output of a command. Raises BadInput with the last line of its errors if it fails."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise BadInput(f"{name} failed: {lines[-1]}")
    return process.stdout


def fit_lines(figures):
    """Least squares of fine-tuning and attack: {what: (unit, x, seconds, (intercept, slope))}."""
    fits = {}
    for what, unit in (("finetune", "tokens"), ("attack", "queries")):
        x, seconds = (np.array([row[name] for row in figures[what]], dtype=float) for name in (unit, "seconds"))
        fits[what] = unit, x, seconds, np.polyfit(x, seconds, 1)[::-1]
    return fits


def report(figures):
    print(f"on {figures['machine']}")
    print("search: corpus in MB     tokens  s per million tokens: preparing  searching  peak GB")
    for row in figures["search"]:
        cells = f"{row['megabytes']:20,}  {row['tokens']:11,}  {row['preparing']:29.2f}"
        print(f"{cells}  {row['searching']:9.1f}  {row['memory']:7.2f}")
    for what, (unit, x, seconds, (intercept, slope)) in fit_lines(figures).items():
        print(f"{what}: {slope * 1000:.2f} s per 1,000 {unit}, {intercept:.1f} s of start-up")
        for a, b in zip(x, seconds):
            print(f"  {a:9,.0f} {unit} {b:8.1f} s, linear fit {intercept + slope * a:8.1f} s")


def plot(figures, path):
    figure, axes = new_figure(1, 3, figsize=(12, 3.6))
    sizes = [row["megabytes"] for row in figures["search"]]
    for name, marker in (("searching", "o"), ("preparing", "s")):
        axes[0].plot(sizes, [row[name] for row in figures["search"]], marker=marker, label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="corpus in MB", ylabel="seconds per million tokens")
    axes[0].set_title("search.py")
    axes[0].legend()
    for axis, (what, (unit, x, seconds, (intercept, slope))) in zip(axes[1:], fit_lines(figures).items()):
        ends = np.array([0, x.max()])
        axis.plot(ends, intercept + slope * ends, color="gray", linewidth=1, label="linear fit")
        axis.plot(x, seconds, "o", label="measured")
        axis.set(xlabel=unit, ylabel="seconds", title=f"{what}.py", xlim=(0, None), ylim=(0, None))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.get_major_locator().set_params(nbins=5)
        axis.legend()
    figure.tight_layout()
    save_figure(figure, path)
