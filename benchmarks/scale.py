"""How the cost grows with the work: `python -m benchmarks.bench scale`.

Measures searching by the size of the corpus, fine-tuning by its tokens and an attack by its queries, each at several
sizes. The search should cost the same per token at every size, the others grow linearly after their start-up.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import data
from benchmarks import report
from benchmarks.training import freelb_step, full_size, search_loss
from bert import Bert
from freelb import ADVERSARIES
from gates import Coefficients
from inputs.batches import Blocks
from inputs.tokenizer import Tokenizer
from runtime import cli, files
from runtime.cpu import tune_allocator
from runtime.device import autocast, peak_memory, pick_device, pick_precision

STEPS = 12  # timed steps of a search, after as many for warming up
ROWS = (375, 750, 1500, 3000, 6000)  # training rows of rt
EXAMPLES = (5, 10, 20, 40)  # attacked rows of rt


def bench(options, folder):
    """(name, figures, lines) for report.publish."""
    sizes = [megabytes for megabytes in (1, 10, 100, 1000) if megabytes < options.megabytes] + [options.megabytes]
    bar = cli.progress(len(sizes) + len(ROWS) + len(EXAMPLES), description="scale", unit="size")

    def measured(what, measure, values):
        rows = {}
        for value in values:
            bar.set_postfix_str(f"{what} {value}")
            rows[(f"{what} {value:,}",)] = measure(value)
            bar.update()
        return rows

    # the cache is in the temporary folder, too, so that a gigabyte of tokens is not kept
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
        search = measured("search, MB of text:", lambda megabytes: measure_search(megabytes, options, folder), sizes)
        finetuning = measured("finetune, rows:", lambda rows: measure_finetuning(rows, folder), ROWS)
        attack = measured("attack, sentences:", lambda n: measure_attack(n, folder), EXAMPLES)
    bar.close()
    columns = {"tokens": "{tokens:,}", "tokenizing": "{preparing:.2f}", "searching": "{searching:.1f}"}
    lines = ["search: seconds per million tokens", ""]
    lines += report.table(search, columns | {"peak GB": "{memory:.2f}"})
    for rows, unit in ((finetuning, "tokens"), (attack, "queries")):
        intercept, slope = fit_line(rows.values())
        fit = f"{1000 * slope:.3g} s per 1,000 {unit} and {intercept:.1f} s of start-up"
        lines += ["", f"Linear fit: {fit}.", ""]
        lines += report.table(rows, {unit: "{work:,}", "seconds": "{seconds:.1f}", "linear fit": "{fit:.1f}"})
    return "scale", search | finetuning | attack, lines


def fit_line(rows):
    """Least squares (intercept, slope) of the seconds on the work. Adds each row's "fit"."""
    slope, intercept = np.polyfit([row["work"] for row in rows], [row["seconds"] for row in rows], 1)
    for row in rows:
        row["fit"] = intercept + slope * row["work"]
    return intercept, slope


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
    c = Coefficients(*full_size(model.config)).to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *c.parameters()], lr=2e-5, fused=True)
    order = blocks.epoch(options.batch_size, 0, 0)
    for step in range(2 * STEPS):
        if step == STEPS:
            start = time.perf_counter()
        ids, positions, labels = blocks.batch(order[step % len(order)])
        loss_of, dim = search_loss(model, c, ids, positions, labels), model.config.hidden_size
        with autocast(device, dtype):
            freelb_step(loss_of, torch.ones_like(ids), dim, ADVERSARIES["freelb"]).item()
        optimizer.step()
        optimizer.zero_grad()
    searching = time.perf_counter() - start
    return {
        "tokens": blocks.tokens,
        "preparing": 1e6 * preparing / blocks.tokens,
        "searching": 1e6 * searching / (STEPS * options.batch_size * options.block),
        "memory": peak_memory(device) / 1e9,
    }


def measure_finetuning(rows, folder):
    """Tokens and seconds of one epoch on `rows` rows of rt, as finetune.py measures them."""
    run("finetune.py", "--ticket", "none", "--epochs", 1, "--train-rows", rows, "--output", folder, "--overwrite")
    metrics = files.read_json(next(Path(folder).rglob("metrics.json")))
    return {"work": round(metrics["tokens_per_second"] * metrics["seconds"]), "seconds": metrics["seconds"]}


def measure_attack(n, folder):
    """Queries to the model and seconds, start-up included, of TextFooler on n rows."""
    seconds = run("attack.py", "--ticket", "none", "--n", n, "--output", folder, "--overwrite")
    rows = map(json.loads, next(Path(folder).rglob("textfooler.jsonl")).read_text("utf8").splitlines())
    return {"work": sum(row.get("queries", 0) for row in rows), "seconds": seconds}


def run(script, *flags):
    """Seconds of a script."""
    path, start = Path(__file__).resolve().parents[1] / script, time.perf_counter()
    report.run_process([sys.executable, path, "--model", "minilm", *map(str, flags)], script)
    return time.perf_counter() - start
