"""Training and classifying, timed in one process: what search.py and finetune.py do, and the same with transformers."""

import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import finetune
from benchmarks import libraries
from bert import Bert, Config
from freelb import ADVERSARIES, freelb, initial_delta
from gates import Coefficients, draw_masks
from inputs.batches import MaskedBatch, TokenizedSplit
from inputs.splits import first_rows
from inputs.tokenizer import Tokenizer
from runtime.cpu import Dropout, linear, tune_allocator
from runtime.device import autocast, peak_memory, pick_device, pick_precision
from runtime.embeddings import restrict_vocabulary
from search import objective

GROUPS = {  # group of a profile -> regular expression of its operators; the first match counts
    "matrix products": r"mm$|linear|scaled_dot_product|(efficient|flash|cudnn)_attention",
    "dropout": r"dropout|draw_mask|aten::ge_|aten::mul_?$",  # forward and backward multiply by the masks
    "layer norms": "layer_norm",
    "GELU": "gelu",
    "softmax and loss": "softmax|nll_loss",
    "optimizer and clipping": "Optimizer|adam|foreach|vector_norm|clamp|stack",
    "embeddings": "embedding|index",
    "conversions and copies": "copy|clone|cat$",
    "sums of activations and gradients": "aten::add_?$|aten::sum|AccumulateGrad",
}


def time_training(options, side, precision, folder):
    """One process of one side: {"seconds", "flops", "loss", ...}; with --profile {group: seconds}."""
    device, is_search = pick_device(options.device), options.what == "search"
    dtype = pick_precision(device, precision)
    tune_allocator()
    torch.manual_seed(0)
    if is_search:
        work = search_work(options, side, folder, device)
    else:
        work = finetune_work(options, side, folder, device, dtype)
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
            torch.clear_autocast_cache()  # as at the end of autocast, which a training loop enters anew at every step

    figures = {"peak": matrix_rate(device, dtype, seconds_of)}
    with autocast(device, dtype):
        modules.eval()
        torch.manual_seed(1)  # the same delta on both sides
        first = [seconds_of(work.loss)]
        figures["loss"] = float(first[0][1])
        optimizer.zero_grad()
        if not is_search:
            with torch.inference_mode():
                first.append(seconds_of(work.classify))
                figures["classify"], figures["right"] = seconds_of(work.classify)
                with mock.patch("runtime.cpu.HAS_ONEDNN", False), FlopCounterMode(display=False) as counter:
                    work.classify()  # oneDNN's operator is unknown to the counter
                figures["classify_flops"] = counter.get_total_flops()
        modules.train()
        first.append(seconds_of(epoch))
        count = options.steps if is_search else 1
        figures["seconds"] = statistics.median(seconds_of(epoch)[0] for _ in range(count))
        figures["first"] = sum(seconds for seconds, _ in first)  # with compiling
        figures["memory"] = peak_memory(device) / 1e9
        with FlopCounterMode(display=False) as counter:  # which turns torch.compile off
            epoch()
        figures["flops"] = counter.get_total_flops()
        figures["of_peak"] = figures["flops"] / figures["seconds"] / figures["peak"]
        figures["speed"] = work.tokens / figures["seconds"]
        if options.profile:
            figures["profile"] = profiled(epoch, seconds_of, device)
    return figures


def matrix_rate(device, dtype, seconds_of):
    """The FLOP/s of a product of large matrices in `dtype`, by the faster of PyTorch's libraries."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    with torch.inference_mode():
        products = [lambda: torch.mm(a, a), lambda: linear(a, a)]
        return 2 * size**3 / min(seconds_of(product)[0] for product in products for _ in range(8))


def profiled(epoch, seconds_of, device):
    """{group of GROUPS, or "the rest": seconds of an epoch}. The rest is Python, and operators of no group."""

    def draw_mask(*arguments):  # its NumPy part is not an operator of PyTorch
        with torch.profiler.record_function("draw_mask"):
            return original(*arguments)

    original, kind = Dropout.draw_mask, "device" if device.type == "cuda" else "cpu"
    with mock.patch.object(Dropout, "draw_mask", draw_mask), torch.profiler.profile() as profiler:
        total, _ = seconds_of(epoch)
    groups = dict.fromkeys((*GROUPS, "the rest"), 0.0)
    operators = [of for of in profiler.key_averages() if of.device_type == torch.autograd.DeviceType.CPU]
    for event in operators:  # the time of a GPU's kernels is attributed to their operators
        group = next((name for name, pattern in GROUPS.items() if re.search(pattern, event.key)), "the rest")
        groups[group] += getattr(event, f"self_{kind}_time_total") / 1e6
    return groups | {"the rest": total - sum(groups[name] for name in GROUPS)}


def freelb_step(loss_of, mask, dim, adversary):
    """The loss and gradients of FreeLB, for both sides. adversary: as in ADVERSARIES."""
    steps, lr, init_mag, max_norm, only_last = adversary
    delta = initial_delta(mask, dim, init_mag, max_norm)
    return freelb(loss_of, delta, mask, steps, lr, max_norm, only_last=only_last)


def full_size(config):
    """The arguments of Coefficients."""
    return config.num_hidden_layers, config.num_attention_heads, config.intermediate_size


def search_work(options, side, folder, device):
    """A FreeLB step of either side on random words."""
    config = Config.read(folder)
    words = min(1000, config.vocab_size // 2), min(30000, config.vocab_size)
    ids = torch.randint(*words, (options.batch_size, options.block), device=device)
    positions = (torch.rand(ids.shape, device=device) < 0.15).flatten().nonzero().flatten()
    batch = MaskedBatch(ids, positions, ids.flatten()[positions])
    if libraries.is_baseline(side):
        model, loss_of = libraries.masked_lm(folder, side, *batch)
        modules = [model]
    else:
        model, c = Bert.load(folder, mlm=True).to(device), Coefficients(*full_size(config)).to(device)
        modules, loss_of = [model, c], lambda delta: objective(model, batch, c.gates, delta)
    adversary = options.adv_steps, *ADVERSARIES["freelb"][1:]

    def loss():
        return freelb_step(loss_of, batch.token_mask, config.hidden_size, adversary)

    return SimpleNamespace(modules=modules, loss=loss, steps=lambda: [loss()], tokens=ids.numel())


def finetune_work(options, side, folder, device, dtype):
    """An epoch of either side on the first --rows rows of the task, and classifying its test rows. orticket does what
    finetune.py does, with the vocabulary of all training rows."""
    task, batch_size = data.find_task(options.task), options.batch_size
    splits = task.load(None)
    train, test = splits["train"], splits["test"]
    rows = first_rows(train, options.rows, options.task)
    if libraries.is_baseline(side):
        return libraries.classifier(folder, side, rows, test, batch_size, task.max_length, device)
    adversary = ADVERSARIES["freelb" if "FreeLB" in side else "vanilla"]
    model, tokenizer = Bert.load(folder), Tokenizer(Path(folder))
    if side.startswith("its ticket"):
        layers, heads, neurons = full_size(model.config)
        head_mask, ffn_mask = draw_masks(torch.rand(layers, heads), torch.rand(layers, neurons), 1 / 6, 0.3)
        if "x 64" in side:  # rounds what a layer keeps to a multiple of 64
            ffn_mask = torch.arange(neurons) < (ffn_mask.sum(1, keepdim=True) / 64).round() * 64
        model = model.pruned(head_mask, ffn_mask)
    model.to(device)
    rows, test, train = (TokenizedSplit(tokenizer, part, task.max_length, device) for part in (rows, test, train))
    model, _ = restrict_vocabulary(model, rows, test, train)
    if "compiled" in side:
        Dropout.forward = lambda self, x: F.dropout(x, self.p, self.training)  # NumPy's is not compiled
        for layer in model.layers:
            layer.compile(dynamic=True)

    def steps():
        for batch in rows.batches(batch_size, np.random.default_rng(0)):
            loss_of = lambda delta: model.class_loss(*batch, delta=delta)  # noqa: E731
            yield freelb_step(loss_of, batch.token_mask, model.config.hidden_size, adversary)

    def loss():
        with torch.no_grad():
            losses = [model.class_loss(*batch) * len(batch.labels) for batch in rows.batches(batch_size)]
        return sum(losses) / len(rows)

    def classify():
        return finetune.accuracy(model, test, batch_size, dtype)

    return SimpleNamespace(modules=[model], steps=steps, loss=loss, classify=classify, tokens=len(rows.ids))
