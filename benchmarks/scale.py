"""How the cost grows with the work: `python -m benchmarks.bench scale`.

Measures searching on corpora of several sizes. Time per token and memory should be the same at every size.
"""

import os
import random
import time
from unittest import mock

import torch

import data
from benchmarks import report
from benchmarks.training import freelb_step, full_size
from bert import Bert
from freelb import ADVERSARIES
from gates import Coefficients
from inputs.batches import Blocks
from inputs.tokenizer import Tokenizer
from runtime import cli
from runtime.cpu import tune_allocator
from runtime.device import autocast, peak_memory, pick_device, pick_precision
from search import objective

STEPS = 12  # timed steps of a search, after as many warm-up steps


def bench(options, folder):
    """(name, figures, lines) for report.publish."""
    figures = {}
    sizes = [megabytes for megabytes in (1, 10, 100, 1000) if megabytes < options.megabytes] + [options.megabytes]
    in_folder = mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder))  # a gigabyte of tokens is not kept
    with in_folder, cli.progress(len(sizes), description="scale", unit="size") as bar:
        for megabytes in sizes:
            figures[f"{megabytes:,} MB of text",] = measure_search(megabytes, options, folder)
            bar.update()
    columns = {"tokens": "{tokens:,}", "tokenizing": "{preparing:.2f}", "searching": "{searching:.1f}"}
    columns |= {"peak GB": "{memory:.2f}"}
    return "scale", figures, ["Search with MiniLM, seconds per million tokens.", "", *report.table(figures, columns)]


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
    order, counted = blocks.epoch(options.batch_size, 0, 0), 0
    for step in range(2 * STEPS):
        if step == STEPS:
            start = time.perf_counter()
        batch = blocks.batch(order[step % len(order)])
        counted += batch.ids.numel() * (step >= STEPS)
        loss_of = lambda delta: objective(model, batch, c.gates, delta)  # noqa: E731
        with autocast(device, dtype):
            freelb_step(loss_of, batch.token_mask, model.config.hidden_size, ADVERSARIES["freelb"]).item()
        optimizer.step()
        optimizer.zero_grad()
    searching = time.perf_counter() - start
    return {
        "tokens": blocks.tokens,
        "preparing": 1e6 * preparing / blocks.tokens,
        "searching": 1e6 * searching / counted,
        "memory": peak_memory(device) / 1e9,
    }
