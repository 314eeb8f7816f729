"""Speed side by side with Hugging Face transformers and TextAttack, as ratios on the same work in the same run.

    python bench.py search                    one FreeLB step on masked language modelling
    python bench.py finetune --task sst2      vanilla fine-tuning and classifying, of the full model and of a ticket
    python bench.py load                      a checkpoint of BERT-base's size, in each format
    python bench.py attack                    TextFooler on the full MiniLM that finetune.py made, and by TextAttack
    python bench.py attack --attack bertattack --n 4 --rounds 1
    python bench.py scale                     how the cost grows with the work, with a plot

Each side runs in a process of its own, as its users would start it, the sides in turn; the first steps of each warm
up and are not counted. Both start from the same weights and see the same examples, and their losses (dropout off), the
sums of what they loaded or the texts they found are compared, so that a fast wrong answer cannot win.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import attack
import data
import finetune
from attacks import recipes
from benchmarks import libraries, scale
from bert import Bert, Config
from checkpoints.huggingface import read_weights
from freelb import freelb
from gates import Coefficients, draw_masks
from inputs.batches import TokenizedSplit
from inputs.tokenizer import Tokenizer
from runtime import cli, files
from runtime.cli import BadInput, option
from runtime.cpu import keep_memory
from runtime.device import autocast, describe, peak_memory, pick_device, pick_precision
from runtime.embeddings import restrict_vocabulary

SUBCOMMANDS = ("search", "finetune", "load", "attack", "scale")
PEERS = {"transformers, SDPA": "sdpa", "transformers, eager": "eager"}  # and their attention
ADVERSARY = {"lr": 0.03, "init_mag": 0.05, "max_norm": 0.2}


@dataclass
class Options:
    what: str = option("search", "what to time", choices=SUBCOMMANDS, positional=True)
    batch_size: int = option(32, "examples a step", at_least=1)
    block: int = option(128, "of search: tokens an example", at_least=8)
    adv_steps: int = option(3, "of search: K, FreeLB's ascent steps", at_least=1)
    steps: int = option(3, "of search: counted steps in each process", at_least=1)
    rows: int = option(640, "of finetune: training rows", at_least=1)
    rounds: int = option(3, "processes of each side, in turn", at_least=1)
    same_allocator: bool = option(False, "give the peer, too, cpu.keep_memory()")
    attack: str = option("textfooler", "which attack", choices=tuple(recipes.RECIPES))
    task: str = option("rt", "of finetune and attack; the attacked model is that of finetune.py --ticket none")
    n: int = option(20, "of attack: test rows that are attacked", at_least=1)
    vectors: str = option(None, "word vectors, as of attack.py")
    megabytes: int = option(1000, "of scale: the largest corpus", at_least=1)
    output: str = option("runs", "folder that finetune.py wrote to; of scale: that gets scale.png and scale.json")
    json: str = option(None, "also write the figures to this file; scale writes OUTPUT/scale.json")
    worker: str = option(None, "internal: SIDE;CASE;FOLDER, one process of one side")


def main():
    options = cli.parse(Options, __doc__)
    if options.worker:
        works = {"search": time_training, "finetune": time_training, "load": time_load, "attack": time_attack}
        return works[options.what](options, *options.worker.split(";"))
    if options.what == "scale":
        return scale.bench(options)
    with tempfile.TemporaryDirectory() as folder:
        works = {"search": bench_training, "finetune": bench_training, "load": bench_load, "attack": bench_attack}
        figures = works[options.what](options, Path(folder))
    if options.json:
        files.write_json(options.json, {" ".join(case): row for case, row in figures.items()})


def in_turn(options, cases, folder):
    """{case: [what each of its processes found]}: every round starts one process a case."""
    runs = {case: [] for case in cases}
    bar = cli.progress(options.rounds * len(cases), description="processes")
    for _ in range(options.rounds):
        for case in cases:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", ";".join((*case, str(folder)))]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                raise BadInput(f"{' '.join(case)} failed: {cli.last_words(ended.stderr, ended.returncode)}")
            runs[case].append(json.loads(ended.stdout.splitlines()[-1]))
            bar.update()
    bar.close()
    return runs


def agree(values, tolerance):
    """Raises BadInput where the sides did not do the same work."""
    if max(values) - min(values) > tolerance:
        raise BadInput(f"the sides differ by {max(values) - min(values):.4g}: they do not do the same work")


# ------------------------------------------------------------------------------------------ search and fine-tuning


def bench_training(options, folder):
    device, is_search = pick_device(), options.what == "search"
    precisions = ["fp32"] if pick_precision(device, "auto") == torch.float32 else ["bf16", "fp32"]
    cases = [(side, precision) for precision in precisions for side in ("orticket", *PEERS)]
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
    figures = {}
    for case, results in in_turn(options, cases, folder).items():
        figures[case] = {key: statistics.median(result[key] for result in results) for key in results[0]}
        figures[case]["range"] = [of(result["seconds"] for result in results) for of in (min, max)]
    print(f"{work}, MiniLM, {describe(device)}; medians of {options.rounds} processes' medians")
    print("seconds are of a step" if is_search else "seconds are of all rows; classifying: of the test rows")
    print(f"{'':27s}  seconds     (range)   times  tokens/s  of peak  peak GB    loss", end="")
    print("" if is_search else "  classifying  times")
    fastest = figures["orticket", precisions[0]]
    for (side, precision), row in figures.items():
        low, high = row["range"]
        times, share = row["seconds"] / fastest["seconds"], row["flops"] / row["seconds"] / row["peak"]
        print(f"{side:>19s} in {precision}  {row['seconds']:7.2f} {low:6.2f}-{high:<6.2f} {times:5.2f}", end="  ")
        print(
            f"{row['tokens'] / row['seconds']:8,.0f}  {share:7.1%}  {row['memory'] / 1e9:7.2f} {row['loss']:7.4f}",
            end="",
        )
        print("" if is_search else f"  {row['classify']:11.2f}  {row['classify'] / fastest['classify']:5.2f}")
    print("times: orticket's seconds in these; of peak: FLOP/s as a share of those of a product of large matrices")
    whole = [row for (side, _), row in figures.items() if side != "its ticket"]
    agree([row["loss"] for row in whole], 0.02)
    if not is_search:
        agree([row["right"] for row in whole], 0.03)
    return figures


def time_training(options, side, precision, folder):
    """One process of one side: prints its "seconds", "flops", "loss" and so on as JSON."""
    device, is_search = pick_device(), options.what == "search"
    dtype = pick_precision(device, precision)
    if side not in PEERS or options.same_allocator:
        keep_memory()
    torch.manual_seed(0)
    if is_search:
        ids = torch.randint(1000, 30000, (options.batch_size, options.block), device=device)
        positions = (torch.rand(ids.shape, device=device) < 0.15).flatten().nonzero().flatten()
        given = (ids, positions, ids.flatten()[positions]), ADVERSARY | {"steps": options.adv_steps}, device
        work = libraries.search_work(folder, PEERS[side], *given) if side in PEERS else search_work(folder, *given)
    else:
        task = data.find_task(options.task)
        splits = task.load(None)
        rows = data.first_rows(splits["train"], options.rows, options.task)
        given = rows, splits["test"], options.batch_size, task.max_length, device
        if side in PEERS:
            work = libraries.finetune_work(folder, PEERS[side], *given)
        else:
            work = finetune_work(folder, side, dtype, splits["train"], *given)
    modules = torch.nn.ModuleList(work.modules)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-5, fused=True)

    def seconds_of(call):
        start = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    def epoch():
        for _ in work.steps():
            torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    with autocast(device, dtype):
        modules.eval()
        torch.manual_seed(1)  # the same delta on both sides
        found = {"loss": float(work.loss()), "tokens": work.tokens}
        optimizer.zero_grad()
        if not is_search:
            with torch.inference_mode():
                work.classify()
                found["classify"], right = seconds_of(work.classify)
            found["right"] = right / len(splits["test"])
        modules.train()
        with FlopCounterMode(display=False) as counter:
            epoch()
        found["flops"] = counter.get_total_flops()
        found["seconds"] = statistics.median(seconds_of(epoch)[0] for _ in range(options.steps if is_search else 1))
        found["memory"] = peak_memory(device)
        size = 8192 if device.type == "cuda" else 2048
        a = torch.randn(size, size, device=device)
        fastest = min(seconds_of(lambda: torch.mm(a, a))[0] for _ in range(8))
        found["peak"] = 2 * size**3 / fastest
    print(json.dumps(found))


def search_work(folder, batch, adversary, device):
    """What search.py does with a batch (ids, positions, labels)."""
    model, c = Bert.load(folder, mlm=True).to(device), Coefficients(6, 12, 1536).to(device)
    ids, positions, labels = batch

    def loss_of(delta):
        return model.mlm_loss(model(ids, positions=positions, gates=c.gates, delta=delta), labels)

    def loss():
        return freelb(loss_of, torch.ones_like(ids), 384, **adversary)

    def steps():
        yield loss()

    return SimpleNamespace(modules=[model, c], steps=steps, loss=loss, tokens=ids.numel())


def finetune_work(folder, side, dtype, train, rows, test, batch_size, max_length, device):
    """What finetune.py does with these `rows` when it trains on all of `train`, whose words are more; the ticket is
    one of ratios 1/6 and 0.3."""
    adversary = ADVERSARY | {"steps": 3} if side == "with FreeLB" else dict.fromkeys(ADVERSARY, 0.0) | {"steps": 1}
    model, tokenizer = Bert.load(folder), Tokenizer(Path(folder))
    if side == "its ticket":
        model = model.pruned(*draw_masks(torch.rand(6, 12), torch.rand(6, 1536), 1 / 6, 0.3))
    model.to(device)
    sets = [TokenizedSplit(tokenizer, part, max_length, device) for part in (rows, test, train)]
    model, _ = restrict_vocabulary(model, *sets)
    rows, test, _ = sets

    def steps():
        for batch in rows.batches(batch_size, np.random.default_rng(0)):
            loss_of = lambda delta: model.class_loss(*batch, delta=delta)  # noqa: E731
            yield freelb(loss_of, batch.token_mask, 384, **adversary)

    def loss():
        with torch.no_grad():
            losses = [model.class_loss(*batch) * len(batch[-1]) for batch in rows.batches(batch_size)]
        return sum(losses) / len(rows)

    def classify():
        return finetune.accuracy(model, test, batch_size, dtype) * len(test)

    return SimpleNamespace(modules=[model], steps=steps, loss=loss, classify=classify, tokens=len(rows.ids))


# --------------------------------------------------------------------------------------------------------- load


def bench_load(options, folder):
    """A file is mapped, not read, before its numbers are used: so the time until each was used once counts as well."""
    torch.manual_seed(0)
    model = Bert(Config(), mlm=True)
    for kind in ("safetensors", "bin", "tensorflow"):
        (folder / kind).mkdir()
        model.save(folder / kind, (), {})
    tensors = read_weights(folder / "safetensors")
    size = (folder / "safetensors" / "model.safetensors").stat().st_size
    torch.save(dict(tensors), folder / "bin" / "pytorch_model.bin")
    libraries.write_tensorflow(folder / "tensorflow" / "bert_model.ckpt", tensors)
    for kind in ("bin", "tensorflow"):
        (folder / kind / "model.safetensors").unlink()
    sides = ("orticket", "transformers")
    cases = [(side, kind) for kind in ("safetensors", "bin") for side in sides] + [("orticket", "tensorflow")]
    figures = {}
    for case, results in in_turn(options, cases, folder).items():
        figures[case] = {key: statistics.median(result[key] for result in results) for key in results[0]}
    print(
        f"loading BERT-base with MLM head, {size / 1e6:.0f} MB, {describe(torch.device('cpu'))}; "
        f"medians of {options.rounds} processes"
    )
    print("                             seconds  and each number used  peak memory / file  times transformers")
    for (side, kind), row in figures.items():
        against = row["used"] / figures["transformers", "bin" if kind == "bin" else "safetensors"]["used"]
        print(f"{side:>14s}, {kind:11s}  {row['seconds']:8.3f}  {row['used']:20.3f}", end="  ")
        print(f"{row['memory'] / size:18.2f}  {against:18.2f}")
    agree([row["sum"] for row in figures.values()], 0.1)
    return figures


def time_load(options, side, kind, folder):
    """Prints {"seconds" to load, "used": until every number was read, "memory" above that of torch, "sum"} as JSON."""
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
    memory = peak_memory(cpu) - before
    print(json.dumps({"seconds": seconds, "used": used, "memory": memory, "sum": total}))


# ------------------------------------------------------------------------------------------------------- attack

PARTS = ("the model", "sentence encoder", "part of speech", "substitutes", "the rest", "import")


def bench_attack(options, folder):
    """Seconds from the first to the last example; the import of TextAttack, the same for both, is shown apart."""
    cases = [("orticket", "fp32"), ("textattack", "fp32"), ("orticket", "bf16")]
    if pick_precision(pick_device(), "auto") == torch.float32:
        cases.pop()
    figures, found = {}, {}
    for case, results in in_turn(options, cases, folder).items():
        found[case] = results[0].pop("found")
        figures[case] = {part: statistics.median(result[part] for result in results) for part in PARTS}
        figures[case]["seconds"] = statistics.median(result["seconds"] for result in results)
        figures[case]["queries"] = sum(queries for _, _, queries in found[case])
    wanted = found["textattack", "fp32"]
    print(
        f"{options.attack} on {options.n} rows of {options.task}, {describe(pick_device())}; "
        f"seconds, medians of {options.rounds} processes"
    )
    print("                      in all  times orticket's  queries  same outcome  " + "  ".join(PARTS))
    for case, row in figures.items():
        same = sum(one == other for one, other in zip(found[case], wanted))
        parts = "  ".join(f"{row[part]:>{len(part)}.2f}" for part in PARTS)
        print(f"{case[0]:>12s} in {case[1]}  {row['seconds']:7.2f}", end="  ")
        print(f"{row['seconds'] / figures['orticket', 'fp32']['seconds']:16.2f}", end="  ")
        print(f"{row['queries']:7,}  {f'{same} of {options.n}':>12s}  {parts}")
    return figures


def time_attack(options, side, precision, folder):
    """Prints {"seconds", those of each of PARTS, "found": [[outcome, text, queries] of each example]} as JSON."""
    clock = dict.fromkeys(PARTS, 0.0)
    start = time.perf_counter()
    textattack, nltk_data = attack.import_textattack()
    clock["import"] = time.perf_counter() - start
    given = {"task": options.task, "model": "minilm", "output": options.output, "n": options.n}
    given["vectors"] = options.vectors
    given = attack.Options(attack=options.attack, ticket="none", precision=precision, max_length=512, **given)
    recipe, examples = (attack_of if side == "orticket" else unwrapped)(textattack, nltk_data, given)
    spend(clock, "the model", recipe.goal_function, "model")
    for constraint in recipe.constraints:
        for part, name in (("sentence encoder", "model"), ("part of speech", "_get_pos")):
            if hasattr(constraint, name):
                spend(clock, part, constraint, name)
    if options.attack == "bertattack":
        spend(clock, "substitutes", recipe.transformation, "_get_transformations")
    start, found = time.perf_counter(), []
    for number, (columns, label) in examples.items():
        textattack.shared.utils.set_seed(number)
        attack.forget(recipe)
        result = recipe.attack(columns, label)
        found.append((type(result).__name__, result.perturbed_result.attacked_text.text, result.num_queries))
    seconds = time.perf_counter() - start
    clock["the rest"] = seconds - sum(clock[part] for part in PARTS[:4])
    print(json.dumps(clock | {"seconds": seconds, "found": found}))


def spend(clock, part, owner, name):
    """Let calls of owner.name count as this part's time."""
    call = getattr(owner, name)

    def timed(*arguments):
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            clock[part] += time.perf_counter() - start

    setattr(owner, name, timed)


def attack_of(textattack, nltk_data, options):
    """(the recipe as attack.py has it, {number: (columns, label)} of the rows it attacks)."""
    keep_memory()
    device = pick_device()
    task = data.find_task(options.task)
    splits, dtype = task.load(None), pick_precision(device, options.precision)
    victim, _, _ = attack.find_victim(options, task, splits, device, dtype)
    recipe, _ = recipes.build(textattack, nltk_data, options.attack, options, task, victim)
    test = splits["test"]
    rows = {number: test[number] for number in attack.sample(options, len(test))}
    return recipe, {i: (OrderedDict(zip(task.columns, texts)), label) for i, (texts, label) in rows.items()}


def unwrapped(textattack, nltk_data, options):
    """The same as TextAttack's users run it."""
    recipe, examples = attack_of(textattack, nltk_data, options)
    libraries.unwrap(recipe, textattack, options)
    return recipe, examples


if __name__ == "__main__":
    cli.run(main)
