"""What the paper's experiments cost on machines that were not measured: `python -m benchmarks.bench cost`.

The work of a step (FLOPs, operators, memory) is counted on PyTorch's meta device, which computes nothing. The rates of
2 CPU cores are those that `bench search`, `finetune` and `attack` saved; the rates of GPUs are their peaks times SHARE.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from baselines import robustt
from benchmarks import report
from benchmarks.training import freelb_step, full_size
from bert import Bert, Config
from freelb import ADVERSARIES
from gates import Coefficients
from inputs.batches import MaskedBatch
from runtime import files
from runtime.cli import BadInput
from search import objective

SHARE = 0.35  # of a GPU's peak, assumed: 0.3 to 0.4 for large products and the operators between them
LAUNCH = 5e-6  # seconds of Python and the driver per operator on a GPU, assumed: they bound a small step
PEAKS = {"A100": 312e12, "H100": 989e12}  # FLOP/s in dense bfloat16, for training
PEAKS_FP32 = {"A100": 19.5e12, "H100": 67e12}  # in float32, for attacks
LINKS = {"NVLink 4": 450e9, "PCIe 4": 25e9, "100 Gbit/s": 12.5e9, "10 Gbit/s": 1.25e9}  # bytes/s in one direction
BATCH, EPOCHS, BLOCK, MASKED = 32, 10, 128, 0.15
CORPUS_TOKENS = 2_400_000  # of wikitext-2-raw-v1 in BERT's word pieces, assumed: 2,088,628 words
VERDICT = ("Vanilla", "ORTicket", "ORTicket")  # a random ticket costs as much as ORTicket
QUERIES_PER_BATCH = 30  # of an attack, assumed: the substitutes of a word
BASE = Config(num_labels=2)
MINILM = Config(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_labels=2)


@dataclass
class Task:
    rows: int  # for training
    tokens: float  # mean of a training row, at most 256, with [CLS] and [SEP]
    test_tokens: float  # of a test row
    attacked: int  # test rows
    tau_ffn: float


TASKS = {
    "sst2": Task(67_349, 13.4, 25.2, 872, 0.2),  # tokens measured
    "qnli": Task(104_743, 51, 51, 1000, 0.3),  # measured on the validation rows
    "qqp": Task(363_846, 30, 30, 1000, 0.2),  # assumed
    "imdb": Task(25_000, 205, 205, 1000, 0.3),  # measured on 5,000 of the bundled reviews
    "agnews": Task(120_000, 53, 53, 1000, 0.3),  # assumed
}
RT_TOKENS = 27  # of a test row of rt, with which attacks were measured


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


def count(config, tokens, adversary, masked=0, gated=False):
    """A step on BATCH x `tokens`: array (FLOPs, operators). adversary: as in ADVERSARIES; None: only a forward pass.
    masked: tokens per example of masked language modelling, instead of classification. gated: with RobustT's gates."""
    with as_on_a_gpu():
        loss_of, ids = loss_on_meta(config, tokens, masked, gated)
        with FlopCounterMode(display=False) as flops, Operators() as operators:
            if adversary is None:
                with torch.no_grad():
                    loss_of(0.0)
            else:
                freelb_step(loss_of, torch.ones_like(ids), config.hidden_size, adversary)
    return np.array([flops.get_total_flops(), operators.count], dtype=float)


@contextlib.contextmanager
def as_on_a_gpu():
    """Run the block on the meta device, with attention as one operator, where PyTorch has several."""

    def fused(q, k, v, bias, p):
        wants_gradient = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, wants_gradient, p)[0]

    no_generator = SimpleNamespace(get_rng_state=lambda: None, set_rng_state=lambda state: None)
    with torch.device("meta"), mock.patch.object(torch, "meta", no_generator, create=True):
        with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused):
            yield


def loss_on_meta(config, tokens, masked, gated=False):
    """(loss_of(delta), ids) of a new model. Call with meta as the default device."""
    model, c = Bert(config, mlm=masked > 0), Coefficients(*full_size(config))
    if gated:
        robustt.add_gates(model, 0.9)
    ids = torch.zeros(BATCH, round(tokens), dtype=torch.long)
    positions = torch.zeros(round(masked * BATCH), dtype=torch.long)
    if masked:
        return lambda delta: objective(model, MaskedBatch(ids, positions, positions), c.gates, delta), ids
    return lambda delta: model.class_loss(ids, None, None, ids[:, 0], delta=delta), ids


def activations(config, tokens, masked):
    """Bytes that a pass in float32 keeps for its backward pass, weights included."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with as_on_a_gpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of, _ = loss_on_meta(config, tokens, masked)
        loss = loss_of(0.0)  # kept until all are counted, so that no storage is reused
    del loss
    return sum(kept.values())


def fine_tuning(task):
    """{method: (FLOPs, operators) of fine-tuning on a task}."""
    forward = count(BASE, task.tokens, None)  # a backward pass to the embeddings alone costs as much
    vanilla, freelb = (count(BASE, task.tokens, ADVERSARIES[name]) for name in ("vanilla", "freelb"))
    pgd = vanilla + 2 * 2 * forward  # only the last of three passes trains
    infobert = freelb + 3 * forward  # its second loss needs the gradient at delta first
    widths = {"heads": (10,) * 12, "neurons": (round((1 - task.tau_ffn) * 3072),) * 12}
    ticket = count(Config(num_labels=2, **widths), task.tokens, ADVERSARIES["vanilla"])
    masks = count(BASE, task.tokens, ADVERSARIES["freelb-textdefender"], gated=True)
    of_robustt = 20 / EPOCHS * masks + vanilla  # learns masks for 20 epochs, then trains with them
    steps = EPOCHS * math.ceil(task.rows / BATCH)
    works = {"Vanilla": vanilla, "PGD": pgd, "FreeLB": freelb, "InfoBERT": infobert}
    return {name: steps * work for name, work in (works | {"RobustT": of_robustt, "ORTicket": ticket}).items()}


def count_queries(name, methods=None, attack=""):
    """Queries of the attacks, by default all, on these methods, by default each once, on a task: the paper's mean,
    times the attacked rows classified right."""
    table = files.read_json(report.ROOT / "experiments" / "paper.json")["table1"]
    means = [i for i, column in enumerate(table["columns"]) if column.endswith("#Query") and attack in column]
    rows = [table["rows"][name][method] for method in methods or table["rows"][name]]
    return sum(TASKS[name].attacked * row[0] / 100 * row[i] for row in rows for i in means)


def seconds(work, rate, launch):
    """Time of (FLOPs, operators). launch: seconds per operator."""
    return max(work[0] / rate, launch * work[1])


def bench(options, folder):
    """(name, figures, lines) for report.publish."""
    search = count(Config(), BLOCK, ADVERSARIES["freelb"], MASKED * BLOCK)
    steps = math.ceil(CORPUS_TOKENS / (BLOCK - 2) / BATCH)
    lines = ["Hours with BERT-base and one seed: the search on wikitext-2, one epoch at most; each method on all five"]
    lines += ["tasks, ten epochs; all three attacks on all six methods. Eight GPUs make eight runs at a time, and"]
    lines += [
        "search on one. 21 runs: those that [results.md](results.md) asks for, 7 seeds of Vanilla, ORTicket and the"
    ]
    hours = cost_in_hours(search, steps)
    shown = {name: f"{{{name}:,.2f}}" for name in next(iter(hours.values()))} | {"search": "{search:.3g}"}
    lines += ["random ticket on SST-2 under TextFooler.", "", *report.table(hours, shown), ""]
    lines += [*memory_and_traffic(steps), ""]
    scaling = time_of_steps(
        {"search, 32 x 128 tokens": search}
        | {f"{name}, 32 rows": count(BASE, TASKS[name].tokens, ADVERSARIES["vanilla"]) for name in ("sst2", "imdb")}
    )
    columns = {"computing": "{computing:.2f}"}
    columns |= {f"{link}: sum, speedup": f"{{{link}:.2f}}, {{speedup {link}:.1f}}" for link in LINKS}
    lines += ["Milliseconds of a step that n H100 share, and of the sum of their gradients after it:", ""]
    return "cost", hours | scaling, [*lines, *report.table(scaling, columns)]


def cost_in_hours(search, steps):
    """{machine: {work: hours}}."""
    saved = [report.read(what) for what in ("search", "finetune", "attack-textfooler-rt")]
    if len({json.dumps([of["machine"], of["versions"]]) for of in saved}) > 1:
        remedy = "run bench search, finetune, attack --save"
        raise BadInput(f"the saved figures are from several machines or versions: {remedy}")
    searching, training = (fastest(of["figures"]) for of in saved[:2])
    machines = {saved[0]["machine"]: (searching, training, 0.0, 0.0)}
    machines |= {f"one {of}": (SHARE * PEAKS[of], SHARE * PEAKS[of], SHARE * PEAKS_FP32[of], LAUNCH) for of in PEAKS}
    attack = saved[2]["figures"]["orticket in fp32"]
    per_query = attack["the model"] / attack["queries"]
    rest = attack["seconds"] / attack["queries"] - per_query  # on the CPU, everywhere
    minilm, tasks = count(MINILM, RT_TOKENS, None), {name: fine_tuning(task) for name, task in TASKS.items()}
    hours = {}
    for machine, (searching, training, attacking, launch) in machines.items():
        row = {"search": steps * seconds(search, searching, launch), "attacks": 0.0}
        for name, works in tasks.items():
            for method, work in works.items():
                row[method] = row.get(method, 0) + seconds(work, training, launch)
            forward = count(BASE, TASKS[name].test_tokens, None)
            on_gpu = seconds(forward / [BATCH, QUERIES_PER_BATCH], attacking, launch) if launch else 0.0
            of_query = on_gpu if launch else per_query * forward[0] / minilm[0]
            row["attacks"] += count_queries(name) * (of_query + rest)
            if name == "sst2":
                queries = count_queries(name, VERDICT, "textfooler")
                tuning = sum(seconds(works[method], training, launch) for method in VERDICT)
                runs = 7 * (row["search"] + tuning + queries * (of_query + rest))
        row |= {"all": sum(row.values()), "21 runs": runs}
        hours[machine,] = {name: value / 3600 for name, value in row.items()}
    one = hours["one H100",]
    eight = {name: value / (1 if name == "search" else 8) for name, value in one.items()}
    hours["eight H100",] = eight | {"all": eight["all"] + eight["search"] - one["search"] / 8}
    return hours


def fastest(rows):
    """FLOP/s of orticket with the full model, in its fastest precision."""
    return max(row["flops"] / row["seconds"] for name, row in rows.items() if name.startswith("orticket in"))


def number_of_parameters():
    with torch.device("meta"):
        return sum(p.numel() for p in Bert(BASE).parameters())


def memory_and_traffic(steps):
    parameters, kept = number_of_parameters(), activations(Config(), BLOCK, MASKED * BLOCK)
    tuning = sum(EPOCHS * math.ceil(task.rows / BATCH) for task in TASKS.values())
    sent = 2 * 7 / 8 * 4 * parameters
    yield f"A step of the search keeps {16 * parameters / 1e9:.1f} GB of weights, gradients and AdamW's moments, and at"
    yield f"most {kept / 1e9:.1f} GB for its backward pass on a GPU (float32; half in bfloat16). Its gradients are"
    yield f"{4 * parameters / 1e6:.0f} MB; in a ring of eight processes each sends {sent / 1e6:.0f} MB a step:"
    yield f"{steps * sent / 1e12:.2f} TB in the {steps:,} steps of a search, {tuning * sent / 1e12:.0f} TB in the"
    yield f"{tuning:,} steps of one method on all tasks."


def time_of_steps(works):
    """{(work, n): {milliseconds of computing and of each link, and the speedup with it}}. Each of n GPUs computes an
    n-th of a batch, and then sends 2 (n - 1) / n of the gradients' bytes in a ring, as in sum_gradients."""
    figures, gradients = {}, 4 * number_of_parameters()
    for name, work in works.items():
        for n in (1, 2, 4, 8):
            whole, part = (1000 * seconds(work / [m, 1], SHARE * PEAKS["H100"], LAUNCH) for m in (1, n))
            row = {"computing": part}
            for link, speed in LINKS.items():
                row[link] = 1000 * 2 * (n - 1) / n * gradients / speed
                row[f"speedup {link}"] = whole / (part + row[link])
            figures[f"{name}, n = {n}",] = row
    return figures
