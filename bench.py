"""Speed side by side with Hugging Face transformers, as ratios on the same work in the same run.

    python bench.py search                    one FreeLB step on masked language modelling
    python bench.py search --attention eager  against transformers' plain attention rather than its default, SDPA
    python bench.py search --same-allocator   the peer with our allocator setting as well

Each side runs in a process of its own, as its users would start it, the sides in turn; the first steps of each warm
up and are not counted. Both start from the same weights and see the same batches, and their losses are compared
first (dropout off), so that a fast wrong answer cannot win.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

import data
import runtime
from bert import Bert
from freelb import freelb
from gates import Coefficients
from runtime import BadInput, option

SIDES = ("orticket", "transformers")
ADVERSARY = {"lr": 0.03, "init_mag": 0.05, "max_norm": 0.2}


@dataclass
class Options:
    what: str = option("search", "what to time", choices=("search",), positional=True)
    batch_size: int = option(32, "examples a step", at_least=1)
    block: int = option(128, "tokens an example", at_least=8)
    adv_steps: int = option(3, "K, FreeLB's ascent steps", at_least=1)
    steps: int = option(3, "counted steps in each process", at_least=1)
    rounds: int = option(3, "processes of each side, in turn", at_least=1)
    attention: str = option("sdpa", "the peer's attention", choices=("sdpa", "eager"))
    same_allocator: bool = option(False, "give the peer, too, runtime.keep_memory()")
    json: str = option(None, "also write the figures to this file")
    worker: str = option(None, "internal: SIDE,PRECISION,FOLDER, one process of one side")


def main():
    options = runtime.parse(Options, __doc__)
    if options.worker:
        return work(options, *options.worker.split(","))
    device = runtime.pick_device()
    precisions = ["fp32"] if runtime.pick_precision(device, "auto") == torch.float32 else ["bf16", "fp32"]
    cases = [(side, precision) for precision in precisions for side in SIDES]
    runs = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        model = Bert.load(data.find_model("minilm")[0], mlm=True)
        model.save(folder, (), {})
        bar = runtime.progress(options.rounds * len(cases), description="processes")
        for _ in range(options.rounds):
            for case in cases:
                command = [sys.executable, __file__, *sys.argv[1:], "--worker", ",".join((*case, folder))]
                ended = subprocess.run(command, capture_output=True, text=True)
                if ended.returncode:
                    raise BadInput(f"{case[0]} in {case[1]} failed: {ended.stderr.strip().splitlines()[-1]}")
                runs[case].append(json.loads(ended.stdout.splitlines()[-1]))
                bar.update()
        bar.close()

    figures = {}
    for case, results in runs.items():
        seconds = statistics.median(second for result in results for second in result["seconds"])
        memory = max(result["memory"] for result in results) / 1e9
        figures[case] = {"seconds": seconds, "memory_gb": memory, "loss": results[0]["loss"]}
    print(
        f"FreeLB step, MiniLM, K = {options.adv_steps}, {options.batch_size} x {options.block} tokens, "
        f"{runtime.describe(device)}; transformers with {options.attention} attention; "
        f"medians of {options.rounds} x {options.steps} steps"
    )
    print("                       seconds  tokens/s  peak GB     loss  times orticket's", precisions[0])
    fastest = figures["orticket", precisions[0]]["seconds"]
    for (side, precision), row in figures.items():
        rate = options.batch_size * options.block / row["seconds"]
        print(f"{side:>14s} in {precision}  {row['seconds']:8.2f}  {rate:8,.0f}  {row['memory_gb']:7.2f}", end="  ")
        print(f"{row['loss']:7.4f}  {row['seconds'] / fastest:8.2f}")
    losses = [row["loss"] for row in figures.values()]
    if max(losses) - min(losses) > 0.02:
        raise BadInput(f"the losses differ by {max(losses) - min(losses):.4f}: the sides do not do the same work")
    if options.json:
        runtime.write_json(options.json, {f"{side} {precision}": row for (side, precision), row in figures.items()})


def work(options, side, precision, folder):
    """One process of one side: prints {"loss", "seconds" of each counted step, "memory" in bytes} as JSON."""
    device = runtime.pick_device()
    dtype = runtime.pick_precision(device, precision)
    if side == "orticket" or options.same_allocator:
        runtime.keep_memory()
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (options.batch_size, options.block), device=device)
    positions = (torch.rand(ids.shape, device=device) < 0.15).flatten().nonzero().flatten()
    tokens, labels = torch.ones_like(ids), ids.flatten()[positions]
    if side == "orticket":
        loss_of, parameters, train = ours(folder, ids, positions, labels, device)
    else:
        loss_of, parameters, train = peer(folder, ids, positions, labels, device, options.attention)
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, fused=True)

    def adversarial_loss():
        torch.manual_seed(1)  # the same delta on both sides
        with runtime.autocast(device, dtype):
            return freelb(loss_of, tokens, 384, options.adv_steps, **ADVERSARY)

    train(False)
    loss = adversarial_loss().item()
    optimizer.zero_grad()
    train(True)
    seconds = []
    for _ in range(2 + options.steps):
        start = time.perf_counter()
        adversarial_loss().item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    print(json.dumps({"loss": loss, "seconds": seconds[2:], "memory": memory}))


def ours(folder, ids, positions, labels, device):
    model, c = Bert.load(folder, mlm=True).to(device), Coefficients(6, 12, 1536).to(device)

    def loss_of(delta):
        return model.mlm_loss(model(ids, keep=positions, gates=c.gates, delta=delta), labels)

    return loss_of, [*model.parameters(), *c.parameters()], model.train


def peer(folder, ids, positions, labels, device, attention):
    """transformers' BertForMaskedLM as FreeLB's published scripts drive it; it has no coefficients to learn."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(folder, attn_implementation=attention).to(device)
    mask, wanted = torch.ones_like(ids), torch.full_like(ids.flatten(), -100)
    wanted[positions] = labels
    wanted = wanted.view(ids.shape)

    def loss_of(delta):
        words = model.get_input_embeddings()(ids) + delta
        return model(inputs_embeds=words, attention_mask=mask, labels=wanted).loss

    return loss_of, list(model.parameters()), model.train


if __name__ == "__main__":
    runtime.run(main)
