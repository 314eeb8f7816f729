"""Training and classifying, timed in one process: what search.py and finetune.py do, and the same with transformers."""

import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import finetune
from benchmarks import libraries
from benchmarks.libraries import freelb_step
from bert import Bert, Config
from freelb import ADVERSARIES
from gates import Coefficients, draw_masks
from inputs.batches import TokenizedSplit
from inputs.splits import first_rows
from inputs.tokenizer import Tokenizer
from runtime.cpu import tune_allocator
from runtime.device import autocast, peak_memory, pick_device, pick_precision
from runtime.embeddings import restrict_vocabulary

# name -> (attention implementation, whether it is compiled)
BASELINES = {"transformers, SDPA": ("sdpa", False), "transformers, eager": ("eager", False)}
BASELINES["transformers, compiled"] = "sdpa", True


def time_training(options, side, precision, folder):
    """One process of one side: {"seconds", "flops", "loss", ...}."""
    device, is_search, baseline = pick_device(options.device), options.what == "search", side in BASELINES
    dtype = pick_precision(device, precision)
    if not baseline or options.same_allocator:
        tune_allocator()
    torch.manual_seed(0)
    if is_search:
        words = min(1000, Config.read(folder).vocab_size // 2), min(30000, Config.read(folder).vocab_size)
        ids = torch.randint(*words, (options.batch_size, options.block), device=device)
        positions = (torch.rand(ids.shape, device=device) < 0.15).flatten().nonzero().flatten()
        batch = ids, positions, ids.flatten()[positions]
        found = libraries.search_work(folder, *BASELINES[side], batch) if baseline else search_work(folder, batch)
        modules, loss_of = found
        adversary, dim = (options.adv_steps, *ADVERSARIES["freelb"][1:]), modules[0].config.hidden_size
        loss = lambda: freelb_step(loss_of, torch.ones_like(ids), dim, adversary)  # noqa: E731
        work = SimpleNamespace(modules=modules, loss=loss, steps=lambda: [loss()], tokens=ids.numel())
    else:
        task = data.find_task(options.task)
        splits = task.load(None)
        rows = first_rows(splits["train"], options.rows, options.task)
        given = rows, splits["test"], options.batch_size, task.max_length, device
        ours = folder, side, dtype, splits["train"]
        work = libraries.finetune_work(folder, *BASELINES[side], *given) if baseline else finetune_work(*ours, *given)
    modules = torch.nn.ModuleList(work.modules)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-5, fused=True)

    def seconds_of(call):
        start = time.perf_counter()
        result = call()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter() - start, result

    def epoch():
        for _ in work.steps():
            torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    with autocast(device, dtype):
        modules.eval()
        torch.manual_seed(1)  # the same delta on both sides
        figures = {"loss": float(work.loss()), "tokens": work.tokens}
        optimizer.zero_grad()
        if not is_search:
            with torch.inference_mode():
                work.classify()
                figures["classify"], right = seconds_of(work.classify)
            figures["right"] = right / len(splits["test"])
        modules.train()
        with FlopCounterMode(display=False) as counter:
            epoch()
        epoch()  # the counter disables torch.compile
        figures["flops"] = counter.get_total_flops()
        figures["seconds"] = statistics.median(seconds_of(epoch)[0] for _ in range(options.steps if is_search else 1))
        figures["memory"] = peak_memory(device)
        size = 8192 if device.type == "cuda" else 2048
        a = torch.randn(size, size, device=device)
        fastest = min(seconds_of(lambda: torch.mm(a, a))[0] for _ in range(8))
        figures["peak"] = 2 * size**3 / fastest
    return figures


def full_size(config):
    """The arguments of Coefficients."""
    return config.num_hidden_layers, config.num_attention_heads, config.intermediate_size


def search_work(folder, batch):
    """([model, coefficients], loss_of(delta)) of search.py on a batch (ids, positions, labels)."""
    ids, positions, labels = batch
    model = Bert.load(folder, mlm=True).to(ids.device)
    c = Coefficients(*full_size(model.config)).to(ids.device)

    def loss_of(delta):
        return model.mlm_loss(model(ids, positions=positions, gates=c.gates, delta=delta), labels)

    return [model, c], loss_of


def finetune_work(folder, side, dtype, train, rows, test, batch_size, max_length, device):
    """What finetune.py does with these `rows` of the training split `train`, whose whole vocabulary is kept."""
    adversary = ADVERSARIES["freelb" if side == "with FreeLB" else "vanilla"]
    model, tokenizer = Bert.load(folder), Tokenizer(Path(folder))
    if side in ("its ticket", "its ticket, x 64"):
        layers, heads, neurons = full_size(model.config)
        head_mask, ffn_mask = draw_masks(torch.rand(layers, heads), torch.rand(layers, neurons), 1 / 6, 0.3)
        if side == "its ticket, x 64":  # rounds what a layer keeps to a multiple of 64
            ffn_mask = torch.arange(neurons) < (ffn_mask.sum(1, keepdim=True) / 64).round() * 64
        model = model.pruned(head_mask, ffn_mask)
    model.to(device)
    sets = [TokenizedSplit(tokenizer, part, max_length, device) for part in (rows, test, train)]
    model, _ = restrict_vocabulary(model, *sets)
    rows, test, _ = sets

    def steps():
        for batch in rows.batches(batch_size, np.random.default_rng(0)):
            loss_of = lambda delta: model.class_loss(*batch, delta=delta)  # noqa: E731
            yield freelb_step(loss_of, batch.token_mask, model.config.hidden_size, adversary)

    def loss():
        with torch.no_grad():
            losses = [model.class_loss(*batch) * len(batch.labels) for batch in rows.batches(batch_size)]
        return sum(losses) / len(rows)

    def classify():
        return finetune.accuracy(model, test, batch_size, dtype) * len(test)

    return SimpleNamespace(modules=[model], steps=steps, loss=loss, classify=classify, tokens=len(rows.ids))
